"""double_quantize on every backend: equal to the reference bit for bit; the reference to numpy."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from cases import op, skip_if_emulated
from torch import Tensor

from nf4 import formats
from nf4.backends import reference

COUNTS = [0, 1, 2, 3, 255, 256, 257, 511, 513, 1300]
TABLE = formats.DYNAMIC8.values


def offset_oracle(absmax: Tensor) -> np.float32:
    """The float64 sum of chunks of 256 in index order, the chunks in order, by Python floats."""
    values = absmax.tolist()
    total = 0.0
    for start in range(0, len(values), 256):
        chunk = 0.0
        for value in values[start : start + 256]:
            chunk += value
        total += chunk
    return np.float32(total / max(len(values), 1))


def oracle(absmax: Tensor) -> tuple[np.ndarray, np.ndarray, np.float32]:
    """The rule of DESIGN.md by numpy, a block at a time."""
    offset = offset_oracle(absmax)
    centred = absmax.numpy() - offset
    wide = TABLE.astype(np.float64)
    middles = ((wide[:-1] + wide[1:]) / 2).astype(np.float32)
    codes, nested = [], []
    for start in range(0, centred.size, 256):
        block = centred[start : start + 256]
        largest = np.abs(block).max()
        scaled = block * (np.float32(1) / max(largest, np.float32(1e-38)))
        nested.append(largest)
        codes += (scaled[:, None] > middles).sum(axis=1).tolist()
    return np.array(codes, np.uint8), np.array(nested, np.float32), offset


def check(absmax: Tensor, device: torch.device) -> None:
    """The backend's codes, scales and offset equal the reference's."""
    got = op("double_quantize")(absmax.to(device))
    expected = reference.double_quantize(absmax)
    assert [t.dtype for t in got] == [torch.uint8, torch.float32, torch.float32]
    assert got[0].shape == absmax.shape
    assert got[1].shape == (-(-absmax.numel() // 256),)
    assert got[2].shape == ()
    for name, ours, theirs in zip(
        ("offset", "nested_absmax", "codes"), got[::-1], expected[::-1], strict=True
    ):
        assert torch.equal(ours.cpu(), theirs), name


@pytest.mark.parametrize("count", COUNTS)
def test_random(count: int, backend: str, device: torch.device) -> None:
    check(torch.randn(count).abs() * 0.03, device)
    check(torch.rand(count) * 10.0 ** torch.randint(-20, 20, (count,)), device)


@pytest.mark.parametrize("count", COUNTS[1:])
def test_equal_scales(count: int, backend: str, device: torch.device) -> None:
    """Constant scales leave zero, or a rounding error, for the nested blocks."""
    check(torch.zeros(count), device)
    check(torch.full((count,), 0.1), device)
    check(torch.full((count,), 2.0**-149), device)


def test_large(backend: str, device: torch.device) -> None:
    skip_if_emulated(backend, device)
    check(torch.randn(300_001).abs() * 0.03, device)


def test_every_code_and_tie(backend: str, device: torch.device) -> None:
    """Values with their negatives, so that the offset is 0, in blocks led by 1 and -1."""
    middles = torch.from_numpy(formats.DYNAMIC8.thresholds.copy())
    infinity = torch.tensor(math.inf)
    for near in (
        middles,
        middles.nextafter(infinity),
        middles.nextafter(-infinity),
        torch.from_numpy(TABLE.copy()),
    ):
        ones = torch.ones(-(-near.numel() // 127), 1)
        blocks = torch.nn.functional.pad(near, (0, -near.numel() % 127)).view(-1, 127)
        values = torch.cat([ones, blocks], dim=1)
        absmax = torch.stack([values, -values], dim=2).view(-1)
        assert reference.double_quantize(absmax)[2] == 0
        check(absmax, device)


def test_sum_is_taken_in_order(backend: str, device: torch.device) -> None:
    """Huge values that cancel, within a chunk and across chunks: another order finds another
    mean. (Real scales are never negative; without a sign fp32 would hide the difference.)"""
    absmax = torch.rand(3 * 256 + 17)
    absmax[3], absmax[200] = 1e17, -1e17
    absmax[300], absmax[600] = 3e17, -3e17
    offset = reference.double_quantize(absmax)[2].item()
    assert offset != np.float32(math.fsum(absmax.tolist()) / absmax.numel())
    assert offset != np.float32(absmax.double().mean().item())
    check(absmax, device)


@pytest.mark.parametrize("stride", [1, 256], ids=["within a chunk", "across chunks"])
def test_what_is_added_in_order_and_lost(stride: int, backend: str, device: torch.device) -> None:
    """1 + 2^-24 lies midway between two float32. Each later scale alone is too small to be seen
    beside it; added up first, they would lift the mean over the middle."""
    absmax = torch.zeros(64 * 256)
    absmax[: 256 if stride == 1 else None : stride] = 2.0**-54
    absmax[0], absmax[1] = 1, 2.0**-24
    assert reference.double_quantize(absmax)[2] * absmax.numel() == 1
    assert np.float32(math.fsum(absmax.tolist())) > 1
    check(absmax, device)


def test_sums_that_just_round(backend: str, device: torch.device) -> None:
    """Sums whose exactness hangs on one small scale: added in order, each loses another bit."""
    for exponent in (-26, -29, -30, -31, -40, -149):
        absmax = torch.rand(5 * 256) + 0.5
        absmax[torch.randint(0, absmax.numel(), (40,))] = 3 * 2.0**exponent
        check(absmax, device)
        check(absmax.bfloat16().float(), device)
    for value in (math.nan, math.inf):
        absmax[700] = value
        got = [t.cpu() for t in op("double_quantize")(absmax.to(device))]
        assert got[2].isnan() if math.isnan(value) else got[2] == math.inf


def test_strided(backend: str, device: torch.device) -> None:
    absmax = torch.rand(600)
    got = op("double_quantize")(absmax.to(device)[::2])
    expected = reference.double_quantize(absmax[::2].contiguous())
    assert all(torch.equal(g.cpu(), e) for g, e in zip(got, expected, strict=True))


def test_input_is_left_alone(backend: str, device: torch.device) -> None:
    absmax = torch.rand(300, device=device)
    before = absmax.clone()
    op("double_quantize")(absmax)
    assert torch.equal(absmax, before)


@pytest.mark.parametrize("count", COUNTS)
def test_reference(count: int) -> None:
    for absmax in (torch.randn(count).abs() * 0.03, torch.zeros(count), torch.rand(count) * 1e30):
        codes, nested, offset = reference.double_quantize(absmax)
        expected_codes, expected_nested, expected_offset = oracle(absmax)
        assert offset.item() == expected_offset
        assert np.array_equal(nested.numpy(), expected_nested)
        assert np.array_equal(codes.numpy(), expected_codes)


def test_reference_takes_the_nearest_code() -> None:
    """Against exact arithmetic: no other code is nearer by more than the roundings of the scale."""
    absmax = torch.randn(100_000).abs() * 0.03
    codes, nested, offset = reference.double_quantize(absmax)
    exact = (absmax - offset).double() / nested.double().repeat_interleave(256)[: absmax.numel()]
    table = torch.from_numpy(TABLE).double()
    rank = torch.bucketize(exact, (table[1:] + table[:-1]) / 2)
    distance = (table[codes.long()] - exact).abs()
    assert (distance <= (table[rank] - exact).abs() + 2.0**-22).all()
    assert (codes.long() != rank).sum() <= 5
