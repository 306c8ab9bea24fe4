"""What one launch of ``adamw_step`` takes: tensor lists, scalars, random seed."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from nf4.backends import namespace
from nf4.optim.paging import Page


class Launch:
    """The arguments of one kernel launch: parameters of one device that took as many steps."""

    def __init__(self, device: torch.device, step: int | Tensor) -> None:
        self.device = device
        self.step = step
        # By parameter whose state is paged: parameter, gradient, first random word.
        self.paged: dict[Tensor, tuple[Tensor, Tensor, int]] = {}
        self._lists = _Lists()
        self._states: list[dict[str, Any]] = []
        self._strided: list[tuple[Tensor, Tensor]] = []
        self._changed: list[Tensor] = []

    def add(self, p: Tensor, state: dict[str, Any], offset: int, paged: bool) -> None:
        """Take the parameter ``p``, which has a gradient; ``offset`` is its first random word."""
        assert p.grad is not None
        target = local_tensor(p)
        dense = target.detach()
        if not dense.is_contiguous():
            dense = dense.contiguous()
            self._strided.append((target, dense))
        grad = local_tensor(p.grad).detach().contiguous()
        if paged:
            self.paged[p] = (dense, grad, offset)
        else:
            self._lists.append(dense, grad, state, offset)
        self._states.append(state)
        self._changed.append(dense)

    def prepare(self, group: dict[str, Any], skipped: Tensor, own_step: bool) -> None:
        """Count the step and compute its scalars.

        ``own_step``: others, which do not step now, share the counter on the device, and keep it.
        """
        if isinstance(self.step, Tensor):
            self.step = self.step + 1 if own_step else self.step.add_(1)
            self._hyper = hyper_on_device(group, self.step)
            seed = (self.step + (group["seed"] << 32)).view(1)
        else:
            self.step += 1
            values = torch.tensor(hyper_values(group, self.step), dtype=torch.float32)
            self._hyper = to_device(values, self.device)
            seed = to_device(torch.tensor([(group["seed"] << 32) + self.step]), self.device)
        self._seed = seed if group["stochastic_rounding"] else None
        self._skipped = skipped

    def call(self) -> None:
        """Step the parameters whose state is on the device."""
        self._call(self._lists)

    def call_page(self, page: Page, buffer: Tensor) -> None:
        """Step what belongs to this launch of a page that lies in ``buffer``."""
        lists = _Lists()
        for index, segment in enumerate(page.segments):
            if segment.key in self.paged:
                dense, grad, offset = self.paged[segment.key]
                part = slice(segment.first, segment.last)
                state = page.views(index, buffer)
                lists.append(
                    dense.view(-1)[part], grad.view(-1)[part], state, offset + segment.first
                )
        self._call(lists)

    def _call(self, lists: _Lists) -> None:
        if not lists.params:
            return
        getattr(torch.ops, namespace()).adamw_step(
            lists.params,
            lists.grads,
            *lists.moments,
            self._hyper,
            self._seed,
            lists.offsets,
            self._skipped,
        )

    def finish(self) -> None:
        """Copy strided parameters back, record the step count and tell autograd of the change."""
        for target, dense in self._strided:
            target.copy_(dense)
        for state in self._states:
            state["step"] = self.step
        # Kernels do not: a graph from before the step would run backward on the new values.
        torch.autograd.graph.increment_version(self._changed)


class _Lists:
    """The tensor lists of the op."""

    def __init__(self) -> None:
        self.params: list[Tensor] = []
        self.grads: list[Tensor] = []
        # state1, state2, absmax1, absmax2
        self.moments: tuple[list[Tensor], ...] = ([], [], [], [])
        self.offsets: list[int] = []
        self._no_scales: Tensor | None = None

    def append(self, p: Tensor, grad: Tensor, state: dict[str, Any], offset: int) -> None:
        self.params.append(p)
        self.grads.append(grad)
        self.moments[0].append(state["state1"])
        self.moments[1].append(state["state2"])
        if self._no_scales is None:
            self._no_scales = p.new_empty(0, dtype=torch.float32)
        self.moments[2].append(state.get("absmax1", self._no_scales))
        self.moments[3].append(state.get("absmax2", self._no_scales))
        self.offsets.append(offset)


def capturing() -> bool:
    """Whether what is queued now goes into a CUDA graph."""
    return torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()


def local_tensor(t: Tensor) -> Tensor:
    """This rank's part of a DTensor; any other tensor itself."""
    # By type first: a failing hasattr on a tensor costs a microsecond, in every step.
    if type(t) in (Tensor, torch.nn.Parameter) or not hasattr(t, "to_local"):
        return t
    return t.to_local()


def hyper_values(group: dict[str, Any], step: int) -> list[float]:
    """The scalars of the ``step``-th update, in the order that ``nf4.optim.adamw`` lists."""
    beta1, beta2 = group["betas"]
    lr = float(group["lr"])
    gain1 = 1.0 - beta1
    return [
        beta1,
        -gain1 if group["maximize"] else gain1,
        beta2,
        1.0 - beta2,
        1.0 / math.sqrt(1.0 - beta2**step),
        group["eps"],
        1.0 - lr * group["weight_decay"],
        lr / (1.0 - beta1**step),
    ]


def hyper_on_device(group: dict[str, Any], step: Tensor) -> Tensor:
    """``hyper_values`` for a step count and learning rate that stay on the device."""
    beta1, beta2 = group["betas"]
    t = step.double()
    lr = group["lr"]
    # One on another device is read now, as a number is.
    here = isinstance(lr, Tensor) and lr.device == t.device
    lr = lr.double().view(()) if here else torch.full_like(t, float(lr))
    values = [torch.full_like(t, value) for value in hyper_values({**group, "lr": 0.0}, 1)]
    values[4] = (1.0 - torch.pow(beta2, t)).rsqrt()
    values[6] = 1.0 - lr * group["weight_decay"]
    values[7] = lr / (1.0 - torch.pow(beta1, t))
    return torch.stack(values).float()


def to_device(t: Tensor, device: torch.device) -> Tensor:
    """A small host tensor on ``device``."""
    if device.type == "cpu":
        return t
    # From pinned memory the copy is queued without waiting for the device.
    return t.pin_memory().to(device, non_blocking=True)
