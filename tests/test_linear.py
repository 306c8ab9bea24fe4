"""linear and linear_backward on every backend, against float64 through the dequantized weight."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from cases import (
    DTYPES,
    ROUNDING,
    Matmul,
    dtype_id,
    is_large,
    matmul_params,
    op,
    skip_if_emulated,
)
from numerics import assert_accurate

import nf4

matmuls = pytest.mark.parametrize("case, dtype", matmul_params())
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)


@matmuls
def test_forward(case: Matmul, dtype: torch.dtype, backend: str, device: torch.device) -> None:
    if is_large(case):
        skip_if_emulated(backend, device)
    weight, dense = case.weight(device)
    x = torch.randn(*case.lead, case.k, dtype=dtype, device=device)
    bias = torch.randn(case.n, dtype=dtype, device=device) if case.bias else None

    y = op("linear")(x, *weight, bias, case.n, case.block_size, case.format_id)

    assert y.dtype is dtype
    assert y.is_contiguous()
    wide_bias = None if bias is None else bias.double()
    square_bias = None if bias is None else bias.double().square()
    assert_accurate(
        "y",
        y,
        baseline=F.linear(x, dense.to(dtype), bias),
        exact=F.linear(x.double(), dense.double(), wide_bias),
        energy=F.linear(x.double().square(), dense.double().square(), square_bias),
        dtype=dtype,
        terms=case.k,
        samples=case.n * min(case.m, case.k),
    )


@matmuls
def test_backward(case: Matmul, dtype: torch.dtype, backend: str, device: torch.device) -> None:
    if is_large(case):
        skip_if_emulated(backend, device)
    weight, dense = case.weight(device)
    grad_y = torch.randn(*case.lead, case.n, dtype=dtype, device=device)

    dx = op("linear_backward")(grad_y, *weight, case.k, case.block_size, case.format_id)

    assert dx.dtype is dtype
    assert dx.is_contiguous()
    assert_accurate(
        "dx",
        dx,
        baseline=grad_y @ dense.to(dtype),
        exact=grad_y.double() @ dense.double(),
        energy=grad_y.double().square() @ dense.double().square(),
        dtype=dtype,
        terms=case.n,
        # A block of a 4-bit weight has 16 values, which round independently.
        samples=min(case.k * min(case.m, case.n), 16 * -(-case.n * case.k // case.block_size)),
    )


@dtypes
@pytest.mark.parametrize("m, block_size", [(1, 64), (2, 128), (3, 64), (4, 128), (13, 64)])
def test_rows_of_many_segments(
    m: int, block_size: int, dtype: torch.dtype, backend: str, device: torch.device
) -> None:
    """Rows longer than what a kernel takes at once of each."""
    skip_if_emulated(backend, device)
    case = Matmul((m,), 6, 17_024, block_size=block_size, nested=True)
    weight, dense = case.weight(device)
    x = torch.randn(m, case.k, dtype=dtype, device=device)

    y = op("linear")(x, *weight, None, case.n, block_size, case.format_id)

    exact = F.linear(x.double(), dense.double())
    error = torch.linalg.vector_norm(y.double() - exact) / torch.linalg.vector_norm(exact)
    assert error <= max(1e-5, 2 * ROUNDING[dtype])


@dtypes
@pytest.mark.parametrize("nested", [False, True], ids=["plain", "nested"])
def test_every_weight_is_read_once(
    dtype: torch.dtype, nested: bool, backend: str, device: torch.device
) -> None:
    """Rows of the identity give back single weights, so that no error hides in a sum."""
    case = Matmul((75,), 37, 75, block_size=32, nested=nested)
    weight, dense = case.weight(device)
    layout = (case.block_size, case.format_id)
    eye_k = torch.eye(case.k, dtype=dtype, device=device)
    eye_n = torch.eye(case.n, dtype=dtype, device=device)

    columns = op("linear")(eye_k, *weight, None, case.n, *layout).t()
    rows = op("linear_backward")(eye_n, *weight, case.k, *layout)

    # Two roundings to the dtype (the code and the product with its scale), or fewer.
    tolerance = dense.abs().double() * (2.1 * ROUNDING[dtype])
    for got in (columns, rows):
        assert ((got.double() - dense.double()).abs() <= tolerance).all()


@dtypes
def test_strided_inputs(dtype: torch.dtype, backend: str, device: torch.device) -> None:
    case = Matmul((6,), 40, 72, nested=True)
    weight, _ = case.weight(device)
    layout = (case.block_size, case.format_id)
    x = torch.randn(case.k, 12, dtype=dtype, device=device).t()[::2]
    bias = torch.randn(2 * case.n, dtype=dtype, device=device)[::2]
    grad_y = torch.randn(1, 1, dtype=dtype, device=device).expand(6, case.n)
    assert not x.is_contiguous() and not bias.is_contiguous() and not grad_y.is_contiguous()

    y = op("linear")(x, *weight, bias, case.n, *layout)
    dx = op("linear_backward")(grad_y, *weight, case.k, *layout)

    tolerance = max(1e-4, 4 * ROUNDING[dtype])
    plain_y = op("linear")(x.contiguous(), *weight, bias.contiguous(), case.n, *layout)
    plain_dx = op("linear_backward")(grad_y.contiguous(), *weight, case.k, *layout)
    torch.testing.assert_close(y, plain_y, rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(dx, plain_dx, rtol=tolerance, atol=tolerance)


@dtypes
@pytest.mark.parametrize("k", [1088, 1280])
@pytest.mark.parametrize("m", [1, 8, 70])
def test_two_runs_are_equal(
    m: int, k: int, dtype: torch.dtype, backend: str, device: torch.device
) -> None:
    case = Matmul((m,), 48, k, nested=True, bias=True)
    weight, _ = case.weight(device)
    layout = (case.block_size, case.format_id)
    x = torch.randn(m, case.k, dtype=dtype, device=device)
    grad_y = torch.randn(m, case.n, dtype=dtype, device=device)

    y = [op("linear")(x, *weight, None, case.n, *layout) for _ in range(2)]
    dx = [op("linear_backward")(grad_y, *weight, case.k, *layout) for _ in range(2)]

    assert torch.equal(*y)
    assert torch.equal(*dx)


def test_inputs_are_left_alone(backend: str, device: torch.device) -> None:
    case = Matmul((5,), 40, 72, nested=True, bias=True)
    weight, _ = case.weight(device)
    x = torch.randn(5, case.k, device=device)
    bias = torch.randn(case.n, device=device)
    before = [t.clone() for t in (x, bias, *weight)]

    op("linear")(x, *weight, bias, case.n, case.block_size, case.format_id)
    op("linear_backward")(x[:, :40], *weight, case.k, case.block_size, case.format_id)

    for old, new in zip(before, (x, bias, *weight), strict=True):
        assert torch.equal(old, new)


@pytest.mark.parametrize("rows", [1, 2, 3])
@pytest.mark.parametrize("k", [64, 192, 320])
def test_nan_of_an_earlier_call_does_not_stay(
    k: int, rows: int, backend: str, device: torch.device
) -> None:
    """A chunk that a short row does not fill once read a stale scale, and 0 * NaN is NaN."""
    spoiled = nf4.quantize(torch.randn(16, 1024, device=device), double_quant=False)
    spoiled.absmax.fill_(float("nan"))
    q = nf4.quantize(torch.randn(16, k, device=device))
    for dtype in (torch.float32, torch.bfloat16):
        nf4.linear(torch.randn(rows, 1024, dtype=dtype, device=device), spoiled)
        y = nf4.linear(torch.randn(rows, k, dtype=dtype, device=device), q)
        assert torch.isfinite(y).all()
