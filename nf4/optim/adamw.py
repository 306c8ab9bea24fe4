"""AdamW with 8-bit or 32-bit moments, resident or paged: one implementation, two switches.

The update is AdamW of Loshchilov and Hutter, "Decoupled Weight Decay Regularization"
(arXiv:1711.05101). With g the gradient in float32, each line is one float32 rounding per operation,
in the order written, on every backend (no fused multiply-add, IEEE square root and division)::

    m' = beta1 * m + gain1 * g
    v' = beta2 * v + (gain2 * g) * g
    p' = p * decay - step_size * (m' / (sqrt(v') * inverse_c2 + eps))

``hyper`` holds, computed in float64 and rounded once: beta1, gain1 = 1 - beta1 (negated to
maximize), beta2, gain2 = 1 - beta2, inverse_c2 = 1 / sqrt(1 - beta2^t), eps,
decay = 1 - lr * weight_decay, step_size = lr / (1 - beta1^t).

8-bit moments are read as ``map[code] * absmax`` and written by the quantization rule of
``nf4.formats`` over blocks of 256, from m' and v' before any rounding of theirs; p' uses m' and v'
themselves. One rule is added: a positive v' never takes code 0. Zero would make the next step
divide by eps alone, where the true quotient is of the order of 1.

A block of 256 elements in which any m' or v' is not finite (its gradients hold NaN or Inf) is left
as it was, parameters and moments both, and is counted in ``skipped_blocks``.
"""

from __future__ import annotations

import warnings
from collections import defaultdict
from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import Tensor

from nf4.optim import state as states
from nf4.optim.group import check_group, check_params, groups_from_checkpoint
from nf4.optim.launch import Launch, capturing, local_tensor
from nf4.optim.pager import Pager, memory_of


class AdamW(torch.optim.Optimizer):
    """AdamW whose moments take 8 or 32 bits, with bitsandbytes' arguments and checkpoints.

    ``optim_bits`` is 8 or 32; with 8, tensors of fewer than ``min_8bit_size`` elements keep 32-bit
    moments. Every argument from ``lr`` to ``min_8bit_size`` but ``amsgrad`` may be set per
    parameter group. ``is_paged`` lets moments lie in pinned host memory when GPU memory is short,
    which is settled at a parameter's first step, by the largest use of memory until then; it has no
    effect on CPU parameters. ``amsgrad`` must be False; of ``args`` (bitsandbytes' namespace)
    ``optim_bits`` and ``min_8bit_size`` are read.

    ``stochastic_rounding`` rounds float16 and bfloat16 parameters up or down at random in
    proportion; the random words depend on ``seed``, the step and the element alone, so replicas
    stay equal. ``capturable`` keeps the step count on the device, for CUDA graphs; take a step
    before the capture, which makes the moments.

    Parameters are float32, float16 or bfloat16 tensors, gradients any of the three. Raises
    ValueError for hyperparameters out of range and TypeError for other parameters.
    """

    _fixed_bits: ClassVar[int | None] = None
    _fixed_paged: ClassVar[bool] = False

    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        amsgrad: bool = False,
        optim_bits: int = 32,
        args: Any = None,
        min_8bit_size: int = 4096,
        is_paged: bool = False,
        *,
        maximize: bool = False,
        capturable: bool = False,
        stochastic_rounding: bool = False,
        seed: int = 0,
        percentile_clipping: int = 100,
        block_wise: bool = True,
    ) -> None:
        if amsgrad:
            raise ValueError(f"{self._name}: amsgrad must be False, got {amsgrad}")
        if percentile_clipping != 100:
            raise ValueError(
                f"{self._name}: percentile_clipping must be 100 (off; clip with "
                f"torch.nn.utils.clip_grad_norm_), got {percentile_clipping}"
            )
        if not block_wise:
            raise ValueError(f"{self._name}: block_wise must be True, got {block_wise}")
        if self._fixed_bits is not None:
            if optim_bits not in (32, self._fixed_bits):
                raise ValueError(f"{self._name}: optim_bits is fixed, got {optim_bits}")
            optim_bits = self._fixed_bits
        self.is_paged = is_paged or self._fixed_paged
        self._skipped: dict[torch.device, Tensor] = {}
        self._pagers: dict[torch.device, Pager | None] = {}
        self._unplaced: set[Tensor] = set()
        self._warned_skip = False
        defaults = {
            "lr": lr,
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
            "optim_bits": getattr(args, "optim_bits", optim_bits),
            "min_8bit_size": getattr(args, "min_8bit_size", min_8bit_size),
            "maximize": maximize,
            "capturable": capturable,
            "stochastic_rounding": stochastic_rounding,
            "seed": seed,
        }
        super().__init__(params, defaults)

    @property
    def _name(self) -> str:
        return f"nf4.{type(self).__name__}"

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group; its keys override the constructor's arguments."""
        super().add_param_group(param_group)
        try:
            check_group(self.param_groups[-1], self.is_paged, self._name)
            check_params(self.param_groups[-1], self._name)
        except (TypeError, ValueError):
            self.param_groups.pop()
            raise

    @property
    def skipped_blocks(self) -> int:
        """Blocks of 256 elements left as they were so far, for NaN or Inf. Waits for the device."""
        return sum(int(count) for count in self._skipped.values())

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Update every parameter that has a gradient; one launch per group.

        Returns the closure's value. Raises RuntimeError for a sparse gradient.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        if capturing():
            self._check_capture()
        self._place_states()
        launches: list[Launch] = []
        first_word = 0
        for group in self.param_groups:
            by_step: dict[tuple[torch.device, int], Launch] = {}
            fresh_steps: dict[torch.device, Tensor] = {}
            for p in group["params"]:
                offset, first_word = first_word, first_word + -(-p.numel() // 4) * 4
                if p.grad is None:
                    continue
                if p.grad.is_sparse:
                    raise RuntimeError(f"{self._name}.step: gradients must be dense, got sparse")
                state = self._state_of(p, group, fresh_steps)
                step = state["step"]
                key = (p.device, id(step) if isinstance(step, Tensor) else step)
                if key not in by_step:
                    by_step[key] = Launch(p.device, step)
                by_step[key].add(p, state, offset, self._is_paged(p))
            idle = self._idle_counters(group)
            for (device, counter), launch in by_step.items():
                if device not in self._skipped:
                    self._skipped[device] = torch.zeros(1, dtype=torch.int64, device=device)
                launch.prepare(group, self._skipped[device], own_step=counter in idle)
                launches.append(launch)
        for launch in launches:
            launch.call()
        for device, pager in self._pagers.items():
            if pager is not None:
                pager.run([launch for launch in launches if launch.device == device])
        for launch in launches:
            launch.finish()
        self._warn_of_skipped(("cpu",))
        return loss

    def _idle_counters(self, group: dict[str, Any]) -> set[int]:
        """The counters on the device of parameters that this step leaves out."""
        if not group["capturable"]:
            return set()
        idle = (self.state[p] for p in group["params"] if p.grad is None and p in self.state)
        return {id(state["step"]) for state in idle if state}

    def _check_capture(self) -> None:
        """Refuse what a CUDA graph would do again at every replay: begin, or stop counting."""
        for group in self.param_groups:
            counters = set()
            for p in group["params"]:
                if p.grad is not None:
                    step = self.state[p].get("step")
                    if not isinstance(step, Tensor):
                        raise RuntimeError(
                            f"{self._name}.step: a CUDA graph needs capturable=True and a step "
                            f"before its capture, got a step count of {step}"
                        )
                    counters.add(id(step))
            if counters & self._idle_counters(group):
                raise RuntimeError(
                    f"{self._name}.step: the parameters captured must be those of the step before, "
                    "got some without a gradient"
                )

    def _bits(self, p: Tensor, group: dict[str, Any]) -> int:
        return group["optim_bits"] if p.numel() >= group["min_8bit_size"] else 32

    def _state_of(
        self, p: Tensor, group: dict[str, Any], fresh_steps: dict[torch.device, Tensor]
    ) -> dict[str, Any]:
        state = self.state[p]
        if not state:
            step: int | Tensor = 0
            if group["capturable"]:
                # Parameters that start together share a counter, and so stay in one launch.
                zero = torch.zeros((), dtype=torch.int64, device=p.device)
                step = fresh_steps.setdefault(p.device, zero)
            state.update(step=step, **states.new_state(local_tensor(p), self._bits(p, group)))
        return state

    def _place_states(self) -> None:
        """Give states that begin now, or were loaded, their place: on the device, or in pages.

        Only now: the largest use of memory so far, which decides, holds a backward pass.
        """
        if not self.is_paged:
            return  # spares the walk
        new: dict[torch.device, list[tuple[Tensor, int]]] = {}
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is None:
                    continue
                state = self.state[p]
                if not state:
                    new.setdefault(p.device, []).append((p, self._bits(p, group)))
                elif p in self._unplaced:
                    new.setdefault(p.device, []).append((p, states.bits_of(state)))
        for device, params in new.items():
            pager = self._pager(device)
            placed = {} if pager is None else pager.place(params)
            for p, _ in params:
                state = self.state[p]
                for name in states.tensor_names(state):
                    if p in placed:
                        placed[p][name].copy_(state[name])
                    else:
                        state[name] = state[name].to(device)
                if p in placed:
                    state.update({"step": 0, **state, **placed[p]})
                self._unplaced.discard(p)

    def _pager(self, device: torch.device) -> Pager | None:
        if not self.is_paged:
            return None
        if device not in self._pagers:
            memory = memory_of(device)
            self._pagers[device] = None if memory is None else Pager(memory)
        return self._pagers[device]

    def _is_paged(self, p: Tensor) -> bool:
        pager = self._pagers.get(p.device)
        return pager is not None and p in pager

    def _flush(self) -> None:
        for pager in self._pagers.values():
            if pager is not None:
                pager.flush()

    def _warn_of_skipped(self, device_types: tuple[str, ...]) -> None:
        if self._warned_skip:
            return
        for device, count in self._skipped.items():
            if device.type in device_types and int(count) > 0:
                warnings.warn(
                    f"{self._name}: NaN or Inf gradients; {int(count)} blocks of 256 elements were "
                    "left as they were (see skipped_blocks; said once)",
                    stacklevel=3,
                )
                self._warned_skip = True

    def state_dict(self) -> dict[str, Any]:
        """The state as bitsandbytes' AdamW8bit writes it; see ``nf4.optim.state``."""
        self._warn_of_skipped(("cpu", "cuda"))
        self._flush()
        packed = super().state_dict()
        tables: dict[torch.device, dict[str, Tensor]] = {}
        packed["state"] = {
            key: states.to_checkpoint(s, tables) for key, s in packed["state"].items()
        }
        return packed

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load what ``state_dict`` of this class or of bitsandbytes' AdamW gave.

        Each parameter keeps the precision that its state was saved in. Raises ValueError, with
        nothing changed, where groups, shapes, dtypes or values do not fit.
        """
        state_dict = dict(state_dict)
        for pre_hook in self._optimizer_load_state_dict_pre_hooks.values():
            state_dict = pre_hook(self, state_dict) or state_dict
        where = f"{self._name}.load_state_dict"
        saved_groups = groups_from_checkpoint(
            state_dict, self.param_groups, ("param_names", *self.defaults), self.is_paged, where
        )
        loaded: dict[Any, dict[str, Any]] = {}
        for group, saved in zip(self.param_groups, saved_groups, strict=True):
            shared_steps: dict[tuple[torch.device, int], Tensor] = {}
            for key, p in zip(saved["params"], group["params"], strict=True):
                if key not in state_dict["state"]:
                    continue
                # Through host memory where not all may fit the device.
                device = torch.device("cpu") if self._pager(p.device) else p.device
                entry = state_dict["state"][key]
                state = states.from_checkpoint(
                    entry, local_tensor(p), device, f"{where}: state {key}"
                )
                if saved["capturable"]:
                    step = torch.tensor(state["step"], device=p.device)
                    state["step"] = shared_steps.setdefault((p.device, state["step"]), step)
                loaded[p] = state
            saved["params"] = group["params"]
        self._pagers.clear()
        self._unplaced = set(loaded)
        self.__setstate__({"state": defaultdict(dict, loaded), "param_groups": saved_groups})
        for post_hook in self._optimizer_load_state_dict_post_hooks.values():
            post_hook(self)

    def __getstate__(self) -> dict[str, Any]:
        self._flush()
        return {**super().__getstate__(), "is_paged": self.is_paged}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        if "_pagers" not in self.__dict__:  # a copy, or from a pickle
            self._skipped, self._pagers, self._warned_skip = {}, {}, False
            self._unplaced = {p for p, s in self.state.items() if isinstance(p, Tensor) and s}


class AdamW8bit(AdamW):
    """AdamW with 8-bit moments: 2.03 bytes of state per parameter instead of 8."""

    _fixed_bits = 8


class AdamW32bit(AdamW):
    """AdamW with 32-bit moments."""

    _fixed_bits = 32


class PagedAdamW(AdamW):
    """AdamW whose moments move to host memory when GPU memory is short."""

    _fixed_paged = True


class PagedAdamW8bit(AdamW8bit):
    """AdamW8bit whose moments move to host memory when GPU memory is short."""

    _fixed_paged = True


class PagedAdamW32bit(AdamW32bit):
    """AdamW32bit whose moments move to host memory when GPU memory is short."""

    _fixed_paged = True
