"""``OverNF4``: how PEFT's layers over an ``NF4Linear`` merge, and get their base layer back."""

from __future__ import annotations

import warnings
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
from peft.tuners.tuners_utils import check_adapters_to_merge
from torch import Tensor, nn

from nf4 import functional
from nf4.nn.linear import NF4Linear
from nf4.tensor import QuantizedTensor


@dataclass(frozen=True)
class MergeSettings:
    """What ``OverNF4.merge`` makes: "16bit" or "nf4", from which base, in which dtype."""

    into: str = "16bit"
    base: Any = None
    dtype: torch.dtype | None = None


class OverNF4:
    """What one of PEFT's layer classes for ``nn.Linear`` needs to stand over an ``NF4Linear``.

    ``merge`` puts a 16-bit ``nn.Linear``, merged in float32 and rounded once, in the place of the
    base layer (``merge_settings`` choose otherwise); ``unmerge`` puts the ``NF4Linear`` back, whose
    bytes never changed.
    """

    merge_settings = MergeSettings()
    base_layer: Any
    merged_adapters: list[str]
    adapter_layer_names: tuple[str, ...]
    _target_name: str = ""  # of the layer in the base model, where it is known

    @property
    def _unmerged(self) -> NF4Linear | None:
        """The base layer from before ``merge``. Kept out of the module tree: its bytes are no part
        of a state dict or of a parameter count."""
        return self.__dict__.get("_unmerged_layer")

    @torch.no_grad()
    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Merge adapters (None: the active ones) into the layer, as the class says."""
        if self.__dict__.get("_dense", False):  # PEFT's own steps over the float32 layer
            return super().merge(  # type: ignore[misc]
                safe_merge=safe_merge, adapter_names=adapter_names
            )
        kinds = [getattr(self, kind, ()) for kind in self.adapter_layer_names]
        names = [
            name
            for name in check_adapters_to_merge(self, adapter_names)  # type: ignore[arg-type]
            if any(name in kind for kind in kinds)
        ]
        if not names:
            return None
        names = [*self.merged_adapters, *names]
        base = self._unmerged or self.base_layer
        if not isinstance(base, NF4Linear):
            raise TypeError(
                f"nf4.merge: the base layer of {self._target_name or 'a layer'} must be an "
                f"NF4Linear, got {type(base).__name__}"
            )
        dense = self._dense_layer(base)
        self.base_layer, self.merged_adapters = dense, []
        self.__dict__["_dense"] = True
        try:
            super().merge(safe_merge=safe_merge, adapter_names=names)  # type: ignore[misc]
            merged = self._from_dense(dense, base)
        except BaseException:
            self._restore(base)
            raise
        finally:
            self.__dict__["_dense"] = False
        self.base_layer, self.__dict__["_unmerged_layer"] = merged, base
        return None

    def unmerge(self) -> None:
        """Put back the base layer from before ``merge``: every byte as it was."""
        if self.__dict__.get("_dense", False):
            return super().unmerge()  # type: ignore[misc]
        if self._unmerged is None:
            warnings.warn("Already unmerged. Nothing to do.", stacklevel=2)
            return None
        self._restore(self._unmerged)
        return None

    def _restore(self, base: NF4Linear) -> None:
        device = cast(Tensor, self.base_layer.weight).device
        if device != base.weight.device:
            base.to(device)
        self.base_layer, self.merged_adapters = base, []
        self.__dict__.pop("_unmerged_layer", None)

    def _dense_layer(self, base: NF4Linear) -> nn.Linear:
        """A float32 ``nn.Linear`` of the weight that the adapters are added to."""
        settings = self.merge_settings
        weight = None if settings.base is None else settings.base(self._target_name)
        if weight is None:
            weight = base.dequantize(torch.float32)
        else:
            weight = weight.to(base.weight.device, torch.float32, copy=True)
            weight = weight.T.contiguous() if base.fan_in_fan_out else weight
        dense = nn.Linear(base.in_features, base.out_features, bias=False, device="meta")
        dense.weight = nn.Parameter(weight, requires_grad=False)
        if base.bias is not None:
            bias = base.bias.detach().to(torch.float32, copy=True)
            dense.bias = nn.Parameter(bias, requires_grad=False)
        return dense

    def _from_dense(self, dense: nn.Linear, base: NF4Linear) -> nn.Module:
        """What the merged layer becomes, by ``merge_settings``."""
        settings = self.merge_settings
        dtype = settings.dtype or base.weight_dtype
        bias = None if dense.bias is None else dense.bias.detach()
        if settings.into == "nf4":
            q = requantize(dense.weight, base.q)
            if bias is not None and base.bias is not None:
                bias = bias.to(base.bias.dtype)
            return NF4Linear.from_quantized(
                q, bias, compute_dtype=base.compute_dtype, fan_in_fan_out=base.fan_in_fan_out
            ).train(base.training)
        layer = base.with_weight(dense.weight.detach().to(dtype))
        if bias is not None:
            layer.bias = nn.Parameter(bias.to(dtype))
        return layer.requires_grad_(False)


def requantize(weight: Tensor, like: QuantizedTensor) -> QuantizedTensor:
    """``weight`` quantized in the layout of ``like``."""
    q = functional.quantize(
        weight, block_size=like.block_size, double_quant=like.nested, format=like.format
    )
    return replace(q, dtype=like.dtype)
