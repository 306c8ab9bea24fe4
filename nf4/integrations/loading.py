"""The steps of transformers' weight loader that quantize a weight or read a quantized one."""

from __future__ import annotations

import copy
from collections import defaultdict
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from transformers.core_model_loading import ConversionOps, WeightConverter

from nf4 import functional
from nf4.nn import NF4Experts
from nf4.nn.linear import NF4Linear
from nf4.nn.weight import QuantizedWeight
from nf4.tensor import QuantizedTensor


class _Operation(ConversionOps):
    """A step that belongs to a quantizer; ``dtype`` is what unquantized weights are cast to."""

    def __init__(self, hf_quantizer: Any) -> None:
        self.hf_quantizer = hf_quantizer
        self.dtype: torch.dtype | None = None

    def __deepcopy__(self, memo: dict[int, Any]) -> _Operation:
        # The loader copies its steps for each weight; all of them report to one quantizer.
        return type(self)(self.hf_quantizer)


class Reader(WeightConverter):
    """A loading step over quantized weights.

    The loader deep-copies a step for every tensor of a checkpoint, where only what is collected for
    one weight has to be its own: 9 us in place of 79 with the patterns.
    """

    def __deepcopy__(self, memo: dict[int, Any]) -> Reader:
        copied = copy.copy(self)
        copied.collected_tensors = defaultdict(list)
        copied.layer_targets = defaultdict(set)
        copied.operations = [copy.deepcopy(operation, memo) for operation in self.operations]
        return copied


class Quantize(_Operation):
    """Quantize a weight that has just been read, on the device that it is for."""

    @torch.no_grad()
    def convert(
        self,
        input_dict: dict[str, Any],
        source_patterns: list[str],
        target_patterns: list[str],
        **kwargs: Any,
    ) -> dict[str, Any]:
        model, missing_keys = kwargs["model"], kwargs.get("missing_keys")
        ((name, value),) = input_dict.items()
        weight = value[0] if isinstance(value, list) else value
        path, _, leaf = name.rpartition(".")
        module = model.get_submodule(path)
        try:
            if isinstance(module, NF4Experts):
                tensors = module.quantize(leaf, weight)
            else:
                assert isinstance(module, QuantizedWeight)
                tensors = weight_tensors(module, quantize_for(module, weight))
        except (TypeError, ValueError) as error:
            return self.hf_quantizer.postpone(name, error, missing_keys)
        return _named(path, module, tensors, model, missing_keys)


def quantize_for(module: QuantizedWeight, weight: Tensor) -> QuantizedTensor:
    """``weight``, as a 16-bit checkpoint has it, quantized as ``module`` stores it.

    Raises ValueError for a shape that does not fit and for NaN or infinite elements.
    """
    if isinstance(module, NF4Linear) and module.fan_in_fan_out:
        weight = weight.T
    if weight.shape != module.weight_shape:
        raise ValueError(
            f"nf4: weight must have shape {list(module.weight_shape)}, got {list(weight.shape)}"
        )
    return functional.quantize(
        weight,
        block_size=module.block_size,
        double_quant=module.weight_nested_absmax is not None,
        format=module.format,
    )


class Deserialize(_Operation):
    """Read one quantized weight from its parts; other weights pass, in the model's dtype."""

    def convert(
        self,
        input_dict: dict[str, Any],
        source_patterns: list[str],
        target_patterns: list[str],
        **kwargs: Any,
    ) -> dict[str, Any]:
        name, model = kwargs["full_layer_name"], kwargs["model"]
        missing_keys = kwargs.get("missing_keys")
        parts = {k: v[0] if isinstance(v, list) else v for k, v in input_dict.items()}
        path = name.rpartition(".")[0]
        module = model.get_submodule(path)
        if not isinstance(module, QuantizedWeight):
            ((key, weight),) = parts.items()
            cast = self.dtype is not None and weight.is_floating_point()
            return {key: weight.to(self.dtype) if cast else weight}
        try:
            q = QuantizedTensor.from_state_dict(parts, "weight")
        except (KeyError, ValueError) as error:
            return self.hf_quantizer.postpone(name, error, missing_keys)
        return _named(path, module, weight_tensors(module, q), model, missing_keys)


class DeserializeExperts(_Operation):
    """Stack the quantized matrices of all experts, which the checkpoint stores one by one."""

    def convert(
        self,
        input_dict: dict[str, Any],
        source_patterns: list[str],
        target_patterns: list[str],
        **kwargs: Any,
    ) -> dict[str, Any]:
        name, model = kwargs["full_layer_name"], kwargs["model"]
        missing_keys = kwargs.get("missing_keys")
        path, _, leaf = name.rpartition(".")
        module = model.get_submodule(path)
        assert isinstance(module, NF4Experts)
        # Per matrix kind (gate, up), per part, the tensors of all experts in order.
        kinds: dict[str, dict[str, list[Tensor]]] = {}
        for pattern in source_patterns:
            if pattern in input_dict:
                kind, _, part = pattern.partition(".weight")
                kinds.setdefault(kind, {})["weight" + part] = input_dict[pattern]
        try:
            matrices = [
                QuantizedTensor.from_state_dict({k: v[e] for k, v in parts.items()}, "weight")
                for e in range(module.num_experts)
                for parts in kinds.values()
            ]
            tensors = module.stack(leaf, matrices)
        except (KeyError, ValueError, IndexError) as error:
            return self.hf_quantizer.postpone(name, error, missing_keys)
        return _named(path, module, tensors, model, missing_keys)


def is_ours(conversion: Any) -> bool:
    """Whether a loading step of transformers ends in one of the operations above."""
    return any(isinstance(op, _Operation) for op in getattr(conversion, "operations", ()))


def weight_tensors(module: QuantizedWeight, q: QuantizedTensor) -> dict[str, Tensor]:
    """The tensors that ``module`` stores for ``q``, by attribute name."""
    module.weight_dtype = q.dtype
    names = ("weight", "weight_absmax", "weight_nested_absmax", "weight_offset")
    return {k: v for k, v in zip(names, q.tensors, strict=True) if v is not None}


def _named(
    path: str,
    module: nn.Module,
    tensors: dict[str, Tensor],
    model: nn.Module,
    missing_keys: set[str] | None,
) -> dict[str, Tensor]:
    """``tensors`` under their full names, also for a head that shares them."""
    module._is_hf_initialized = True  # type: ignore[assignment]
    named = {f"{path}.{name}": tensor for name, tensor in tensors.items()}
    for head in _heads_on(path, model):
        # The packed weight itself is tied by the loader.
        scales = {f"{head}.{k}": v for k, v in tensors.items() if k != "weight"}
        model.get_submodule(head)._is_hf_initialized = True  # type: ignore[assignment]
        named.update(scales)
    if missing_keys is not None:
        missing_keys.difference_update(named)
    return named


def _heads_on(path: str, model: nn.Module) -> Iterable[str]:
    """Names of the quantized modules whose weight is tied to that of ``path``."""
    tied: dict[str, str] = getattr(model, "all_tied_weights_keys", {})
    for target, source in tied.items():
        head = target.rpartition(".")[0]
        if source == f"{path}.weight" and isinstance(model.get_submodule(head), QuantizedWeight):
            yield head
