"""PEFT's LoRA on the weights of quantized experts (``LoraConfig(target_parameters=[...])``)."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import peft.tuners.lora.layer as peft_layer
import torch
from peft.tuners.tuners_utils import check_adapters_to_merge
from torch import Tensor, nn

from nf4.integrations.peft_layer import LoraNF4
from nf4.nn.experts import ExpertsAdapter, NF4Experts


class ParamWrapper(peft_layer.ParamWrapper):
    """PEFT's wrapper of one parameter of an experts module, over ``NF4Experts``.

    PEFT adds the product of the adapter to the whole weight; there is none here, so each expert's
    matmul takes its own slice of lora_A and lora_B, fused. The tensors and files are PEFT's, so
    that adapters go to and from 16-bit models. PEFT looks for the class by this name.
    """

    def get_param(self) -> Tensor:
        """Shape, dtype and device of the weight before it was quantized, without its memory."""
        experts = self._experts
        packed = getattr(experts, self.parameter_name)
        rows, columns = experts.matrix_shape(self.parameter_name)
        blank = torch.zeros((), dtype=experts.weight_dtype, device=packed.device)
        return blank.expand(experts.num_experts, packed.shape[1] * rows, columns)

    @property
    def _experts(self) -> NF4Experts:
        experts = self.get_base_layer()
        assert isinstance(experts, NF4Experts)
        return experts

    def _factors(self, name: str) -> ExpertsAdapter:
        """An adapter as ``(A [E, r, columns], B [E, rows, r], scaling)``."""
        count = self.num_experts
        first: Any = self.lora_A[name].weight
        second: Any = self.lora_B[name].weight
        a = first.reshape(count, -1, first.shape[-1])
        b = second.reshape(second.shape[0], -1, count).permute(2, 0, 1)
        if not getattr(self, "_did_swap_in_out_features", False):
            # PEFT before 0.19 takes the rows of a weight for its inputs: x goes through lora_B.
            a, b = b.transpose(1, 2), a.transpose(1, 2)
        return a.contiguous(), b.contiguous(), self.scaling[name]

    @contextmanager
    def _activate_lora(self, active_adapters: list[str]) -> Iterator[None]:
        adapters = [self._factors(name) for name in active_adapters if name in self.lora_A]
        with self._experts.adapted(self.parameter_name, adapters):
            yield

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Refuses: a merged layer must be able to give its bytes back."""
        raise ValueError(
            "nf4: adapters of experts cannot be merged in place, the experts stay in 4 bits; "
            "merge_and_unload() makes 16-bit ones"
        )

    def unload_and_optionally_merge_module(
        self, merge: bool, safe_merge: bool, adapter_names: list[str] | None
    ) -> nn.Module:
        """The ``NF4Experts``, or 16-bit experts with the adapters of all their wrappers in."""
        experts = self._experts
        if not merge:
            return experts
        dense: Any = experts.to_experts(LoraNF4.merge_settings.dtype)
        wrapper: Any = self
        while isinstance(wrapper, ParamWrapper):  # one for each parameter, nested
            name = wrapper.parameter_name
            weight = experts.dequantize(name, torch.float32)
            for adapter in check_adapters_to_merge(wrapper, adapter_names) or ():
                if adapter in wrapper.lora_A:
                    a, b, scaling = wrapper._factors(adapter)
                    weight.baddbmm_(b.detach().float(), a.detach().float(), alpha=scaling)
            if safe_merge and not weight.isfinite().all():
                raise ValueError(f"NaNs detected in the merged weights of {name}")
            getattr(dense, name).data = weight.to(getattr(dense, name).dtype)
            wrapper = wrapper.base_layer
        return dense


def check_merge(model: nn.Module) -> None:
    """Refuse settings that experts cannot follow, before any other layer is merged."""
    settings = LoraNF4.merge_settings
    if settings.into == "16bit" and settings.base is None:
        return
    if any(isinstance(module, ParamWrapper) for module in model.modules()):
        raise ValueError(
            "nf4: adapters of experts merge into 16 bits over the dequantized weights only: "
            "leave out into and base, save, and quantize the result with nf4 quantize"
        )
