"""Shapes that reach every tile of the CUDA matmul kernels, beyond the shapes all backends share.

Run by test_cuda_emulated.py on a CPU and directly on a GPU: several tiles in each direction, more
and fewer tiles than CTAs, ragged tokens and features, each kernel that a number of tokens picks.
"""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from cases import Lora, Matmul, op
from numerics import assert_accurate
from test_linear_lora import Bound, Expected, Inputs

import nf4

BF16, F16, F32 = torch.bfloat16, torch.float16, torch.float32
SHAPES = [
    Matmul((1,), 392, 576, nested=True, bias=True),
    Matmul((7,), 137, 320, block_size=128),
    Matmul((13,), 264, 704, nested=True),
    # Few tokens and whole units of 256 elements (linear_few.cu): fewer and more units than warps,
    # more tiles than CTAs, ragged rows and tokens, both numbers of token tiles.
    Matmul((1,), 130, 512, nested=True, bias=True),
    Matmul((8,), 55, 1280, block_size=256, format="fp4"),
    Matmul((3,), 33, 4608, nested=True),
    Matmul((9,), 200, 768, nested=True, bias=True),
    Matmul((16,), 47, 4352),
    Matmul((29,), 136, 448, block_size=4096, nested=True),
    Matmul((52,), 264, 320, format="fp4", bias=True),
    Matmul((131,), 144, 256, nested=True, bias=True),
    Matmul((270,), 392, 128, nested=True),
    Matmul((140,), 33, 640),
    # On Hopper (device 90), where more than 64 tokens go to hopper_tile.cu: several tiles in both
    # directions; weights that are dequantized first for their block size, k, format, and for m.
    Matmul((517,), 270, 192, block_size=128, format="fp4", nested=True),
    Matmul((300,), 250, 64, bias=True),
    Matmul((90,), 150, 520, block_size=32, nested=True, bias=True),
    Matmul((258,), 77, 72, format="dynamic8", nested=True),
    Matmul((2310,), 24, 64),
    # So many steps that several CTAs share the only tile.
    Matmul((200,), 24, 4096, nested=True),
    # dx on Hopper: from 256 tokens on, and earlier where no other tensor-core kernel takes it;
    # several tiles in both directions, a ragged end of tokens, n and k.
    Matmul((257,), 136, 576, nested=True),
    Matmul((70,), 200, 328, block_size=32),
]


@pytest.fixture(autouse=True)
def _cuda() -> None:
    status = nf4.available_backends()["cuda"]
    if not status:
        pytest.skip(f"backend cuda: {status.reason}")


@pytest.fixture
def cuda_device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.mark.parametrize("dtype", [BF16, F16], ids=["bfloat16", "float16"])
@pytest.mark.parametrize("case", SHAPES, ids=str)
def test_cuda_linear(case: Matmul, dtype: torch.dtype, cuda_device: torch.device) -> None:
    weight, dense = case.weight(cuda_device)
    x = torch.randn(case.m, case.k, dtype=dtype, device=cuda_device)
    bias = torch.randn(case.n, dtype=dtype, device=cuda_device) if case.bias else None
    grad_y = torch.randn(case.m, case.n, dtype=dtype, device=cuda_device)
    layout = (case.block_size, case.format_id)
    with nf4.use_backend("cuda"):
        y = op("linear")(x, *weight, bias, case.n, *layout)
        dx = op("linear_backward")(grad_y, *weight, case.k, *layout)
    wide = None if bias is None else bias.double()
    assert_accurate(
        "y",
        y,
        baseline=F.linear(x, dense.to(dtype), bias),
        exact=F.linear(x.double(), dense.double(), wide),
        energy=F.linear(
            x.double().square(), dense.double().square(), None if wide is None else wide.square()
        ),
        dtype=dtype,
        terms=case.k,
        samples=case.n * min(case.m, case.k),
    )
    assert_accurate(
        "dx",
        dx,
        baseline=grad_y @ dense.to(dtype),
        exact=grad_y.double() @ dense.double(),
        energy=grad_y.double().square() @ dense.double().square(),
        dtype=dtype,
        terms=case.n,
        samples=case.k * min(case.m, case.n),
    )


LORAS = [
    Lora(Matmul((3,), 136, 320, nested=True, bias=True), BF16, 16, F32, 0.1),
    Lora(Matmul((2,), 100, 768, nested=True, bias=True), BF16, 16, F32, 0.1),
    Lora(Matmul((12,), 70, 512), F16, 40, None, 0.0),
    Lora(Matmul((40,), 264, 192, nested=True), F16, 24, None, 0.5),
    Lora(Matmul((150,), 136, 320, bias=True), BF16, 7, None, 0.0),
    Lora(Matmul((130,), 64, 576, nested=True), BF16, 64, F32, 0.05),
    Lora(Matmul((150,), 40, 80, format="dynamic8", bias=True), F16, 17, F32, 0.1),
    Lora(Matmul((515,), 135, 128, nested=True), BF16, 40, BF16, 0.0),
    # The pass over grad_y and x: several column blocks and runs of tokens, two groups of ranks, a
    # ragged end of each; n % 8 != 0 takes float32 for grad_y and tensor cores for x.
    Lora(Matmul((300,), 520, 320), BF16, 33, F32, 0.1),
    Lora(Matmul((129,), 36, 264, block_size=32), F16, 5, None, 0.3),
    # dx on Hopper with the adapter's ranks first: one step and several, masked.
    Lora(Matmul((260,), 64, 320), BF16, 8, None, 0.1),
    Lora(Matmul((258,), 72, 264, nested=True), F16, 72, F32, 0.3),
    # So many steps that several CTAs share the only tile.
    Lora(Matmul((66,), 6000, 40, block_size=32), BF16, 16, F32, 0.2),
]


def test_cuda_dx_of_a_shared_tile_is_deterministic(cuda_device: torch.device) -> None:
    case = LORAS[-1].base
    weight, _ = case.weight(cuda_device)
    grad_y = torch.randn(case.m, case.n, dtype=BF16, device=cuda_device)
    with nf4.use_backend("cuda"):
        dx = [
            op("linear_backward")(grad_y, *weight, case.k, case.block_size, case.format_id)
            for _ in range(2)
        ]
    assert torch.equal(*dx)


@pytest.mark.parametrize("case", LORAS, ids=str)
def test_cuda_linear_lora(case: Lora, cuda_device: torch.device) -> None:
    i = Inputs.random(case, cuda_device)
    m, n, k, r = case.base.m, case.base.n, case.base.k, case.r
    bound = Bound(i)
    with nf4.use_backend("cuda"):
        y, s = i.forward()
        dx, da, db = i.backward(bound.exact.s.float())
    bound.check("s", s, samples=r * min(m, k), terms=k)
    bound.check("y", y, samples=min(m * r, n * min(m, k)), terms=k)
    bound.check("dx", dx, samples=min(m * r, k * min(m, n)), terms=n)
    bound.check("da", da, samples=r * min(m, k), terms=max(m, n))
    bound.check("db", db, samples=r * min(m, n), terms=max(m, k))


@pytest.mark.parametrize("dtype", [BF16, F16], ids=["bfloat16", "float16"])
def test_cuda_float32_adapters_are_not_rounded(
    dtype: torch.dtype, cuda_device: torch.device
) -> None:
    """A, B, S and dS enter their products in two 16-bit parts each, finer than the shared bound."""
    i = Inputs.random(Lora(Matmul((300,), 520, 320), dtype, 33, F32), cuda_device)
    exact = Expected.of(i, torch.float64)
    with nf4.use_backend("cuda"):
        _, s = i.forward()
        _, da, db = i.backward(exact.s.float())
    for name, got in {"s": s, "da": da, "db": db}.items():
        wanted = getattr(exact, name)
        error = ((got.double() - wanted).norm() / wanted.norm()).item()
        assert error < 2.0**-14, f"{name}: relative error {error:.1e}"
