"""Puts quantized modules into a model that has no weights yet."""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key
from transformers.quantizers.base import HfQuantizer

from nf4.config import NF4Config
from nf4.integrations.checkpoint import Checkpoint, StoredWeight
from nf4.nn import NF4Embedding, NF4Experts, NF4Linear
from nf4.nn.experts import MATRICES, is_fused_experts, unsupported_experts
from nf4.nn.linear import is_conv1d
from nf4.nn.weight import QuantizedWeight

# How an expert's matrices are called in a checkpoint where transformers does not say.
_EXPERT_KEY = re.compile(r"(?P<experts>.*\bexperts)\.\d+\.(?P<matrix>gate|up|down)_proj\.weight")


def to_model_names(model: Any) -> Callable[[str], str]:
    """The name of the model's own parameter that the loader will put a checkpoint's key into."""
    conversions = get_model_conversion_mapping(model)
    renamings = [c for c in conversions if isinstance(c, WeightRenaming)]
    converters = [c for c in conversions if isinstance(c, WeightConverter)]
    own = model.state_dict()

    def rename(key: str) -> str:
        name, _ = rename_source_key(key, renamings, converters, model.base_model_prefix, own)
        expert = _EXPERT_KEY.fullmatch(name)
        if name not in own and expert is not None:
            fused = "down_proj" if expert["matrix"] == "down" else "gate_up_proj"
            return f"{expert['experts']}.{fused}"
        return name

    return rename


def in_model_names(found: Checkpoint, model: Any) -> Checkpoint:
    """``found`` under the names of the model's own parameters, renamed as the loader will."""
    rename = to_model_names(model)
    weights: dict[str, Tensor] = {}
    quantized: dict[str, list[StoredWeight]] = {}
    for key, tensor in found.weights.items():
        name = rename(key)
        weights[name] = tensor
        if key in found.quantized:
            quantized.setdefault(name, []).extend(found.quantized[key])
    return Checkpoint(weights, quantized)


def place_stored(model: Any, checkpoint: Checkpoint, settings: NF4Config) -> None:
    """Put a quantized module wherever the checkpoint has a quantized weight, of its layout.

    Raises ValueError for a quantized weight that does not fit the module, and for a packed weight
    without its quantization state.
    """
    for name, module in list(model.named_modules()):
        if is_fused_experts(module):
            _place_stored_experts(model, name, module, checkpoint.quantized, settings)
            continue
        stored = checkpoint.quantized.get(f"{name}.weight")
        if stored is None:
            _check_unquantized(f"{name}.weight", module, checkpoint.weights)
            continue
        placed = _empty(name, module, settings, stored[0])
        # As it is in the file: old releases of transformers cast what they read to this dtype.
        shown = torch.empty(stored[0].storage_shape, dtype=stored[0].storage_dtype, device="meta")
        _place(model, name, placed, shown)


def place_new(
    model: Any,
    settings: NF4Config,
    skip: list[str],
    checkpoint: Checkpoint | None,
    *,
    packed: bool = False,
) -> None:
    """Put a quantized module in place of each linear layer, and of what ``settings`` adds.

    Left alone are modules that ``skip`` (transformers' patterns) or ``settings`` keeps, and those
    whose weight is not in the checkpoint: they are initialized, and stay 16-bit. Modules show a
    weight of the original shape until the loader has quantized it, unless it is to be read
    ``packed``. Without a checkpoint the weights are taken to be there.
    """
    weights = None if checkpoint is None else checkpoint.weights
    table = model.get_input_embeddings() if settings.embeddings else None
    placed = 0
    for name, module in list(model.named_modules()):
        if is_skipped(name, skip) or settings.keeps(name):
            continue
        if is_fused_experts(module):
            placed += _place_new_experts(model, name, module, settings, weights, packed)
        elif _is_linear(module) or module is table:
            if weights is None or f"{name}.weight" in weights:
                empty = _empty(name, module, settings, None)
                _place(model, name, empty, empty.weight if packed else module.weight)
                placed += 1
        else:
            continue
    if not placed:
        warnings.warn(
            f"nf4: {type(model).__name__} has no layer to quantize, it stays 16-bit", stacklevel=2
        )


def is_skipped(name: str, patterns: list[str]) -> bool:
    """Whether transformers' rule for modules that stay 16-bit names this one: a pattern matches
    its start up to a dot, as a regular expression too, or is its end.
    """
    return any(re.match(rf"(?:{p})(?=\.|$)", name) or name.endswith(p) for p in patterns)


def allow_embeddings(model: Any, settings: NF4Config, skip: list[str]) -> list[str]:
    """``skip`` without the head and the embeddings, where the settings quantize them.

    Raises ValueError for a tied head that is to be quantized without its table.
    """
    head, table = _name_of(model, "get_output_embeddings"), _name_of(model, "get_input_embeddings")
    tied = f"{head}.weight" in model.all_tied_weights_keys
    if settings.lm_head and tied and not settings.embeddings:
        raise ValueError(
            f"nf4.NF4Config: lm_head needs embeddings=True too where {head} shares the table of "
            f"{table}, as in {type(model).__name__}"
        )
    allowed = {table} if settings.embeddings else set()
    if settings.lm_head:
        allowed.add(head)
    return [name for name in skip if name not in allowed]


def _name_of(model: Any, getter: str) -> str | None:
    found = getattr(model, getter)()
    return next((n for n, m in model.named_modules() if m is found), None)


def _is_linear(module: nn.Module) -> bool:
    # Exactly nn.Linear: a subclass may compute something else.
    return type(module) is nn.Linear or is_conv1d(module)


def _empty(
    name: str, module: nn.Module, settings: NF4Config, stored: StoredWeight | None
) -> QuantizedWeight:
    """The quantized form of a linear layer or an embedding, on "meta"."""
    weight = module.weight
    assert isinstance(weight, Tensor)
    if stored is None:
        layout: dict[str, Any] = settings.layer_kwargs()
    else:
        q = stored.layout
        layout = {
            "block_size": q.block_size,
            "double_quant": q.nested,
            "format": q.format,
            "compute_dtype": settings.compute_dtype,
        }
    common = {**layout, "device": "meta", "dtype": weight.dtype}
    placed: QuantizedWeight
    if _is_linear(module):
        conv = is_conv1d(module)
        rows, columns = weight.shape[::-1] if conv else weight.shape
        bias = module.bias
        placed = NF4Linear(columns, rows, bias=bias is not None, fan_in_fan_out=conv, **common)
        if isinstance(bias, Tensor):
            placed.bias = nn.Parameter(bias.detach(), requires_grad=False)
    elif type(module) is nn.Embedding:
        placed = NF4Embedding(
            module.num_embeddings, module.embedding_dim, module.padding_idx, **common
        )
    else:
        raise ValueError(
            f"nf4: {name} must be a linear layer or an nn.Embedding to be quantized, "
            f"got {type(module).__name__}"
        )
    if stored is not None and stored.layout.shape != placed.weight_shape:
        raise ValueError(
            f"nf4: {name}.weight must have shape {list(placed.weight_shape)}, "
            f"got {list(stored.layout.shape)} in the checkpoint"
        )
    return placed.train(module.training)


def _place(model: Any, name: str, placed: QuantizedWeight, shown: Any) -> None:
    """Put ``placed`` into the model; its weight looks like ``shown`` until it is loaded."""
    placed.weight = nn.Parameter(shown.detach(), requires_grad=False)
    model.set_submodule(name, placed)
    if not isinstance(placed, NF4Embedding):
        return
    for target, source in model.all_tied_weights_keys.items():
        if source == f"{name}.weight":
            head_name = target.rpartition(".")[0]
            head = model.get_submodule(head_name)
            if not _is_linear(head):
                raise ValueError(
                    f"nf4: {head_name} is tied to {name} and must be a linear layer for the "
                    f"table to be quantized, got {type(head).__name__}"
                )
            tied = NF4Linear(
                placed.embedding_dim,
                placed.num_embeddings,
                bias=head.bias is not None,
                block_size=placed.block_size,
                double_quant=placed.weight_nested_absmax is not None,
                format=placed.format,
                compute_dtype=placed.compute_dtype,
                device="meta",
                dtype=placed.weight_dtype,
            )
            tied.weight = placed.weight
            model.set_submodule(head_name, tied)


def _place_stored_experts(
    model: Any,
    name: str,
    module: nn.Module,
    quantized: Mapping[str, list[StoredWeight]],
    settings: NF4Config,
) -> None:
    stored = [s for p in module._parameters for s in quantized.get(f"{name}.{p}", ())]
    if not stored:
        return
    if not hasattr(HfQuantizer, "update_weight_conversions"):
        raise ValueError(
            f"nf4: {name} is quantized in the checkpoint, which this release of transformers "
            "cannot load; transformers 5.9 and newer can"
        )
    q = stored[0].layout
    placed = NF4Experts(
        module,
        block_size=q.block_size,
        double_quant=q.nested,
        format=q.format,
        compute_dtype=settings.compute_dtype,
        device="meta",
    )
    for parameter, matrices in MATRICES.items():
        count, expected = len(quantized.get(f"{name}.{parameter}", ())), len(matrices)
        if count != placed.num_experts * expected:
            raise ValueError(
                f"nf4: {name}.{parameter} must have {placed.num_experts * expected} quantized "
                f"matrices, got {count} in the checkpoint"
            )
    model.set_submodule(name, placed)


def _place_new_experts(
    model: Any,
    name: str,
    module: nn.Module,
    settings: NF4Config,
    weights: Mapping[str, Tensor] | None,
    packed: bool,
) -> int:
    if weights is not None and not all(f"{name}.{p}" in weights for p in module._parameters):
        return 0
    reason = unsupported_experts(module)
    if reason is not None:
        warnings.warn(f"nf4: {name} stays 16-bit: {reason}", stacklevel=2)
        return 0
    placed = NF4Experts(module, **settings.layer_kwargs(), device="meta")
    for parameter in () if packed else MATRICES:
        shown = getattr(module, parameter)
        setattr(placed, parameter, nn.Parameter(shown.detach(), requires_grad=False))
    model.set_submodule(name, placed)
    return 1


def _check_unquantized(name: str, module: nn.Module, weights: Mapping[str, Tensor]) -> None:
    """Refuse a packed weight whose quantization state is not in the checkpoint."""
    stored = weights.get(name)
    if stored is None or not isinstance(module, (nn.Linear, nn.Embedding)):
        return
    packed = stored.dtype is torch.uint8 or (stored.dim() == 2 and stored.shape[1] == 1)
    if packed and stored.shape != module.weight.shape:
        raise ValueError(
            f"nf4: {name} is packed {list(stored.shape)}, but its quantization state is missing: "
            f"no key {name + '.quant_state.bitsandbytes__nf4'!r} in the checkpoint"
        )
