"""``QuantizedTensor``: packed codes with their scales, and bitsandbytes' layout in and out."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from nf4.formats import (
    BLOCK_SIZES,
    DYNAMIC8,
    FORMATS,
    NESTED_BLOCK_SIZE,
    WEIGHT_FORMATS,
    Format,
)
from nf4.ops import numel

_STATE = "quant_state.bitsandbytes__"
_DTYPES = ("float32", "float16", "bfloat16")


@dataclass(frozen=True, eq=False)
class QuantizedTensor:
    """A blockwise quantized tensor.

    ``packed``: uint8 ``[bytes, 1]``, the codes of the row-major flattened tensor (two a byte for
    4-bit formats, element ``2i`` in the high nibble). ``absmax``: one scale a block, float32, or
    uint8 codes when double quantized; then ``nested_absmax`` (float32, one per 256 scales) and
    ``offset`` (float32, 0-dim) decode them. ``shape`` and ``dtype`` are those of the tensor that
    was quantized. All tensors are on one device.
    """

    packed: Tensor
    absmax: Tensor
    nested_absmax: Tensor | None
    offset: Tensor | None
    shape: torch.Size
    dtype: torch.dtype
    block_size: int
    format: str

    @property
    def nested(self) -> bool:
        """Whether the scales are quantized too."""
        return self.nested_absmax is not None

    @property
    def device(self) -> torch.device:
        return self.packed.device

    @property
    def tensors(self) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
        """``(packed, absmax, nested_absmax, offset)``, in the order the ops take them."""
        return self.packed, self.absmax, self.nested_absmax, self.offset

    @property
    def layout(self) -> tuple[int, int]:
        """``(block_size, format id)``, in the order the ops take them."""
        return self.block_size, FORMATS[self.format].id

    @property
    def nbytes(self) -> int:
        """Bytes of the codes and of all scales."""
        return sum(t.nbytes for t in self.tensors if t is not None)

    def numel(self) -> int:
        """Number of elements of the tensor that was quantized."""
        return numel(self.shape)

    def to(self, device: torch.device | str) -> QuantizedTensor:
        """The same bytes on another device."""
        return self._map(lambda t: t.to(device))

    def empty_like(self, device: torch.device | str) -> QuantizedTensor:
        """Uninitialized storage of the same layout on a device."""
        return self._map(lambda t: torch.empty_like(t, device=device))

    def _map(self, fn: Callable[[Tensor], Tensor]) -> QuantizedTensor:
        packed, absmax, nested_absmax, offset = self.tensors
        return replace(
            self,
            packed=fn(packed),
            absmax=fn(absmax),
            nested_absmax=None if nested_absmax is None else fn(nested_absmax),
            offset=None if offset is None else fn(offset),
        )

    def __repr__(self) -> str:
        nested = ", double quantized" if self.nested else ""
        return (
            f"QuantizedTensor({self.format}, shape={list(self.shape)}, dtype={self.dtype}, "
            f"block_size={self.block_size}{nested}, {self.nbytes} bytes on {self.device})"
        )

    def state_dict(self, prefix: str = "weight") -> dict[str, Tensor]:
        """The tensors under bitsandbytes' own keys (``prefix``, ``prefix.absmax``, ...), so that a
        safetensors file of them loads there too.

        ``dynamic8`` has no bitsandbytes form; it uses the same keys with its own name.
        """
        fmt = FORMATS[self.format]
        meta: dict[str, Any] = {
            "quant_type": self.format,
            "blocksize": self.block_size,
            "dtype": str(self.dtype).removeprefix("torch."),
            "shape": list(self.shape),
        }
        state = {prefix: self.packed, f"{prefix}.absmax": self.absmax}
        state[f"{prefix}.quant_map"] = torch.from_numpy(fmt.values.copy()).to(self.device)
        if self.nested_absmax is not None and self.offset is not None:
            nested_map = torch.from_numpy(DYNAMIC8.values.copy()).to(self.device)
            state[f"{prefix}.nested_absmax"] = self.nested_absmax
            state[f"{prefix}.nested_quant_map"] = nested_map
            meta["nested_blocksize"] = NESTED_BLOCK_SIZE
            meta["nested_dtype"] = "float32"
            meta["nested_offset"] = self.offset.item()
        text = json.dumps(meta).encode()
        state[f"{prefix}.{_STATE}{self.format}"] = torch.tensor(list(text), dtype=torch.uint8)
        return state

    @classmethod
    def from_state_dict(
        cls, state: Mapping[str, Tensor], prefix: str = "weight"
    ) -> QuantizedTensor:
        """Read what ``state_dict`` or bitsandbytes wrote.

        Packed codes stored in a wider dtype (``quant_storage``) are viewed as bytes. Raises
        KeyError for a missing key, ValueError for contents that do not fit together and for scales
        that are NaN or infinite.
        """
        meta, name = _read_meta(state, prefix)
        fmt = FORMATS[name]
        shape = torch.Size(meta["shape"])
        packed = _require(state, prefix).contiguous().view(torch.uint8).reshape(-1, 1)
        absmax = _require(state, f"{prefix}.absmax")
        _check_map(state, f"{prefix}.quant_map", fmt)
        nested_absmax = offset = None
        if "nested_offset" in meta:
            nested_absmax = _require(state, f"{prefix}.nested_absmax")
            _check_map(state, f"{prefix}.nested_quant_map", DYNAMIC8)
            offset = torch.tensor(meta["nested_offset"], dtype=torch.float32, device=absmax.device)
        elif absmax.is_floating_point():  # 8-bit codes without their table are refused below
            absmax = absmax.float()
        q = cls(
            packed,
            absmax.reshape(-1),
            nested_absmax,
            offset,
            shape,
            getattr(torch, meta["dtype"]),
            meta["blocksize"],
            name,
        )
        q._check(prefix)
        return q

    def _check(self, name: str) -> None:
        """Raise ValueError unless the tensors fit the shape and each other."""
        n = numel(self.shape)
        blocks = -(-n // self.block_size)
        expected = {"packed": FORMATS[self.format].packed_bytes(n), "absmax": blocks}
        got = {"packed": self.packed.numel(), "absmax": self.absmax.numel()}
        if self.nested_absmax is not None:
            expected["nested_absmax"] = -(-blocks // NESTED_BLOCK_SIZE)
            got["nested_absmax"] = self.nested_absmax.numel()
        for key, size in expected.items():
            if got[key] != size:
                raise ValueError(
                    f"nf4: {name}: {key} must have {size} elements for shape {list(self.shape)} "
                    f"in blocks of {self.block_size}, got {got[key]}"
                )
        scales = {"absmax": self.absmax}
        if self.nested_absmax is not None and self.offset is not None:
            if self.absmax.dtype is not torch.uint8:
                raise ValueError(
                    f"nf4: {name}: absmax must be uint8 codes where nested_offset is given, "
                    f"got {self.absmax.dtype}"
                )
            scales = {"nested_absmax": self.nested_absmax, "nested_offset": self.offset}
        for key, scale in scales.items():
            if scale.dtype is not torch.float32:
                raise ValueError(f"nf4: {name}: {key} must be float32, got {scale.dtype}")
            if not (scale.is_meta or scale.isfinite().all()):
                raise ValueError(f"nf4: {name}: {key} must be finite, got NaN or infinity")


def _require(state: Mapping[str, Tensor], key: str) -> Tensor:
    if key not in state:
        raise KeyError(f"nf4: quantized weight is incomplete: missing key {key!r}")
    return state[key]


def _read_meta(state: Mapping[str, Tensor], prefix: str) -> tuple[dict[str, Any], str]:
    keys = [k for k in state if k.startswith(f"{prefix}.{_STATE}")]
    if not keys:
        raise KeyError(f"nf4: quantized weight is incomplete: missing key '{prefix}.{_STATE}nf4'")
    key = keys[0]
    try:
        meta = json.loads(bytes(state[key].cpu().tolist()))
    except (TypeError, ValueError) as error:
        raise ValueError(f"nf4: {key} must hold JSON: {error}") from error
    if not isinstance(meta, dict):
        raise ValueError(f"nf4: {key} must hold a JSON object, got {meta!r}")
    name = meta.get("quant_type")
    if name not in WEIGHT_FORMATS:
        raise ValueError(
            f"nf4: {prefix}: quant_type must be one of {', '.join(WEIGHT_FORMATS)}, got {name!r}"
        )
    rules = {
        "blocksize": (lambda v: v in BLOCK_SIZES, f"one of {', '.join(map(str, BLOCK_SIZES))}"),
        "dtype": (lambda v: v in _DTYPES, f"one of {', '.join(_DTYPES)}"),
        "shape": (_is_shape, "a list of sizes"),
    }
    if "nested_offset" in meta:
        rules["nested_blocksize"] = (lambda v: v == NESTED_BLOCK_SIZE, str(NESTED_BLOCK_SIZE))
        rules["nested_offset"] = (lambda v: isinstance(v, (int, float)), "a number")
    missing = rules.keys() - meta.keys()
    if missing:
        raise KeyError(f"nf4: {key} must name {', '.join(sorted(missing))}")
    for field, (holds, rule) in rules.items():
        if not holds(meta[field]):
            raise ValueError(f"nf4: {prefix}: {field} must be {rule}, got {meta[field]!r}")
    return meta, name


def _is_shape(value: Any) -> bool:
    return isinstance(value, list) and all(type(size) is int and size >= 0 for size in value)


def _check_map(state: Mapping[str, Tensor], key: str, fmt: Format) -> None:
    """Refuse a file whose code table is not the one that our kernels decode with."""
    if key not in state:
        return
    got = state[key].float().cpu().numpy().reshape(-1)
    # 1e-6: older bitsandbytes releases stored tables that differ in the last bits.
    if got.shape != fmt.values.shape or np.abs(got - fmt.values).max() > 1e-6:
        raise ValueError(f"nf4: {key} must be the {fmt.name} table, got another one")
