"""What a checkpoint holds, read from the headers of its files before any weight is loaded."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from nf4.formats import WEIGHT_FORMATS
from nf4.tensor import QuantizedTensor

STATE_PREFIX = "quant_state.bitsandbytes__"
# What bitsandbytes stores beside a packed weight, under "<weight>.<companion>".
COMPANIONS = ("absmax", "quant_map", "nested_absmax", "nested_quant_map")
STATES = tuple(f"{STATE_PREFIX}{name}" for name in WEIGHT_FORMATS)

_DTYPES = {
    "U8": torch.uint8,
    "I8": torch.int8,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F32": torch.float32,
    "F64": torch.float64,
}


@dataclass(frozen=True)
class StoredWeight:
    """A quantized weight in a checkpoint: its layout (tensors on "meta") and how it is stored."""

    layout: QuantizedTensor
    storage_shape: torch.Size
    storage_dtype: torch.dtype


@dataclass(frozen=True)
class Checkpoint:
    """``weights``: every tensor, on "meta", without what lies beside packed weights;
    ``quantized``: those that are quantized. Several have one name where the model fuses them.
    """

    weights: Mapping[str, Tensor]
    quantized: Mapping[str, list[StoredWeight]]


def read_checkpoint(files: Iterable[str]) -> Checkpoint:
    """Find the quantized weights of a checkpoint's files, and check that each one is complete.

    Raises ValueError that names the file or the key for a file that is truncated or damaged, for
    a quantized weight that lacks a part or whose parts do not fit together, for one that has two
    states, and for an unknown format.
    """
    headers: dict[str, Tensor] = {}
    states: dict[str, Tensor] = {}
    for file in files:
        for key, tensor in _headers(file):
            headers[key] = tensor
            if f".{STATE_PREFIX}" in key:
                states[key] = tensor
    parts: dict[str, list[str]] = {}
    weights = {}
    for key, tensor in headers.items():
        name, companion = split_companion(key)
        if companion is None:
            weights[key] = tensor
        else:
            parts.setdefault(name, []).append(key)
    quantized = {name: [_stored(name, keys, headers, states)] for name, keys in parts.items()}
    return Checkpoint(weights, quantized)


def split_companion(key: str) -> tuple[str, str | None]:
    """A key's weight and which companion of it the key is (None: it is no companion)."""
    name, found, _ = key.partition(f".{STATE_PREFIX}")
    if found:
        return name, key[len(name) + 1 :]
    name, _, last = key.rpartition(".")
    return (name, last) if last in COMPANIONS else (key, None)


def _headers(file: str) -> Iterator[tuple[str, Tensor]]:
    """``(key, tensor on "meta")`` of a file; the quantization states with their contents."""
    if not file.endswith(".safetensors"):
        tensors = torch.load(file, map_location="cpu", mmap=True, weights_only=True)
        for key, tensor in tensors.items():
            yield key, tensor if f".{STATE_PREFIX}" in key else tensor.to("meta")
        return
    try:
        with safe_open(file, framework="pt") as opened:
            for key in opened.keys():  # noqa: SIM118 not a dict
                if f".{STATE_PREFIX}" in key:
                    yield key, opened.get_tensor(key)
                    continue
                header = opened.get_slice(key)
                dtype = _DTYPES.get(header.get_dtype(), torch.float32)
                yield key, torch.empty(header.get_shape(), dtype=dtype, device="meta")
    except SafetensorError as error:
        raise ValueError(f"nf4: {Path(file).name} is truncated or damaged: {error}") from error


def _stored(
    name: str, keys: list[str], headers: Mapping[str, Tensor], states: Mapping[str, Tensor]
) -> StoredWeight:
    own = sorted(key for key in keys if key in states)
    if len(own) > 1:
        formats = " and ".join(key.partition(STATE_PREFIX)[2] for key in own)
        raise ValueError(f"nf4: {name} must have one quantization state, got {formats}")
    for key in own:
        form = key.partition(STATE_PREFIX)[2]
        if form not in WEIGHT_FORMATS:
            raise ValueError(
                f"nf4: {name}: format must be one of {', '.join(WEIGHT_FORMATS)}, got {form!r}"
            )
    # The tables' contents are compared when the weight is loaded; here are no contents.
    parts = {k: headers[k] for k in (name, *keys) if k in headers and not k.endswith("quant_map")}
    try:
        layout = QuantizedTensor.from_state_dict(parts, name)
    except KeyError as error:
        raise ValueError(f"{error.args[0]} (the checkpoint is incomplete)") from error
    return StoredWeight(layout, headers[name].shape, headers[name].dtype)
