"""dequantize and dequantize_out on every backend: equal to the reference bit for bit."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from cases import DTYPES, Weight, dtype_id, op, skip_if_emulated
from torch import Tensor

from nf4 import formats
from nf4.backends import reference

FORMATS = [formats.FORMATS[name] for name in formats.WEIGHT_FORMATS]

all_formats = pytest.mark.parametrize("fmt", FORMATS, ids=lambda f: f.name)
all_dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
nesting = pytest.mark.parametrize("nested", [False, True], ids=["plain", "nested"])


def random_parts(numel: int, block_size: int, fmt: formats.Format, nested: bool) -> Weight:
    """Random bytes and random positive scales of ``numel`` elements; no real weight needed."""
    packed = torch.randint(0, 256, (fmt.packed_bytes(numel), 1), dtype=torch.uint8)
    blocks = -(-numel // block_size)
    if not nested:
        return Weight(packed, torch.rand(blocks) + 0.01, None, None)
    codes = torch.randint(0, 256, (blocks,), dtype=torch.uint8)
    nested_absmax = torch.rand(-(-blocks // formats.NESTED_BLOCK_SIZE)) + 0.01
    return Weight(packed, codes, nested_absmax, torch.rand(()) - 0.2)


def to(parts: Weight, device: torch.device) -> Weight:
    """The parts on another device."""
    return Weight(*(None if t is None else t.to(device) for t in parts))


def oracle(parts: Weight, numel: int, block_size: int, fmt: formats.Format) -> np.ndarray:
    """The float32 values, element by element, without torch."""
    raw = parts.packed.view(-1).tolist()
    scales = parts.absmax.tolist()
    f32 = np.float32
    if parts.nested_absmax is not None:
        nested = parts.nested_absmax.tolist()
        table = formats.DYNAMIC8.codes
        offset = f32(parts.offset.item())
        scales = [f32(table[c]) * f32(nested[i // 256]) + offset for i, c in enumerate(scales)]
    out = np.empty(numel, np.float32)
    for i in range(numel):
        code = raw[i] if fmt.bits == 8 else raw[i // 2] >> 4 if i % 2 == 0 else raw[i // 2] & 15
        out[i] = f32(fmt.codes[code]) * f32(scales[i // block_size])
    return out


def same_bits(a: Tensor, b: Tensor) -> bool:
    """Equal down to the sign of zero."""
    ints = {4: torch.int32, 2: torch.int16}[a.element_size()]
    return a.dtype == b.dtype and a.shape == b.shape and torch.equal(a.view(ints), b.view(ints))


def check(
    parts: Weight,
    shape: tuple[int, ...],
    block_size: int,
    fmt: formats.Format,
    dtype: torch.dtype,
    device: torch.device,
) -> None:
    """Both ops give the reference's bits, and ``out`` is written nowhere else."""
    expected = reference.dequantize(*parts, list(shape), block_size, fmt.id, dtype)
    on_device = to(parts, device)

    got = op("dequantize")(*on_device, shape, block_size, fmt.id, dtype)
    assert got.is_contiguous()
    assert same_bits(got.cpu(), expected)

    numel = math.prod(shape)
    guarded = torch.full((numel + 16,), 7.0, dtype=dtype, device=device)
    out = guarded[8 : 8 + numel].view(shape)
    assert op("dequantize_out")(*on_device, block_size, fmt.id, out) is None
    assert same_bits(out.cpu(), expected)
    assert (guarded[:8] == 7).all() and (guarded[8 + numel :] == 7).all()


@all_formats
@all_dtypes
@nesting
def test_every_byte(
    nested: bool, fmt: formats.Format, dtype: torch.dtype, backend: str, device: torch.device
) -> None:
    per_byte = 8 // fmt.bits
    parts = random_parts(256 * per_byte, 64, fmt, nested)
    parts = parts._replace(packed=torch.arange(256, dtype=torch.uint8).view(-1, 1))
    check(parts, (256 * per_byte,), 64, fmt, dtype, device)


@all_dtypes
def test_every_scale_code(dtype: torch.dtype, backend: str, device: torch.device) -> None:
    """All 256 codes of a nested scale, in two nested blocks."""
    parts = random_parts(512 * 32, 32, formats.NF4, nested=True)
    parts = parts._replace(absmax=torch.arange(512).to(torch.uint8))
    check(parts, (512, 32), 32, formats.NF4, dtype, device)


@all_formats
@all_dtypes
@nesting
@pytest.mark.parametrize("block_size", formats.BLOCK_SIZES)
def test_block_sizes(
    block_size: int,
    nested: bool,
    fmt: formats.Format,
    dtype: torch.dtype,
    backend: str,
    device: torch.device,
) -> None:
    """Two whole blocks and a short one, in two dimensions with blocks that cross rows."""
    shape = (5, block_size // 2 - 3)
    check(
        random_parts(math.prod(shape), block_size, fmt, nested),
        shape,
        block_size,
        fmt,
        dtype,
        device,
    )


@all_dtypes
@nesting
@pytest.mark.parametrize("block_size", formats.BLOCK_SIZES)
def test_whole_tile(
    block_size: int, nested: bool, dtype: torch.dtype, backend: str, device: torch.device
) -> None:
    """More than the elements that a CTA of the CUDA kernel takes."""
    for fmt in (formats.NF4, formats.FP4):
        parts = random_parts(8192 + 300, block_size, fmt, nested)
        check(parts, (8192 + 300,), block_size, fmt, dtype, device)


@all_formats
@nesting
@pytest.mark.parametrize(
    "shape", [(), (0,), (1,), (2,), (63,), (64,), (65,), (3, 0, 5), (3, 7, 11)], ids=str
)
def test_shapes(
    shape: tuple[int, ...], nested: bool, fmt: formats.Format, backend: str, device: torch.device
) -> None:
    for dtype in DTYPES:
        check(random_parts(math.prod(shape), 64, fmt, nested), shape, 64, fmt, dtype, device)


@all_formats
@all_dtypes
def test_extreme_scales(
    fmt: formats.Format, dtype: torch.dtype, backend: str, device: torch.device
) -> None:
    """Zero, denormal, negative and huge scales: IEEE products and roundings, nothing flushed."""
    scales = [
        0.0,
        -0.0,
        2.0**-149,
        1e-42,
        1e-38,
        2.0**-126,
        1e-7,
        6e-8,
        6e-5,
        -1.0,
        65504.0,
        65520.0,
    ]
    scales += [7e4, 1e30, torch.finfo(torch.float32).max, torch.finfo(torch.bfloat16).max]
    parts = random_parts(32 * len(scales), 32, fmt, nested=False)
    check(parts._replace(absmax=torch.tensor(scales)), (len(scales), 32), 32, fmt, dtype, device)


@all_formats
@all_dtypes
def test_nested_scales_round_twice(
    fmt: formats.Format, dtype: torch.dtype, backend: str, device: torch.device
) -> None:
    """A fused multiply-add of the scale would round once; 640 scales show the difference."""
    parts = random_parts(640 * 32, 32, fmt, nested=True)
    parts = parts._replace(offset=torch.tensor(0.37))
    once = torch.addcmul(
        parts.offset.double(),
        torch.from_numpy(formats.DYNAMIC8.values)[parts.absmax.long()].double(),
        parts.nested_absmax.repeat_interleave(256)[:640].double(),
    ).float()
    twice = reference._scales(*parts[1:])
    assert not torch.equal(once, twice)
    check(parts, (640, 32), 32, fmt, dtype, device)


@all_dtypes
def test_round_trip(dtype: torch.dtype, backend: str, device: torch.device) -> None:
    """Quantize, nest, and dequantize on the backend: off by half a step between codes at most."""
    x = torch.randn(48, 80).to(dtype).to(device)
    packed, absmax = op("quantize")(x, 64, formats.NF4.id)
    plain = op("dequantize")(packed, absmax, None, None, x.shape, 64, formats.NF4.id, torch.float32)
    nested = op("dequantize")(
        packed, *op("double_quantize")(absmax), x.shape, 64, formats.NF4.id, torch.float32
    )
    widest_gap = np.diff(formats.NF4.values).max().item()
    limit = absmax.repeat_interleave(64).view(x.shape) * (widest_gap / 2 + 1e-6)
    assert ((plain - x.float()).abs() <= limit).all()
    assert ((nested - plain).norm() / plain.norm()).item() < 0.02


@all_formats
@all_dtypes
@nesting
def test_large(
    nested: bool, fmt: formats.Format, dtype: torch.dtype, backend: str, device: torch.device
) -> None:
    skip_if_emulated(backend, device)
    parts = random_parts(1023 * 1537, 64, fmt, nested)
    check(parts, (1023, 1537), 64, fmt, dtype, device)


def test_inputs_are_left_alone(backend: str, device: torch.device) -> None:
    parts = to(random_parts(130, 64, formats.NF4, nested=True), device)
    before = [t.clone() for t in parts]
    op("dequantize")(*parts, (130,), 64, formats.NF4.id, torch.bfloat16)
    assert all(torch.equal(old, new) for old, new in zip(before, parts, strict=True))


@all_formats
@nesting
@pytest.mark.parametrize("numel, block_size", [(0, 64), (1, 64), (33, 32), (1000, 64), (9001, 32)])
def test_reference(numel: int, block_size: int, nested: bool, fmt: formats.Format) -> None:
    parts = random_parts(numel, block_size, fmt, nested)
    got = reference.dequantize(*parts, [numel], block_size, fmt.id, torch.float32)
    assert np.array_equal(got.numpy(), oracle(parts, numel, block_size, fmt))
    for dtype in (torch.float16, torch.bfloat16):
        rounded = reference.dequantize(*parts, [numel], block_size, fmt.id, dtype)
        assert torch.equal(rounded, got.to(dtype))
