"""``LoraNF4``: PEFT's LoRA layer over an ``NF4Linear``, with nf4's fused forward."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple, cast

import torch
from peft.tuners.lora.layer import Linear as PeftLinear
from torch import Tensor, nn

from nf4 import functional
from nf4.integrations.peft_merging import OverNF4, requantize
from nf4.lora.merge import base_reader
from nf4.nn.linear import NF4Linear

# Variants that read the base weight, if at all, through dequantize_module_weight. The others
# write to it as a float tensor (KaSA), or make adapters of its dtype.
_VARIANTS = {
    (),
    ("use_dora",),
    ("alora_invocation_tokens",),
    ("arrow_config",),
    ("mica",),
}


class _Fused(NamedTuple):
    """The arguments of one fused call."""

    base: NF4Linear
    lora_a: Tensor
    lora_b: Tensor
    scaling: float
    dropout_p: float


class LoraNF4(OverNF4, PeftLinear):
    """PEFT's ``lora.Linear`` whose base layer is an ``NF4Linear``.

    With one active plain LoRA adapter the forward is one fused ``nf4.linear_lora`` call, dropout
    included; ``unfused_reason()`` and the repr say when and why it is PEFT's own forward over the
    fused base layer instead. The weights start as float32 whatever the base's dtype.

    Initialisations that take from the base
    weight (PiSSA, OLoRA, CorDA, orthogonal, LoRA-GA) see it dequantized, and what they leave of it
    is quantized again.
    """

    def __init__(self, base_layer: nn.Module, adapter_name: str, **kwargs: Any) -> None:
        self._target_name: str = kwargs.get("target_name") or ""
        with warnings.catch_warnings():
            # PEFT warns about any class that it does not know, and then takes our sizes.
            warnings.filterwarnings("ignore", message="Unsupported layer type")
            super().__init__(base_layer, adapter_name, **kwargs)

    @property
    def fan_in_fan_out(self) -> bool:
        """False: an ``NF4Linear`` is ``[out, in]`` also where the layer was a ``Conv1D``."""
        return False

    @fan_in_fan_out.setter
    def fan_in_fan_out(self, value: bool) -> None:
        pass

    @property
    def lora_variants(self) -> dict[tuple[str, ...], Any]:
        return {k: v for k, v in super().lora_variants.items() if k in _VARIANTS}

    @property
    def _quantized(self) -> NF4Linear:
        """The base layer of a layer that is not merged."""
        return cast(NF4Linear, self.get_base_layer())

    def _pair(self, name: str) -> tuple[Tensor, Tensor]:
        """``(A [r, in], B [out, r])`` of an adapter."""
        a, b = cast(nn.Linear, self.lora_A[name]), cast(nn.Linear, self.lora_B[name])
        return a.weight, b.weight

    # forward

    def unfused_reason(self) -> str | None:
        """Why a forward now does not take the fused path; None when it does."""
        found = self._fused()
        return found if isinstance(found, str) else None

    def _fused(self) -> _Fused | str:
        """What one fused call takes, or why there is none. Asked in every forward, so everything
        is looked up once, and past nn.Module's slow attributes."""
        if self.disable_adapters:
            return "adapters are disabled"
        if self.merged:
            return "merged"
        modules: dict[str, Any] = self._modules
        downs, ups = modules["lora_A"]._modules, modules["lora_B"]._modules
        names = [name for name in self.active_adapters if name in downs]
        if len(names) != 1:
            return "not exactly one active adapter"
        name = names[0]
        if name in self.lora_variant:
            return type(self.lora_variant[name]).__name__
        if self.lora_bias.get(name, False):
            return "lora_bias"
        down, up = downs[name], ups[name]
        if not (_is_plain(down) and _is_plain(up)):
            return "lora_A or lora_B is wrapped or hooked"
        base = modules["base_layer"]
        if not isinstance(base, NF4Linear) or _has_hooks(base):
            return "the base layer is wrapped or hooked"
        dropout = modules["lora_dropout"]._modules[name]
        if type(dropout) not in (nn.Dropout, nn.Identity):
            return "a dropout that is not nn.Dropout"
        a, b = down.weight, up.weight
        if a.dtype is not b.dtype:
            return "lora_A and lora_B differ in dtype"
        p = dropout.p if dropout.training and type(dropout) is nn.Dropout else 0.0
        return _Fused(base, a, b, self.scaling[name], p)

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if args or any(value is not None for value in kwargs.values()):
            return super().forward(x, *args, **kwargs)
        fused = self._fused()
        if isinstance(fused, str):
            return super().forward(x)
        base = fused.base
        compute_dtype = base.compute_dtype or x.dtype
        y = functional.linear_lora(
            x if x.dtype is compute_dtype else x.to(compute_dtype),
            base.q,
            fused.lora_a,
            fused.lora_b,
            fused.scaling,
            base.bias,
            fused.dropout_p,
        )
        return y if x.dtype is compute_dtype else y.to(x.dtype)

    def extra_repr(self) -> str:
        reason = self.unfused_reason()
        return "fused" if reason is None else f"not fused: {reason}"

    def get_delta_weight(self, adapter: str) -> Tensor:
        """``scaling * B A`` ``[out, in]`` in float32, whatever the adapter's dtype."""
        a, b = self._pair(adapter)
        return self.scaling[adapter] * (b.float() @ a.float())

    # initialisation from the base weight

    @contextmanager
    def _dequantized_base(self) -> Iterator[None]:
        """Give the base layer a float32 weight inside, and quantize what has become of it."""
        base = self._quantized
        q = base.q
        before = functional.dequantize(q, torch.float32)
        base.weight = nn.Parameter(before.clone(), requires_grad=False)
        try:
            yield
            after = base.weight.detach()
        finally:
            base.set_quantized(q)
        if not torch.equal(after, before):
            base.set_quantized(requantize(after, q))

    def pissa_init(self, *args: Any) -> None:
        with self._dequantized_base():
            super().pissa_init(*args)

    def olora_init(self, *args: Any) -> None:
        with self._dequantized_base():
            super().olora_init(*args)

    def corda_init(self, *args: Any) -> None:
        with self._dequantized_base():
            super().corda_init(*args)

    def orthogonal_init(self, *args: Any) -> None:
        with self._dequantized_base():
            super().orthogonal_init(*args)

    def mica_init(self, *args: Any) -> None:
        with self._dequantized_base():
            super().mica_init(*args)

    def lora_ga_init(self, *args: Any) -> None:
        with self._dequantized_base():
            super().lora_ga_init(*args)

    def loftq_init(self, adapter_name: str, config: Any = None) -> None:
        """LoftQ from the 16-bit weights in the local folder that the model was loaded from.

        Raises ValueError where there is none, and names ``nf4.integrations.peft.init_loftq``.
        """
        folder = getattr(config, "base_model_name_or_path", None)
        hint = "; call nf4.integrations.peft.init_loftq(model, base) after get_peft_model instead"
        if not folder or not self._target_name:
            raise ValueError(f"nf4.loftq_init: the 16-bit weights must be known{hint}")
        try:
            read = base_reader(folder, [self._target_name])
        except (OSError, KeyError) as error:
            raise ValueError(
                f"nf4.loftq_init: {folder} must hold the 16-bit weight of {self._target_name} "
                f"({error}){hint}"
            ) from error
        assert read is not None
        iterations = (config.loftq_config or {}).get("loftq_iter", 1)
        self.init_loftq(adapter_name, read(self._target_name), iterations)

    @torch.no_grad()
    def init_loftq(self, adapter_name: str, weight: Tensor, iterations: int = 1) -> None:
        """LoftQ (arXiv:2310.08659, algorithm 1) from the 16-bit ``weight`` of this layer.

        Alternates ``Q = quantize(W - scaling B A)`` and ``scaling B A = SVD_r(W - dequantize(Q))``.
        """
        base = self._quantized
        weight = weight.to(base.weight.device, torch.float32)
        weight = weight.T if base.fan_in_fan_out else weight
        if weight.shape != base.weight_shape:
            raise ValueError(
                f"nf4.init_loftq: the weight of {self._target_name or 'this layer'} must have "
                f"shape {list(base.weight_shape)}, got {list(weight.shape)}"
            )
        lora_a, lora_b = self._pair(adapter_name)
        rank, scaling = self.r[adapter_name], self.scaling[adapter_name]
        q, low_rank = base.q, torch.zeros_like(weight)
        for _ in range(iterations):
            q = requantize(weight - low_rank, base.q)
            u, s, v = torch.linalg.svd(
                weight - functional.dequantize(q, torch.float32), full_matrices=False
            )
            root = (s[:rank] / scaling).sqrt()
            b, a = u[:, :rank] * root, root[:, None] * v[:rank]
            low_rank = scaling * (b @ a)
        base.set_quantized(q)
        # On the meta device the values come from a file later.
        if not lora_a.is_meta:
            lora_a.data, lora_b.data = a.to(lora_a), b.to(lora_b)


def _has_hooks(module: nn.Module) -> bool:
    """Whether calling ``module`` does more than its class's forward (offloading, FSDP)."""
    return bool(module._forward_hooks or module._forward_pre_hooks or "forward" in vars(module))


def _is_plain(module: nn.Module) -> bool:
    return type(module) is nn.Linear and not _has_hooks(module)
