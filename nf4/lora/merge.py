"""Fold adapters into the weights of a model."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from nf4.nn.embedding import NF4Embedding
from nf4.nn.experts import NF4Experts
from nf4.nn.linear import Linear4bitLoRA, NF4Linear

Base = str | os.PathLike[str] | Mapping[str, Tensor]


def merge_and_unload(
    model: nn.Module,
    into: str = "16bit",
    *,
    base: Base | None = None,
    dtype: torch.dtype | None = None,
) -> nn.Module:
    """Fold every adapter into its weight and replace the layers, in place, one by one.

    ``into="16bit"`` makes ``nn.Linear`` layers of ``dtype`` (None: the dtype quantized from),
    rounding ``W + scaling B A``, summed in float32, once. ``into="nf4"`` makes ``NF4Linear``
    layers of ``Q(W + scaling B A)`` and leaves layers without an adapter as they are.

    ``base`` says what W is: a directory of safetensors files (or one file) with the 16-bit
    weights, or a state dict of them; None takes the dequantized weights. For "16bit" the
    dequantized weight is what the adapter was trained against. For "nf4" pass the 16-bit base:
    requantizing a dequantized weight loses nearly all of a small adapter. Returns ``model``.
    Raises KeyError when ``base`` lacks a weight, before anything changes, and ValueError for a
    damaged file and for a weight of another shape.
    """
    if into not in ("16bit", "nf4"):
        raise ValueError(f"nf4.merge_and_unload: into must be '16bit' or 'nf4', got {into!r}")
    kind = NF4Linear if into == "16bit" else Linear4bitLoRA
    layers = [(name, m) for name, m in model.named_modules() if isinstance(m, kind)]
    heads = _tied_heads(model) if into == "16bit" else []
    read = base_reader(base, [name for name, _ in layers])
    for name, layer in layers:
        weight = None if read is None else read(name)
        if weight is not None:
            weight = weight.T if layer.fan_in_fan_out else weight
            if weight.shape != layer.weight_shape:
                raise ValueError(
                    f"nf4.merge_and_unload: {name} in base must have shape "
                    f"{list(layer.weight_shape)}, got {list(weight.shape)}"
                )
        if into == "16bit":
            new: nn.Module = _to_16bit(layer, weight, dtype)
        else:
            assert isinstance(layer, Linear4bitLoRA)
            layer.merge(weight)
            new = NF4Linear.from_layer(layer)
        model.set_submodule(name, new)
    quantizer = getattr(model, "hf_quantizer", None)
    if into == "16bit" and quantizer is not None:
        # A transformers model: quantized embeddings and experts too, and its config's entry.
        quantizer.dequantize(model, dtype=dtype)
    elif into == "16bit":
        _rest_to_16bit(model, dtype)
    for table, head in heads:
        model.get_submodule(head).weight = model.get_submodule(table).weight
    return model


def _tied_heads(model: nn.Module) -> list[tuple[str, str]]:
    """``(embedding, head)`` names of quantized heads that share a table and have no adapter."""
    modules = dict(model.named_modules())
    return [
        (table, head)
        for table, embedding in modules.items()
        if isinstance(embedding, NF4Embedding)
        for head, linear in modules.items()
        if type(linear) is NF4Linear and linear.weight is embedding.weight
    ]


def _rest_to_16bit(model: nn.Module, dtype: torch.dtype | None) -> None:
    """Dequantize what has no adapters: experts and embeddings."""
    for name, module in list(model.named_modules()):
        if isinstance(module, NF4Experts):
            model.set_submodule(name, module.to_experts(dtype))
        elif isinstance(module, NF4Embedding):
            model.set_submodule(name, module.to_embedding(dtype))


@torch.no_grad()
def _to_16bit(layer: NF4Linear, base: Tensor | None, dtype: torch.dtype | None) -> nn.Module:
    if isinstance(layer, Linear4bitLoRA):
        layer.unmerge()
    if base is None:
        weight = layer.dequantize(torch.float32)
    else:
        weight = base.to(layer.weight.device, torch.float32)
    if isinstance(layer, Linear4bitLoRA):
        weight = weight + layer.delta_weight()
    return layer.with_weight(weight.to(dtype or layer.weight_dtype))


def base_reader(base: Base | None, names: list[str]) -> Callable[[str], Tensor] | None:
    """A function from a module's name to its 16-bit weight; None without a base.

    One tensor is in memory at a time. ``names`` are the modules that will be asked for: KeyError,
    naming the first, when ``base`` (see ``merge_and_unload``) lacks one. A key may lack leading
    components of the module's name, or have more of them (a bare backbone's checkpoint).
    """
    if base is None:
        return None
    if isinstance(base, Mapping):
        keys = _keys(names, base)
        return lambda name: base[keys[name]]
    files = _weight_files(Path(base))
    keys = _keys(names, files)

    def read(name: str) -> Tensor:
        with _opened(files[keys[name]]) as file:
            return file.get_tensor(keys[name])

    return read


def _keys(names: list[str], base: Mapping[str, object]) -> dict[str, str]:
    """The key in ``base`` of each module's weight."""
    found = {}
    missing = []
    for name in names:
        key = f"{name}.weight"
        if key not in base:
            fits = [k for k in base if key.endswith(f".{k}") or k.endswith(f".{key}")]
            if len(fits) != 1:
                missing.append(key)
                continue
            key = fits[0]
        found[name] = key
    if missing:
        raise KeyError(
            f"nf4.merge_and_unload: base must hold every merged weight, {len(missing)} missing, "
            f"first {missing[0]!r}"
        )
    return found


@contextmanager
def _opened(path: Path) -> Iterator[Any]:
    try:
        with safe_open(path, framework="pt") as file:
            yield file
    except SafetensorError as error:
        raise ValueError(
            f"nf4.merge_and_unload: {path} is truncated or damaged: {error}"
        ) from error


def _weight_files(path: Path) -> dict[str, Path]:
    """The safetensors file of each tensor under ``path``."""
    if path.is_file():
        shards = [path]
    else:
        index = path / "model.safetensors.index.json"
        if index.exists():
            try:
                named = json.loads(index.read_bytes())["weight_map"]
            except (KeyError, TypeError, ValueError) as error:
                raise ValueError(
                    f"nf4.merge_and_unload: {index} must hold a weight_map: {error}"
                ) from error
            return {key: path / shard for key, shard in named.items()}
        shards = sorted(path.glob("*.safetensors"))
    if not shards:
        raise FileNotFoundError(f"nf4.merge_and_unload: no safetensors file in {path}")
    files = {}
    for shard in shards:
        with _opened(shard) as file:
            files.update(dict.fromkeys(file.keys(), shard))
    return files
