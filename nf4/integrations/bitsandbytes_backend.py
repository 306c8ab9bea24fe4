"""nf4's kernels under bitsandbytes' own modules, by its ``bitsandbytes.backends`` entry point.

Off unless the environment variable ``NF4_BITSANDBYTES_BACKEND`` is 1 when bitsandbytes is imported:
an installed nf4 changes nothing about bitsandbytes by itself. On, quantize_4bit, dequantize_4bit
and gemm_4bit run on nf4 on each kind of device for which nf4 has native kernels here.
"""

from __future__ import annotations

import os
from collections.abc import Sequence

import torch
from torch import Tensor

from nf4.backends import backend_for
from nf4.formats import FORMATS

SWITCH = "NF4_BITSANDBYTES_BACKEND"

_library: torch.library.Library | None = None


def enabled() -> bool:
    """Whether the switch is on."""
    return os.environ.get(SWITCH) == "1"


def register() -> list[str]:
    """The entry point: replace bitsandbytes' kernels if the switch is on.

    Returns the kinds of devices ("cpu", "cuda") on which it did; once for a process.
    """
    global _library
    if not enabled() or _library is not None:
        return []
    kinds = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
    # The reference is there to compare with, not to be fast.
    kinds = [kind for kind in kinds if backend_for(torch.device(kind)) != "reference"]
    _library = torch.library.Library("bitsandbytes", "IMPL")
    for kind in kinds:
        for name, kernel in _KERNELS.items():
            _library.impl(name, kernel, kind.upper(), allow_override=True)
    return kinds


def _codes(packed: Tensor) -> Tensor:
    return packed.contiguous().view(torch.uint8).view(-1, 1)


def _quantize_4bit(
    A: Tensor, blocksize: int, quant_type: str, quant_storage: torch.dtype
) -> tuple[Tensor, Tensor]:
    packed, absmax = torch.ops.nf4.quantize(A, blocksize, FORMATS[quant_type].id)
    return packed.view(-1).view(quant_storage).view(-1, 1), absmax


def _dequantize_4bit(
    A: Tensor,
    absmax: Tensor,
    blocksize: int,
    quant_type: str,
    shape: Sequence[int],
    dtype: torch.dtype,
) -> Tensor:
    layout = (blocksize, FORMATS[quant_type].id)
    return torch.ops.nf4.dequantize(_codes(A), absmax, None, None, list(shape), *layout, dtype)


def _dequantize_4bit_out(
    A: Tensor,
    absmax: Tensor,
    blocksize: int,
    quant_type: str,
    shape: Sequence[int],
    dtype: torch.dtype,
    out: Tensor,
) -> None:
    out.copy_(_dequantize_4bit(A, absmax, blocksize, quant_type, shape, dtype))


def _gemm_4bit(
    A: Tensor,
    B: Tensor,
    shapeB: Sequence[int],
    absmax: Tensor,
    blocksize: int,
    quant_type: str,
    bias: Tensor | None = None,
    absmax_8bit: Tensor | None = None,
    absmax_code: Tensor | None = None,
    absmax_offset: Tensor | None = None,
) -> Tensor:
    scales = (absmax, None, None)
    if absmax_8bit is not None:
        scales = (absmax_8bit, absmax, absmax_offset)  # type: ignore[assignment]
    layout = (shapeB[0], blocksize, FORMATS[quant_type].id)
    return torch.ops.nf4.linear(A, _codes(B), *scales, bias, *layout)


_KERNELS = {
    "quantize_4bit": _quantize_4bit,
    "dequantize_4bit": _dequantize_4bit,
    "dequantize_4bit.out": _dequantize_4bit_out,
    "gemm_4bit": _gemm_4bit,
}
