"""``bitsandbytes.functional``: blockwise quantization with bitsandbytes' names and state object."""

from __future__ import annotations

import json
import math
from typing import Any

import torch
from torch import Tensor

from nf4 import functional
from nf4.formats import DYNAMIC8, DYNAMIC8_UNSIGNED, FORMATS, NESTED_BLOCK_SIZE, NF4
from nf4.tensor import QuantizedTensor

FLOATS = (torch.float32, torch.float16, torch.bfloat16)
_PACKED_KEY = "quant_state.bitsandbytes__"


class QuantState:
    """What dequantizing needs besides the codes, with bitsandbytes' attributes.

    ``absmax`` [blocks], float32 or uint8 codes when nested; ``code`` the table; ``shape``,
    ``dtype``, ``blocksize``, ``quant_type``; nested: ``offset`` and ``state2``, the state of the
    codes in ``absmax``.
    """

    def __init__(
        self,
        absmax: Tensor,
        shape: Any = None,
        code: Tensor | None = None,
        blocksize: int | None = None,
        quant_type: str | None = None,
        dtype: torch.dtype | None = None,
        offset: Tensor | None = None,
        state2: QuantState | None = None,
    ) -> None:
        self.absmax, self.code = absmax, code
        self.shape = None if shape is None else torch.Size(shape)
        self.blocksize, self.quant_type, self.dtype = blocksize, quant_type, dtype
        self.offset, self.state2 = offset, state2
        self._checked = False

    @property
    def nested(self) -> bool:
        """Whether ``absmax`` is quantized too."""
        return self.state2 is not None

    @classmethod
    def from_quantized(cls, q: QuantizedTensor) -> QuantState:
        """The state of ``q``, over the same memory."""
        state2 = None
        if q.nested_absmax is not None:
            state2 = cls(
                q.nested_absmax,
                code=_table(DYNAMIC8.name, q.device),
                blocksize=NESTED_BLOCK_SIZE,
                dtype=torch.float32,
            )
        state = cls(
            q.absmax, q.shape, _table(q.format, q.device), q.block_size, q.format, q.dtype,
            q.offset, state2,
        )  # fmt: skip
        state._checked = True
        return state

    def to_quantized(self, codes: Tensor) -> QuantizedTensor:
        """``codes`` with this state, over the same memory. Raises ValueError for another table."""
        format = self.quant_type or DYNAMIC8.name
        if not self._checked:
            self._check(format)
        nested_absmax = None if self.state2 is None else self.state2.absmax
        shape = codes.shape if self.shape is None else self.shape
        packed = codes.contiguous().view(torch.uint8).reshape(-1, 1)
        assert self.blocksize is not None
        return QuantizedTensor(
            packed, self.absmax, nested_absmax, self.offset, shape,
            self.dtype or torch.float32, self.blocksize, format,
        )  # fmt: skip

    def _check(self, format: str) -> None:
        # Once for a state that a script built: reading tables costs a synchronization on a GPU.
        if self.state2 is not None:
            if self.state2.blocksize != NESTED_BLOCK_SIZE:
                raise ValueError(
                    f"nf4.drop_in: state2.blocksize must be {NESTED_BLOCK_SIZE}, "
                    f"got {self.state2.blocksize}"
                )
            _check_table(self.state2.code, DYNAMIC8.name)
        _check_table(self.code, format)
        self._checked = True

    def to(self, device: torch.device | str) -> None:
        """Move the tensors, in place as bitsandbytes does."""
        self.absmax = self.absmax.to(device)
        self.code = None if self.code is None else self.code.to(device)
        self.offset = None if self.offset is None else self.offset.to(device)
        if self.state2 is not None:
            self.state2.to(device)

    def as_dict(self, packed: bool = False) -> dict[str, Any]:
        """The parts by bitsandbytes' names; ``packed``: tensors only, as a state dict has them."""
        parts: dict[str, Any] = {
            "quant_type": self.quant_type,
            "absmax": self.absmax,
            "blocksize": self.blocksize,
            "quant_map": self.code,
            "dtype": str(self.dtype).removeprefix("torch."),
            "shape": None if self.shape is None else tuple(self.shape),
        }
        if self.state2 is not None and self.offset is not None:
            parts["nested_absmax"] = self.state2.absmax
            parts["nested_blocksize"] = self.state2.blocksize
            parts["nested_quant_map"] = self.state2.code
            parts["nested_dtype"] = "float32"
            parts["nested_offset"] = self.offset.item()
        if not packed or self.quant_type is None:
            return parts
        state = self.to_quantized(self.absmax.new_empty(0, dtype=torch.uint8)).state_dict()
        return {k.removeprefix("weight."): v for k, v in state.items() if k != "weight"}

    @classmethod
    def from_dict(cls, qs_dict: dict[str, Any], device: torch.device | str) -> QuantState:
        """Read ``as_dict(packed=True)``, keys with or without a prefix that ends in "weight."."""
        state = {f"weight.{_suffix(key)}": value for key, value in qs_dict.items()}
        meta = next((value for key, value in state.items() if _PACKED_KEY in key), None)
        if meta is None:
            raise ValueError(
                f"nf4.drop_in: qs_dict must have a {_PACKED_KEY}* key, got {sorted(qs_dict)}"
            )
        # The codes are stored elsewhere; some of the right size stand in for them here.
        shape = json.loads(bytes(meta.tolist()))["shape"]
        state["weight"] = torch.empty((math.prod(shape) + 1) // 2, 1, dtype=torch.uint8)
        return cls.from_quantized(QuantizedTensor.from_state_dict(state).to(device))

    def __getitem__(self, index: int) -> Any:
        """The old list form ``[absmax, shape, dtype, blocksize, [offset, state2], quant_type]``."""
        nested = [self.offset, self.state2] if self.nested else None
        return [self.absmax, self.shape, self.dtype, self.blocksize, nested, self.quant_type][index]

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, QuantState):
            return NotImplemented
        same = (self.shape, self.dtype, self.blocksize, self.quant_type) == (
            other.shape, other.dtype, other.blocksize, other.quant_type
        )  # fmt: skip
        pairs = ((self.absmax, other.absmax), (self.code, other.code), (self.offset, other.offset))
        return same and all(_equal(a, b) for a, b in pairs) and self.state2 == other.state2

    __hash__ = None  # type: ignore[assignment]


def _suffix(key: str) -> str:
    """``quant_state.bitsandbytes__nf4`` or ``absmax`` from a key with any prefix."""
    start = key.find(_PACKED_KEY)
    return key[start:] if start >= 0 else key.rpartition(".")[2]


def _equal(a: Tensor | None, b: Tensor | None) -> bool:
    if a is None or b is None:
        return a is b
    return a.shape == b.shape and torch.allclose(a.float(), b.float(), atol=1e-6)


def _table(format: str, device: torch.device) -> Tensor:
    return torch.from_numpy(FORMATS[format].values.copy()).to(device)


def _check_table(code: Tensor | None, format: str) -> None:
    if code is None or not code.numel():
        return
    table = _table(format, code.device)
    if code.shape != table.shape or (code.float() - table).abs().max() > 1e-6:
        raise ValueError(f"nf4.drop_in: code must be the {format} table, got another one")


def quantize_4bit(
    A: Tensor,
    absmax: Tensor | None = None,
    out: Tensor | None = None,
    blocksize: int | None = None,
    compress_statistics: bool = False,
    quant_type: str = "fp4",
    quant_storage: torch.dtype = torch.uint8,
) -> tuple[Tensor, QuantState]:
    """4-bit codes ``[bytes / itemsize, 1]`` of ``quant_storage`` and their state."""
    if quant_type not in ("nf4", "fp4"):
        raise ValueError(f"nf4.drop_in: quant_type must be 'nf4' or 'fp4', got {quant_type!r}")
    q = functional.quantize(
        A, block_size=blocksize or 64, double_quant=compress_statistics, format=quant_type
    )
    state = QuantState.from_quantized(q)
    if absmax is not None:
        state.absmax = absmax.copy_(state.absmax)
    codes = stored_as(q.packed, quant_storage)
    return (codes if out is None else out.copy_(codes)), state


def stored_as(packed: Tensor, quant_storage: torch.dtype) -> Tensor:
    """Packed bytes ``[bytes, 1]`` viewed as a wider dtype; ValueError if they do not divide."""
    if packed.numel() % quant_storage.itemsize:
        raise ValueError(
            f"nf4.drop_in: quant_storage must divide {packed.numel()} bytes, got {quant_storage}"
        )
    return packed.view(-1).view(quant_storage).view(-1, 1)


def dequantize_4bit(
    A: Tensor,
    quant_state: QuantState | None = None,
    absmax: Tensor | None = None,
    out: Tensor | None = None,
    blocksize: int | None = None,
    quant_type: str = "fp4",
) -> Tensor:
    """The values of 4-bit codes; transposed when the codes are ``[1, bytes]``."""
    if quant_state is None:
        if absmax is None or out is None:
            raise ValueError("nf4.drop_in: dequantize_4bit needs quant_state, or absmax and out")
        quant_state = QuantState(
            absmax, out.shape, blocksize=blocksize or 64, quant_type=quant_type, dtype=out.dtype
        )
    values = functional.dequantize(quant_state.to_quantized(A), quant_state.dtype, out=out)
    return values.t() if A.shape[0] == 1 and values.dim() == 2 else values


def quantize_nf4(A: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, QuantState]:
    """``quantize_4bit`` with ``quant_type="nf4"``."""
    return quantize_4bit(A, *args, **{**kwargs, "quant_type": "nf4"})


def quantize_fp4(A: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, QuantState]:
    """``quantize_4bit`` with ``quant_type="fp4"``."""
    return quantize_4bit(A, *args, **{**kwargs, "quant_type": "fp4"})


def dequantize_nf4(A: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """``dequantize_4bit`` with ``quant_type="nf4"``."""
    return dequantize_4bit(A, *args, **{**kwargs, "quant_type": "nf4"})


def dequantize_fp4(A: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """``dequantize_4bit`` with ``quant_type="fp4"``."""
    return dequantize_4bit(A, *args, **{**kwargs, "quant_type": "fp4"})


def quantize_blockwise(
    A: Tensor,
    code: Tensor | None = None,
    absmax: Tensor | None = None,
    out: Tensor | None = None,
    blocksize: int = 4096,
    nested: bool = False,
) -> tuple[Tensor, QuantState]:
    """8-bit codes of A's shape by the signed dynamic map (the only one), and their state."""
    _check_table(code, DYNAMIC8.name)
    q = functional.quantize(A, block_size=blocksize, double_quant=nested, format=DYNAMIC8.name)
    state = QuantState.from_quantized(q)
    state.shape = state.quant_type = None
    if absmax is not None:
        state.absmax = absmax.copy_(state.absmax)
    codes = q.packed.view(A.shape)
    return (codes if out is None else out.copy_(codes)), state


def dequantize_blockwise(
    A: Tensor,
    quant_state: QuantState | None = None,
    absmax: Tensor | None = None,
    code: Tensor | None = None,
    out: Tensor | None = None,
    blocksize: int = 4096,
    nested: bool = False,
) -> Tensor:
    """The values of ``quantize_blockwise``'s codes, in the state's dtype (float32 without one)."""
    if quant_state is None:
        if absmax is None:
            raise ValueError("nf4.drop_in: dequantize_blockwise needs quant_state or absmax")
        quant_state = QuantState(absmax, code=code, blocksize=blocksize, dtype=torch.float32)
    return functional.dequantize(quant_state.to_quantized(A), out=out).view(A.shape)


def matmul_4bit(
    A: Tensor,
    B: Tensor,
    quant_state: QuantState,
    out: Tensor | None = None,
    bias: Tensor | None = None,
) -> Tensor:
    """``A W^T + bias`` with W ``[N, K]`` from codes B (``[bytes, 1]``, or transposed).

    Differentiable in A and bias. A weight quantized as ``[K, N]`` is dequantized first.
    """
    if B.shape[0] == 1:
        B = B.t()
    q = quant_state.to_quantized(B)
    if A.shape[-1] == q.shape[1]:
        result = functional.linear(A, q, bias)
    else:
        result = torch.nn.functional.linear(A, functional.dequantize(q, A.dtype).t(), bias)
    return result if out is None else out.copy_(result)


def gemv_4bit(
    A: Tensor,
    B: Tensor,
    out: Tensor | None = None,
    transposed_A: bool = False,
    transposed_B: bool = False,
    state: QuantState | None = None,
) -> Tensor:
    """``matmul_4bit`` by its old name."""
    if state is None:
        raise ValueError("nf4.drop_in: gemv_4bit needs the state from quantize_4bit")
    return matmul_4bit(A, B, state, out)


def get_4bit_type(typename: str, device: torch.device | str = "cpu", blocksize: int = 64) -> Tensor:
    """The table of "nf4" or "fp4", in code order."""
    if typename not in ("nf4", "fp4"):
        raise ValueError(f"nf4.drop_in: typename must be 'nf4' or 'fp4', got {typename!r}")
    return _table(typename, torch.device(device))


def create_dynamic_map(
    signed: bool = True, max_exponent_bits: int = 7, total_bits: int = 8
) -> Tensor:
    """The 8-bit dynamic map, ascending."""
    if (max_exponent_bits, total_bits) != (7, 8):
        raise ValueError(
            "nf4.drop_in: create_dynamic_map must have 7 exponent bits of 8, "
            f"got {max_exponent_bits} of {total_bits}"
        )
    return torch.from_numpy((DYNAMIC8 if signed else DYNAMIC8_UNSIGNED).values.copy())


def create_normal_map(offset: float = 0.9677083, use_extra_value: bool = True) -> Tensor:
    """The NF4 values, then zeros up to 256, ascending as bitsandbytes returns them."""
    if offset != 0.9677083 or not use_extra_value:
        raise ValueError("nf4.drop_in: create_normal_map must have its default arguments")
    values = torch.zeros(256)
    values[: len(NF4.codes)] = torch.tensor(NF4.codes)
    return values.sort().values
