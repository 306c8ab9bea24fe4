"""quantize on every backend: equal to the reference bit for bit; the reference to plain numpy."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from cases import DTYPES, dtype_id, op, skip_if_emulated
from torch import Tensor

from nf4 import formats
from nf4.backends import reference

FORMATS = [formats.FORMATS[name] for name in formats.WEIGHT_FORMATS]
DENORMAL = 2.0**-149

all_formats = pytest.mark.parametrize("fmt", FORMATS, ids=lambda f: f.name)
all_dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)


def oracle(x: np.ndarray, block_size: int, fmt: formats.Format) -> tuple[np.ndarray, np.ndarray]:
    """The rule of DESIGN.md, block by block, without torch and without the derived tables."""
    floor = np.float32(1e-38)
    by_value = sorted(range(len(fmt.codes)), key=lambda code: fmt.codes[code])
    middles = [
        np.float32((fmt.codes[low] + fmt.codes[high]) / 2)
        for low, high in itertools.pairwise(by_value)
    ]
    codes, absmax = [], []
    for start in range(0, x.size, block_size):
        block = x[start : start + block_size]
        largest = np.abs(block).max()
        if block.size == block_size or fmt.bits == 8:
            scaled = block * (np.float32(1) / max(largest, floor))
        else:
            largest = max(largest, floor)
            scaled = block / largest
        absmax.append(largest)
        codes += [by_value[sum(bool(v > middle) for middle in middles)] for v in scaled]
    if fmt.bits == 4:
        if len(codes) % 2:
            codes.append({"nf4": 7, "fp4": 0}[fmt.name])
        codes = [16 * first + second for first, second in zip(codes[::2], codes[1::2], strict=True)]
    return np.array(codes, np.uint8).reshape(-1, 1), np.array(absmax, np.float32)


def _ulps(values: np.ndarray, steps: int) -> np.ndarray:
    """Each value with its neighbours up to ``steps`` ulps on either side."""
    near = [values]
    for direction in (-np.inf, np.inf):
        moved = values
        for _ in range(steps):
            moved = np.nextafter(moved, np.float32(direction))
            near.append(moved)
    return np.stack(near, axis=1).reshape(-1)


def _led_by_one(values: np.ndarray, block_size: int) -> Tensor:
    """``values`` in blocks that each start with 1, so that absmax is exactly 1; whole blocks."""
    room = block_size - 1
    values = np.pad(values.astype(np.float32), (0, -values.size % room))
    blocks = values.reshape(-1, room)
    return torch.from_numpy(np.pad(blocks, ((0, 0), (1, 0)), constant_values=1.0).reshape(-1))


def thresholds(fmt: formats.Format) -> Tensor:
    """Every threshold and one ulp around it, every code, and zeros of both signs."""
    extra = np.array([0.0, -0.0, -1.0, 1e-4, -1e-4, DENORMAL, -DENORMAL], np.float32)
    return _led_by_one(np.concatenate([_ulps(fmt.thresholds, 1), fmt.values, extra]), 64)


def scaled_thresholds(fmt: formats.Format) -> Tensor:
    """Thresholds times random scales, some ulps around: here a division would round otherwise."""
    near = torch.from_numpy(_ulps(fmt.thresholds, 2))
    near = near.repeat(-(-630 // near.numel()))
    blocks = [near[start : start + 63] for start in range(0, near.numel() - 62, 63)]
    scales = [torch.rand(1).exp2() * 10.0 ** torch.randint(-6, 6, (1,)) for _ in blocks]
    return torch.cat(
        [torch.cat([torch.ones(1), b]) * s for b, s in zip(blocks, scales, strict=True)]
    )


def pairs(fmt: formats.Format) -> Tensor:
    """Values for which the packed bytes take all 256 values."""
    values = fmt.values.copy()
    if fmt.name == "fp4":
        values[8] = 1e-4  # the second zero code, which values just above zero take
    if fmt.bits == 8:
        return _led_by_one(values, 64)
    first, second = np.meshgrid(values, values, indexing="ij")
    both = np.stack([first, second], axis=2).reshape(-1)
    blocks = both.reshape(-1, 32)
    lead = np.ones((len(blocks), 32), np.float32)
    return torch.from_numpy(np.concatenate([lead, blocks], axis=1).reshape(-1))


def extremes(_: formats.Format) -> Tensor:
    """Blocks of zeros, of denormals, around the floor of absmax, of huge and of mixed values."""
    sign = torch.randint(0, 2, (64,)) * 2.0 - 1
    noise = torch.randn(64)
    largest = torch.finfo(torch.float32).max
    blocks = [
        torch.zeros(64),
        -torch.zeros(64),
        sign * DENORMAL,
        noise * 1e-42,
        noise * 1e-40,
        noise / noise.abs().max() * 1e-38,
        noise / noise.abs().max() * 1.0000001e-38,
        noise * 1.2e-38,
        torch.full((64,), 2.0**-126),
        noise / noise.abs().max() * largest,
        torch.full((64,), -largest),
        noise * 10.0 ** torch.randint(-45, 38, (64,)),
        torch.cat([torch.full((1,), 3.0), torch.zeros(63)]),
        torch.cat([torch.zeros(63), torch.full((1,), -3.0)]),
    ]
    return torch.cat(blocks)


BUILDERS = [thresholds, scaled_thresholds, pairs, extremes]


def check(x: Tensor, block_size: int, fmt: formats.Format, device: torch.device) -> None:
    """The backend's bytes and scales equal the reference's."""
    packed, absmax = op("quantize")(x.to(device), block_size, fmt.id)
    expected_packed, expected_absmax = reference.quantize(x, block_size, fmt.id)

    assert packed.dtype is torch.uint8 and absmax.dtype is torch.float32
    assert packed.shape == (fmt.packed_bytes(x.numel()), 1)
    assert absmax.shape == (-(-x.numel() // block_size),)
    assert torch.equal(absmax.cpu(), expected_absmax)
    wrong = (packed.cpu() != expected_packed).nonzero()
    assert wrong.numel() == 0, (
        f"{len(wrong)} bytes differ, first byte {wrong[0, 0]}: "
        f"{packed[wrong[0, 0], 0]:#x}, not {expected_packed[wrong[0, 0], 0]:#x}"
    )


def check_oracle(x: Tensor, block_size: int, fmt: formats.Format) -> None:
    """The reference's bytes and scales equal numpy's."""
    packed, absmax = reference.quantize(x, block_size, fmt.id)
    expected_packed, expected_absmax = oracle(x.float().reshape(-1).numpy(), block_size, fmt)
    assert np.array_equal(absmax.numpy(), expected_absmax)
    assert np.array_equal(packed.numpy(), expected_packed)


@all_formats
@all_dtypes
@pytest.mark.parametrize("builder", BUILDERS, ids=lambda b: b.__name__)
def test_special_values(
    builder, fmt: formats.Format, dtype: torch.dtype, backend: str, device: torch.device
) -> None:
    x = builder(fmt).to(dtype)
    x = x[x.isfinite()][: x.numel() - x.numel() % 64]  # fp16 makes the huge ones infinite
    check(x, 64, fmt, device)


@all_formats
@all_dtypes
@pytest.mark.parametrize("block_size", formats.BLOCK_SIZES)
def test_block_sizes(
    block_size: int, fmt: formats.Format, dtype: torch.dtype, backend: str, device: torch.device
) -> None:
    """Two whole blocks and a short one, in two dimensions with blocks that cross rows."""
    check(torch.randn(5, block_size // 2 - 3, dtype=dtype), block_size, fmt, device)


@all_formats
@all_dtypes
@pytest.mark.parametrize(
    "shape", [(), (0,), (1,), (2,), (63,), (64,), (65,), (3, 0, 5), (3, 7, 11)], ids=str
)
def test_shapes(
    shape: tuple[int, ...],
    fmt: formats.Format,
    dtype: torch.dtype,
    backend: str,
    device: torch.device,
) -> None:
    check(torch.randn(shape, dtype=dtype), 64, fmt, device)


@all_formats
@pytest.mark.parametrize(
    "tail", [[0.0], [-0.0, 0.0], [DENORMAL] * 3, [1e-38, -5e-39, 2e-39], [3e38]]
)
def test_short_last_block(
    tail: list[float], fmt: formats.Format, backend: str, device: torch.device
) -> None:
    """A short last block of a 4-bit format divides, and stores the floor where it is larger."""
    check(torch.tensor(tail), 32, fmt, device)
    check(torch.cat([torch.randn(64), torch.tensor(tail)]), 32, fmt, device)


@all_formats
def test_short_last_block_divides(fmt: formats.Format, backend: str, device: torch.device) -> None:
    """Values for which ``x * (1 / absmax)`` would take another code than ``x / absmax``."""
    for scale in torch.rand(8).exp2() * 10.0 ** torch.randint(-3, 3, (8,)):
        values = torch.from_numpy(_ulps(fmt.thresholds, 2)) * scale
        check(torch.cat([scale.reshape(1), values]), 4096, fmt, device)


@all_formats
@all_dtypes
def test_strided(
    fmt: formats.Format, dtype: torch.dtype, backend: str, device: torch.device
) -> None:
    x = torch.randn(48, 70, dtype=dtype).to(device)
    for view in (
        x.t(),
        x[:, 1::2],
        x[3:],
        x[0, 0].expand(5, 13),
        x.view(4, 12, 70).permute(2, 0, 1),
    ):
        got = op("quantize")(view, 64, fmt.id)
        expected = reference.quantize(view.cpu().contiguous(), 64, fmt.id)
        assert all(torch.equal(g.cpu(), e) for g, e in zip(got, expected, strict=True))


@all_formats
@all_dtypes
@pytest.mark.parametrize("block_size", [32, 64, 128, 256])
def test_whole_tile(
    block_size: int, fmt: formats.Format, dtype: torch.dtype, backend: str, device: torch.device
) -> None:
    """More than the 8192 elements that a CTA of the CUDA kernel takes, and a NaN in one block."""
    x = torch.randn(8192 + 300) * torch.randn(8192 + 300).exp2()
    check(x.to(dtype), block_size, fmt, device)
    x[5000] = math.nan
    absmax = op("quantize")(x.to(device, dtype), block_size, fmt.id)[1].cpu()
    assert absmax.isnan().nonzero().tolist() == [[5000 // block_size]]


@all_formats
@all_dtypes
def test_large(fmt: formats.Format, dtype: torch.dtype, backend: str, device: torch.device) -> None:
    skip_if_emulated(backend, device)
    check(torch.randn(1023, 1537, dtype=dtype) * 0.02, 64, fmt, device)


@all_formats
@all_dtypes
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf], ids=str)
def test_non_finite_blocks_are_visible(
    bad: float, fmt: formats.Format, dtype: torch.dtype, backend: str, device: torch.device
) -> None:
    """absmax shows NaN and infinity (nf4.functional refuses by it), and no other block changes."""
    x = torch.randn(5 * 64 + 3, dtype=dtype)
    clean_packed, clean_absmax = reference.quantize(x, 64, fmt.id)
    for block, position in ((1, 64), (3, 255), (5, 322)):
        dirty = x.clone()
        dirty[position] = bad
        packed, absmax = (t.cpu() for t in op("quantize")(dirty.to(device), 64, fmt.id))
        others = torch.arange(6) != block
        assert torch.equal(absmax[others], clean_absmax[others])
        assert absmax[block].isnan() if math.isnan(bad) else absmax[block] == math.inf
        untouched = torch.ones(packed.numel(), dtype=torch.bool)
        untouched[block * 8 * fmt.bits : (block + 1) * 8 * fmt.bits] = False
        assert torch.equal(packed.view(-1)[untouched], clean_packed.view(-1)[untouched])
    both = torch.randn(64, dtype=dtype)
    both[3], both[40] = math.inf, math.nan
    assert op("quantize")(both.to(device), 64, fmt.id)[1].isnan().all()


@all_formats
@all_dtypes
def test_misaligned(
    fmt: formats.Format, dtype: torch.dtype, backend: str, device: torch.device
) -> None:
    """Begins one element past an address that wide loads could take."""
    x = torch.randn(1029, dtype=dtype).to(device)[1:]
    packed, absmax = op("quantize")(x, 64, fmt.id)
    expected = reference.quantize(x.cpu(), 64, fmt.id)
    assert torch.equal(packed.cpu(), expected[0]) and torch.equal(absmax.cpu(), expected[1])


def test_input_is_left_alone(backend: str, device: torch.device) -> None:
    x = torch.randn(130, device=device)
    before = x.clone()
    op("quantize")(x, 64, formats.NF4.id)
    assert torch.equal(x, before)


@all_formats
def test_pairs_cover_every_byte(fmt: formats.Format) -> None:
    packed, _ = reference.quantize(pairs(fmt), 64, fmt.id)
    assert set(packed.view(-1).tolist()) == set(range(256))


@all_formats
@pytest.mark.parametrize("builder", BUILDERS, ids=lambda b: b.__name__)
def test_reference_special_values(builder, fmt: formats.Format) -> None:
    check_oracle(builder(fmt), 64, fmt)


@all_formats
@all_dtypes
@pytest.mark.parametrize("block_size", [32, 64, 256])
@pytest.mark.parametrize("count", [0, 1, 31, 64, 1029])
def test_reference_random(
    count: int, block_size: int, fmt: formats.Format, dtype: torch.dtype
) -> None:
    check_oracle(torch.randn(count, dtype=dtype), block_size, fmt)
    check_oracle(torch.zeros(count, dtype=dtype), block_size, fmt)


@all_formats
def test_reference_short_last_block(fmt: formats.Format) -> None:
    for scale in torch.rand(4).exp2() * 10.0 ** torch.randint(-3, 3, (4,)):
        values = torch.from_numpy(_ulps(fmt.thresholds, 2)) * scale
        check_oracle(torch.cat([scale.reshape(1), values]), 4096, fmt)


@all_formats
def test_tie_takes_the_lower_value(fmt: formats.Format) -> None:
    """Spelled out once: at a threshold the lower code, one ulp above it the higher."""
    for rank, threshold in enumerate(fmt.thresholds):
        above = np.nextafter(threshold, np.float32(np.inf))
        packed, _ = reference.quantize(torch.tensor([1.0, threshold, 1.0, above]), 4, fmt.id)
        codes = packed.view(-1).tolist()
        at, over = (codes[1], codes[3]) if fmt.bits == 8 else (codes[0] & 15, codes[1] & 15)
        assert (at, over) == (fmt.order[rank], fmt.order[rank + 1])


def test_zero_block_codes() -> None:
    """A zero block gives code 7 (nf4), 0 (fp4); a short one stores the floor as its scale."""
    for fmt, byte in ((formats.NF4, 0x77), (formats.FP4, 0x00)):
        packed, absmax = reference.quantize(torch.zeros(65), 64, fmt.id)
        assert packed.view(-1).tolist() == [byte] * 33
        assert absmax.tolist() == [0.0, np.float32(1e-38)]
