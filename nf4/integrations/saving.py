"""The tensors of a quantized model as a checkpoint holds them, and the way back to 16 bits."""

from __future__ import annotations

import copy
import re
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter

from nf4.integrations.checkpoint import COMPANIONS, STATES
from nf4.integrations.loading import DeserializeExperts, Reader
from nf4.integrations.placing import is_skipped
from nf4.nn import Linear4bitLoRA, NF4Embedding, NF4Experts
from nf4.nn.experts import MATRICES
from nf4.nn.linear import NF4Linear, is_conv1d
from nf4.nn.weight import QuantizedWeight


def stored_state_dict(model: Any, storage: torch.dtype) -> dict[str, Tensor]:
    """The model's state dict with each quantized weight under bitsandbytes' own keys.

    ``storage`` is the dtype that packed codes are stored as. Nothing is copied but the small
    tables. Experts are stored matrix by matrix, under the names that transformers splits them to.
    """
    state = model.state_dict()
    tied = {k for k, v in model.all_tied_weights_keys.items() if k in state and v in state}
    for name, module in model.named_modules():
        if isinstance(module, QuantizedWeight):
            for key in _own_keys(module):
                state.pop(f"{name}.{key}", None)
            if f"{name}.weight" not in tied:
                state.update(_weight_state(model, name, module, storage))
        elif isinstance(module, NF4Experts):
            for key in [*module._parameters, *module._buffers]:
                state.pop(f"{name}.{key}", None)
            module = _in_memory(model, name, module)
            for parameter, keys in expert_keys(model, name).items():
                for expert in range(module.num_experts):
                    for index, key in enumerate(keys):
                        q = module.q(parameter, expert, index)
                        state.update(q.state_dict(key.format(expert)))
    return state


def _in_memory(model: Any, name: str, module: NF4Experts) -> NF4Experts:
    """The experts themselves, or a copy with the tensors that are offloaded to disk."""
    tensors = {**module._parameters, **module._buffers}
    offloaded = [key for key, t in tensors.items() if t is not None and t.is_meta]
    if not offloaded:
        return module
    from transformers.integrations.accelerate import load_offloaded_parameter

    copied = copy.copy(module)
    copied._parameters, copied._buffers = dict(module._parameters), dict(module._buffers)
    read = {key: load_offloaded_parameter(model, f"{name}.{key}") for key in offloaded}
    copied.set_tensors(read)
    return copied


def _own_keys(module: QuantizedWeight) -> list[str]:
    return ["weight", *(key for key in module._buffers if key.startswith("weight_"))]


def _weight_state(
    model: Any, name: str, module: QuantizedWeight, storage: torch.dtype
) -> dict[str, Tensor]:
    q, packed = module.q, module.weight.data
    if any(t is not None and t.is_meta for t in q.tensors[1:]):  # offloaded with offload_buffers
        from transformers.integrations.accelerate import load_offloaded_parameter

        scales: dict[str, Any] = {
            key.removeprefix("weight_"): load_offloaded_parameter(model, f"{name}.{key}")
            for key, tensor in module._buffers.items()
            if key.startswith("weight_") and tensor is not None
        }
        q = replace(q, **scales)
    if packed.is_meta:  # save_pretrained reads an offloaded weight when it writes it
        q = replace(q, packed=torch.empty(0, dtype=torch.uint8, device=q.absmax.device))
    elif storage is not torch.uint8 and packed.numel() % storage.itemsize == 0:
        packed = packed.view(-1).view(storage).view(-1, 1)
    return {**q.state_dict(f"{name}.weight"), f"{name}.weight": packed}


def expert_keys(model: Any, path: str) -> dict[str, tuple[str, ...]]:
    """What each matrix of the experts at ``path`` is called in a checkpoint, "{}" for the expert.

    By parameter, in the order of ``MATRICES``: what transformers fuses to the parameter, or
    ``<path>.<expert>.gate_proj.weight`` and so on where it fuses nothing.
    """
    keys = {
        parameter: tuple(f"{path}.{{}}.{matrix}_proj.weight" for matrix in matrices)
        for parameter, matrices in MATRICES.items()
    }
    for converter in get_model_conversion_mapping(model):
        if not isinstance(converter, WeightConverter) or not _merges_experts(converter):
            continue
        target = converter.target_patterns[0]
        parameter = target.rpartition(".")[2]
        if f"{path}.{parameter}".endswith(target):
            lead = f"{path}.{parameter}".removesuffix(target)
            keys[parameter] = tuple(
                lead + source.replace("*", "{}") for source in converter.source_patterns
            )
    return keys


def _merges_experts(converter: Any) -> bool:
    """Whether a converter fuses one matrix per expert (two for gate and up) to a parameter."""
    parameter = converter.target_patterns[0].rpartition(".")[2]
    return len(converter.source_patterns) == len(MATRICES.get(parameter, ())) and all(
        re.fullmatch(r"[\w.]*\.\*\.\w+\.weight", s) for s in converter.source_patterns
    )


def experts_conversions(quantizer: Any, conversions: list[Any]) -> tuple[list[Any], list[Any]]:
    """``conversions`` with those that fuse experts' weights made to read quantized matrices.

    Also returns the ones that were replaced.
    """
    suffixes = [f".{name}" for name in (*STATES, *sorted(COMPANIONS)[::-1])] + [""]
    replaced = [c for c in conversions if isinstance(c, WeightConverter) and _merges_experts(c)]
    ours = []
    for converter in replaced:
        reader = Reader(
            [source + suffix for source in converter.source_patterns for suffix in suffixes],
            list(converter.target_patterns),
            operations=[DeserializeExperts(quantizer)],
        )
        for scope in ("scope_prefix", "base_model_prefix"):  # of a model within the model
            if hasattr(converter, scope):
                setattr(reader, scope, getattr(converter, scope))
        ours.append(reader)
    for parameter, matrices in MATRICES.items():  # where transformers fuses nothing
        ours.append(
            Reader(
                [f".experts.*.{m}_proj.weight{suffix}" for m in matrices for suffix in suffixes],
                f".experts.{parameter}",
                operations=[DeserializeExperts(quantizer)],
            )
        )
    return ours + [c for c in conversions if c not in replaced], replaced


def bitsandbytes_skip_list(model: Any, default: list[str]) -> list[str] | None:
    """What bitsandbytes must be told to leave 16-bit; None where its ``default`` says the same."""
    kept = [n for n, m in model.named_modules() if type(m) is nn.Linear or is_conv1d(m)]
    quantized = [n for n, m in model.named_modules() if isinstance(m, NF4Linear)]
    same = all(is_skipped(n, default) for n in kept) and not any(
        is_skipped(n, default) for n in quantized
    )
    return None if same else kept


def dequantize(model: Any, dtype: torch.dtype | None) -> None:
    """Replace every quantized module by the 16-bit one that it came from, in place, one by one.

    Raises ValueError for offloaded weights, and for LoRA adapters, which belong to the 4-bit
    weights.
    """
    modules = list(_quantized(model))
    for name, module in modules:
        if isinstance(module, Linear4bitLoRA):
            raise ValueError(
                f"nf4: {name} has a LoRA adapter, which dequantize() would lose; "
                "use nf4.merge_and_unload"
            )
        if any(t.is_meta for t in module.parameters()):
            raise ValueError(f"nf4: dequantize() needs all weights in memory, {name} is offloaded")
    for name, module in modules:
        new: nn.Module
        if isinstance(module, NF4Experts):
            new = module.to_experts(dtype)
        elif isinstance(module, NF4Embedding):
            new = module.to_embedding(dtype)
        else:
            assert isinstance(module, NF4Linear)
            new = module.to_linear(dtype)
        _move_hook(module, new)
        model.set_submodule(name, new)
    if any(isinstance(module, NF4Embedding) for _, module in modules):
        model.tie_weights()


def _quantized(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    for name, module in model.named_modules():
        if isinstance(module, (QuantizedWeight, NF4Experts)):
            yield name, module


def _move_hook(old: nn.Module, new: nn.Module) -> None:
    """Give ``new`` the accelerate hook that moves the inputs of ``old`` to its device."""
    if not hasattr(old, "_hf_hook"):
        return
    from accelerate.hooks import add_hook_to_module, remove_hook_from_module

    hook: Any = old._hf_hook
    remove_hook_from_module(old)
    add_hook_to_module(new, hook)
