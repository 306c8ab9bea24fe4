"""Shapes and random inputs that the op tests of every backend share.

``SMALL`` cases run everywhere, also where a kernel is emulated on a CPU (Triton's interpreter, the
CUDA emulation). ``LARGE`` cases need a native backend: a GPU, or ``cpu`` and ``reference``.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

import nf4
from nf4 import formats
from nf4.backends import reference

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
# A value is off by at most this share of itself after one rounding.
ROUNDING = {torch.float32: 2.0**-24, torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8}


def op(name: str) -> Callable[..., Any]:
    """The op of the backend that the ``backend`` fixture forces."""
    return getattr(getattr(torch.ops, nf4.backends.namespace()), name)


def emulated(backend: str, device: torch.device) -> bool:
    """Whether a GPU backend runs on a CPU here, a thousand times slower than it is meant to."""
    return backend in ("triton", "cuda") and device.type == "cpu"


def skip_if_emulated(backend: str, device: torch.device) -> None:
    """Skip a large case where it would take minutes."""
    if emulated(backend, device):
        pytest.skip(f"backend {backend}: a large shape needs a GPU, here it is emulated")


def dtype_id(dtype: torch.dtype) -> str:
    """``float32`` for ``torch.float32``."""
    return str(dtype).removeprefix("torch.")


class Weight(NamedTuple):
    """The four tensors of a quantized weight, in the order in which ops take them."""

    packed: Tensor
    absmax: Tensor
    nested_absmax: Tensor | None
    offset: Tensor | None


def quantized(
    dense: Tensor, block_size: int, format: str, nested: bool, device: torch.device
) -> tuple[Weight, Tensor]:
    """Quantize ``dense`` with the reference; returns the parts and the float32 values they hold."""
    id = formats.FORMATS[format].id
    packed, absmax = reference.quantize(dense.cpu(), block_size, id)
    parts = Weight(packed, absmax, None, None)
    if nested:
        parts = Weight(packed, *reference.double_quantize(absmax))
    values = reference.dequantize(*parts, list(dense.shape), block_size, id, torch.float32)
    return Weight(*(None if t is None else t.to(device) for t in parts)), values.to(device)


@dataclass(frozen=True)
class Matmul:
    """``x [*lead, k]`` times the transpose of a weight ``[n, k]``."""

    lead: tuple[int, ...]
    n: int
    k: int
    block_size: int = 64
    format: str = "nf4"
    nested: bool = False
    bias: bool = False

    @property
    def m(self) -> int:
        """Rows of x when its leading dimensions are flattened."""
        return math.prod(self.lead)

    @property
    def format_id(self) -> int:
        """The number that ops take for the format."""
        return formats.FORMATS[self.format].id

    def __str__(self) -> str:
        shape = "x".join(map(str, (*self.lead, self.n, self.k)))
        flags = ("-nested" if self.nested else "") + ("-bias" if self.bias else "")
        return f"{shape}-{self.format}-{self.block_size}{flags}"

    def weight(self, device: torch.device) -> tuple[Weight, Tensor]:
        """A random quantized weight and its float32 values."""
        dense = torch.randn(self.n, self.k) * self.k**-0.5
        return quantized(dense, self.block_size, self.format, self.nested, device)


SMALL = [
    Matmul((1,), 64, 64),
    Matmul((1,), 37, 129, nested=True, bias=True),
    Matmul((1,), 80, 2112, block_size=128),
    Matmul((2,), 48, 80, block_size=32, nested=True),
    Matmul((3,), 33, 65, bias=True),
    Matmul((8,), 96, 256, block_size=128, nested=True),
    Matmul((16,), 64, 128),
    Matmul((17,), 40, 72, format="fp4", nested=True, bias=True),
    Matmul((64,), 80, 192, nested=True),
    Matmul((33,), 130, 66, bias=True),
    Matmul((9,), 70, 300, block_size=256),
    Matmul((3,), 64, 64, block_size=4096, bias=True),
    Matmul((70,), 66, 96, block_size=32, bias=True),
    Matmul((8,), 32, 97, format="dynamic8", nested=True, bias=True),
    Matmul((0,), 16, 32, bias=True),
    Matmul((2, 0, 3), 16, 32),
    Matmul((2, 5), 24, 100, nested=True, bias=True),
    Matmul((), 24, 96, bias=True),
    Matmul((5,), 1, 64),
    Matmul((4,), 7, 1, bias=True),
    Matmul((1,), 1, 1),
]
LARGE = [
    Matmul((1,), 2048, 4096, nested=True),
    Matmul((4, 17), 1152, 4304, nested=True, bias=True),  # SigLIP's MLP: k is no multiple of 64
    Matmul((5,), 1031, 2880, block_size=128, bias=True),
    Matmul((130,), 514, 1536, block_size=1024, format="fp4"),
    Matmul((257,), 320, 1027, nested=True, bias=True),
]


def matmul_params() -> list[Any]:
    """Every case of ``SMALL`` and ``LARGE`` in every dtype, as pytest parameters (case, dtype)."""
    return [
        pytest.param(case, dtype, id=f"{case}-{dtype_id(dtype)}")
        for case in (*SMALL, *LARGE)
        for dtype in DTYPES
    ]


@dataclass(frozen=True)
class Lora:
    """A LoRA matmul; ``adapter_dtype`` None means the dtype of x."""

    base: Matmul
    dtype: torch.dtype
    r: int
    adapter_dtype: torch.dtype | None = None
    dropout_p: float = 0.0
    scaling: float = 2.0

    @property
    def lora_dtype(self) -> torch.dtype:
        """The dtype of the adapters."""
        return self.adapter_dtype or self.dtype

    def __str__(self) -> str:
        dtypes = f"{dtype_id(self.dtype)}-{dtype_id(self.lora_dtype)}"
        return f"{self.base}-r{self.r}-p{self.dropout_p}-{dtypes}"


F32, F16, BF16 = DTYPES
LORA_SMALL = [
    Lora(Matmul((1,), 64, 64), BF16, 16),
    Lora(Matmul((1,), 37, 129, nested=True, bias=True), F32, 8),
    Lora(Matmul((1,), 48, 96, nested=True), F16, 1, F32),
    Lora(Matmul((2,), 48, 80, block_size=32), BF16, 4, F32, 0.05),
    Lora(Matmul((3,), 33, 65, bias=True), F16, 8, None, 0.5, 0.25),
    Lora(Matmul((8,), 96, 256, block_size=128, nested=True), BF16, 64, F32),
    Lora(Matmul((8,), 40, 72, format="fp4"), F32, 1, BF16, 0.05),
    Lora(Matmul((16,), 64, 128, nested=True, bias=True), BF16, 16, None, 0.05),
    Lora(Matmul((17,), 40, 72, nested=True), F32, 16, None, 0.5),
    Lora(Matmul((64,), 80, 192, bias=True), F16, 16, F32, 0.05),
    Lora(Matmul((64,), 80, 130, nested=True), BF16, 8, F32),
    Lora(Matmul((70,), 66, 96, block_size=32, bias=True), F32, 64, None, 0.05),
    Lora(Matmul((33,), 130, 66), BF16, 3, None, 0.5),
    Lora(Matmul((9,), 32, 97, format="dynamic8", nested=True), F32, 4),
    Lora(Matmul((2, 5), 24, 100, nested=True, bias=True), BF16, 8, F32, 0.5),
    Lora(Matmul((), 24, 96, bias=True), F32, 4, None, 0.5),
    Lora(Matmul((0,), 16, 32, bias=True), BF16, 8, F32, 0.05),
    Lora(Matmul((2, 0, 3), 16, 32), F32, 4),
    Lora(Matmul((5,), 1, 64), F32, 8),
    Lora(Matmul((4,), 7, 1, bias=True), F16, 1),
]
LORA_LARGE = [
    Lora(Matmul((1,), 1024, 4096, nested=True), BF16, 16, F32),
    Lora(Matmul((4, 17), 1152, 4304, nested=True, bias=True), BF16, 16, F32, 0.05),
    Lora(Matmul((257,), 320, 1027, nested=True), F32, 64, None, 0.5),
    Lora(Matmul((130,), 257, 1536, block_size=1024), F16, 8, F32, 0.05),
]


def lora_params() -> list[Any]:
    """Every LoRA case as pytest parameters."""
    return [pytest.param(case, id=str(case)) for case in (*LORA_SMALL, *LORA_LARGE)]


def is_large(case: Matmul | Lora) -> bool:
    """Whether a case needs a native backend."""
    return case in LARGE or case in LORA_LARGE


def wide_shape(case: Matmul) -> Matmul:
    """The case with x flattened to two dimensions."""
    return replace(case, lead=(case.m,))


# Of lora_arguments: no multiples of a tile or a block.
N, K, R = 40, 72, 4


def lora_arguments(
    device: torch.device, dtype: torch.dtype = torch.float32, adapters: torch.dtype | None = None
) -> dict:
    """Arguments of linear_lora by name; x, bias and the adapters require gradients."""
    factory = {"dtype": dtype, "device": device}
    lora = {"dtype": adapters or dtype, "device": device}
    arguments = {
        "x": torch.randn(2, 5, K, **factory),
        "lora_a": torch.randn(R, K, **lora) * 0.1,
        "lora_b": torch.randn(N, R, **lora),
        "bias": torch.randn(N, **factory),
    }
    for t in arguments.values():
        t.requires_grad_()
    weight = torch.randn(N, K, device=device)
    return {**arguments, "q": nf4.quantize(weight), "scaling": 0.5}
