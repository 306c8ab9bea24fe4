"""Against bitsandbytes itself: equal bytes in both directions, every difference explained."""

from __future__ import annotations

from fractions import Fraction

import numpy as np
import pytest
import torch
from cases import DTYPES, ROUNDING, dtype_id, emulated, op
from torch import Tensor

import nf4
from nf4 import formats
from nf4.backends import reference

pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")

from bitsandbytes import functional as bnb

# Pivots of bitsandbytes' CUDA rule (its csrc/kernels.cu: dQuantizeNF4, dQuantizeFP4), as written.
CUDA_NF4 = """
-0.8480964004993439 -0.6106329262256622 -0.4599952697753906 -0.33967943489551544
-0.23460740596055984 -0.13791173323988914 -0.045525018125772476 0.03979014977812767
0.1202552504837513 0.2035212516784668 0.2920137718319893 0.3893125355243683
0.5016634166240692 0.6427869200706482 0.8614784181118011
"""
CUDA_FP4 = "0.00260417 0.0859375 0.20833333 0.29166667 0.4166667 0.583333 0.8333333"


def float_literals(text: str) -> np.ndarray:
    """Decimals as a C++ compiler reads them with the suffix f: rounded once, not by way of double.

    The exact midpoint of two codes can be a tie between two floats, which 16 digits miss.
    """
    values = []
    for decimal in text.split():
        near = np.float32(decimal)
        around = (near, *(np.nextafter(near, np.float32(s * np.inf)) for s in (-1, 1)))
        exact = Fraction(decimal)
        values.append(min(around, key=lambda v: abs(Fraction(float(v)) - exact)))
    return np.array(values, np.float32)


four_bits = pytest.mark.parametrize("fmt", [formats.NF4, formats.FP4], ids=lambda f: f.name)
all_dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)


def draw(choices: tuple) -> object:
    """One of ``choices``."""
    return choices[int(torch.randint(len(choices), ()))]


def random_weight(dtype: torch.dtype, largest: int) -> Tensor:
    """A matrix of random shape whose rows have scales of many sizes, some of them zero."""
    rows, columns = (int(torch.randint(1, largest, ())) for _ in range(2))
    scale = 10.0 ** torch.randint(-4, 3, (rows, 1))
    scale[torch.rand(rows) < 0.1] = 0
    return (torch.randn(rows, columns) * scale).to(dtype)


@four_bits
@all_dtypes
def test_quantized_bytes_are_equal(
    fmt: formats.Format, dtype: torch.dtype, backend: str, device: torch.device
) -> None:
    slow = emulated(backend, device)
    for block_size in formats.BLOCK_SIZES:
        for _ in range(1 if slow else 4):
            x = random_weight(dtype, 40 if slow else 300)
            packed, absmax = op("quantize")(x.to(device), block_size, fmt.id)
            theirs, state = bnb.quantize_4bit(x, blocksize=block_size, quant_type=fmt.name)
            assert torch.equal(absmax.cpu(), state.absmax), (x.shape, block_size)
            assert torch.equal(packed.cpu(), theirs), (x.shape, block_size)


@four_bits
@all_dtypes
@pytest.mark.parametrize("nested", [False, True], ids=["plain", "nested"])
def test_dequantized_values_are_equal(
    fmt: formats.Format, dtype: torch.dtype, nested: bool, backend: str, device: torch.device
) -> None:
    """From bitsandbytes' own bytes and statistics, by its kernels for the device. Where values
    differ, float64 decides who is right. Its AVX-512 path takes the scales of other blocks when a
    row is no whole number of blocks, and on some CPUs its float16 differs in the last bit."""
    slow = emulated(backend, device)
    for block_size in formats.BLOCK_SIZES:
        aligned = torch.randn(3, 2 * block_size if not slow else block_size).to(dtype)
        for x in (aligned, random_weight(dtype, 40 if slow else 300)):
            theirs, state = bnb.quantize_4bit(
                x, blocksize=block_size, quant_type=fmt.name, compress_statistics=nested
            )
            weight = (theirs, state.absmax, *([None] * 2))
            if nested:
                weight = (theirs, state.absmax, state.state2.absmax, state.offset)
            on_device = [None if t is None else t.to(device) for t in weight]
            ours = op("dequantize")(*on_device, x.shape, block_size, fmt.id, dtype).cpu()

            scales = reference._scales(*weight[1:]).double()
            raw = torch.stack([theirs.view(-1) >> 4, theirs.view(-1) & 15], 1).view(-1)[: x.numel()]
            codes = torch.from_numpy(fmt.values)[raw.long()].double()
            exact = (codes * scales.repeat_interleave(block_size)[: x.numel()]).view(x.shape)
            # One rounding of the product, one to the dtype; the last term is fp16's subnormals.
            limit = exact.abs() * (ROUNDING[dtype] + 2.0**-23) + 2.0**-25
            assert ((ours.double() - exact).abs() <= limit).all()

            state.to(device)
            # For odd rows it compiles a fallback, half a minute each; eager gives the same numbers.
            with torch.compiler.set_stance("force_eager"):
                values = bnb.dequantize_4bit(theirs.to(device), state).cpu()
            differ = values != ours
            if not differ.any():
                continue
            case = f"{list(x.shape)} in blocks of {block_size}"
            off = (values.double() - exact).abs()
            if device.type == "cuda" or x.shape[1] % block_size == 0:
                assert dtype is torch.float16 and (off <= limit).all(), case
            product = exact.abs() * 2.0**-24  # rounded to float32 before it is rounded again
            assert ((ours.double() - exact).abs() <= off + 2 * product)[differ].all(), case


@pytest.mark.parametrize("count", [1, 256, 1000, 200_000])
def test_nested_codes_are_the_nearest(count: int, backend: str, device: torch.device) -> None:
    """bitsandbytes' CPU kernel looks codes up in a uniform table of 65536 bins, which misses the
    nearest one in about 0.15 % of cases; scales are equal."""
    if emulated(backend, device) and count > 1000:
        pytest.skip(f"backend {backend}: a large count needs a GPU, here it is emulated")
    absmax = torch.randn(count, 64).abs().amax(dim=1) * 0.02
    codes, nested_absmax, offset = (t.cpu() for t in op("double_quantize")(absmax.to(device)))
    assert abs(offset.item() - absmax.double().mean().item()) <= 2**-24 * offset.item()

    theirs, state = bnb.quantize_blockwise(absmax - offset, blocksize=256)
    assert torch.equal(nested_absmax, state.absmax)

    scale = nested_absmax.double().clamp(min=formats.ABSMAX_FLOOR).repeat_interleave(256)[:count]
    scaled = (absmax - offset).double() / scale
    table = torch.from_numpy(formats.DYNAMIC8.values).double()
    distance = (table[codes.long()] - scaled).abs()
    # The reciprocal, the product and the threshold are rounded to float32: up to 1.25 * 2^-23 in
    # all, by which a value may cross a midpoint, and then its distances differ by twice that.
    rounding = 2 * 1.25 * 2.0**-23
    nearest = (table[:, None] - scaled[:1000]).abs().amin(dim=0)
    assert (distance[:1000] <= nearest + rounding).all()

    differ = codes != theirs
    assert (
        distance[differ] <= (table[theirs[differ].long()] - scaled[differ]).abs() + rounding
    ).all()
    if count == 200_000:
        assert 0.0005 < differ.double().mean().item() < 0.004


def test_nested_codes_read_back_equally(backend: str, device: torch.device) -> None:
    """Scales written by nf4 decode to the same float32 in bitsandbytes."""
    absmax = torch.rand(1000) * 0.1
    codes, nested_absmax, offset = op("double_quantize")(absmax.to(device))
    table = torch.from_numpy(formats.DYNAMIC8.values)
    theirs = bnb.dequantize_blockwise(
        codes.cpu(), absmax=nested_absmax.cpu(), code=table, blocksize=256
    )
    ours = reference._scales(codes.cpu(), nested_absmax.cpu(), offset.cpu())
    assert torch.equal(theirs + offset.cpu(), ours)


def test_tables_are_equal() -> None:
    for signed, fmt in ((True, formats.DYNAMIC8), (False, formats.DYNAMIC8_UNSIGNED)):
        assert np.array_equal(bnb.create_dynamic_map(signed=signed).numpy(), fmt.values)
    for fmt in (formats.NF4, formats.FP4):
        table = bnb.get_4bit_type(fmt.name, device="cpu").numpy()
        # Its fp4 table is divided in float64 first; the sign of zero is not stored in a byte.
        assert np.array_equal(table, fmt.values)
    nested = bnb.quantize_4bit(torch.randn(1, 64), compress_statistics=True)[1]
    assert np.array_equal(nested.state2.code.numpy(), formats.DYNAMIC8.values)
    assert nested.state2.blocksize == formats.NESTED_BLOCK_SIZE


@four_bits
@pytest.mark.parametrize("nested", [False, True], ids=["plain", "nested"])
def test_files_are_exchanged(fmt: formats.Format, nested: bool) -> None:
    """A state dict of either library is read by the other, with equal values."""
    x = torch.randn(48, 128, dtype=torch.bfloat16)
    packed, state = bnb.quantize_4bit(x, quant_type=fmt.name, compress_statistics=nested)
    written = {"weight": packed}
    written |= {f"weight.{k}": v for k, v in state.as_dict(packed=True).items()}
    read = nf4.QuantizedTensor.from_state_dict(written)
    assert torch.equal(nf4.dequantize(read), bnb.dequantize_4bit(packed, state))

    q = nf4.quantize(x, double_quant=nested, format=fmt.name)
    written = q.state_dict()
    packed = written.pop("weight")
    back = bnb.QuantState.from_dict(
        {k.removeprefix("weight."): v for k, v in written.items()}, device=torch.device("cpu")
    )
    assert torch.equal(bnb.dequantize_4bit(packed, back), nf4.dequantize(q))


class TestCudaRule:
    """bitsandbytes' CUDA kernels, emulated: pivots from decimal literals and ``1 / absmax`` by
    ``rcp.approx.ftz``, which is off by at most one ulp. Its checkpoints differ from its own CPU's
    and from ours in the few codes that this moves across a pivot."""

    @staticmethod
    def codes(
        x: np.ndarray, fmt: formats.Format, ulps: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        """Codes of whole blocks of 64, and the scaled values of our rule."""
        blocks = x.reshape(-1, 64)
        absmax = np.abs(blocks).max(axis=1, keepdims=True)
        reciprocal = np.float32(1) / absmax
        ours = (blocks * reciprocal).reshape(-1)
        steps = (reciprocal.view(np.int32) + ulps[:, None].astype(np.int32)).view(np.float32)
        scaled = (blocks * steps).reshape(-1)
        if fmt is formats.NF4:
            return np.searchsorted(float_literals(CUDA_NF4), scaled, side="left"), ours
        order = np.array([0, 1, 6, 7, 4, 5, 2, 3])
        magnitude = np.searchsorted(float_literals(CUDA_FP4), np.abs(scaled), side="left")
        return order[magnitude] + 8 * (scaled < 0), ours

    def test_nf4_pivots(self) -> None:
        """Four of the fifteen are one ulp away from the midpoint; the others are equal."""
        theirs = float_literals(CUDA_NF4).view(np.int32)
        off = np.abs(theirs - formats.NF4.thresholds.view(np.int32))
        assert np.flatnonzero(off).tolist() == [0, 8, 12, 14]
        assert off.max() == 1

    def test_fp4_pivots(self) -> None:
        """Decimals of six to eight digits: two are visibly short, none by more than 6e-7."""
        middles = formats.FP4.thresholds[8:]
        off = np.abs(float_literals(CUDA_FP4) - middles)
        assert off.max() < 6e-7

    @four_bits
    def test_differences_are_explained(self, fmt: formats.Format) -> None:
        count = 2**22
        x = torch.randn(count)
        ulps = torch.randint(-1, 2, (count // 64,)).numpy()
        theirs, scaled = self.codes(x.numpy(), fmt, ulps)
        packed, _ = reference.quantize(x, 64, fmt.id)
        ours = torch.stack([packed >> 4, packed & 15], dim=1).view(-1).numpy()

        # Codes 0 and 8 of fp4 both mean zero: CUDA takes the sign of x, the CPU the two sides of 0.
        differ = np.flatnonzero(fmt.values[ours] != fmt.values[theirs])
        tolerance = 2e-7 if fmt is formats.NF4 else 7e-7
        distance = np.abs(scaled[differ, None] - fmt.thresholds).min(axis=1)
        assert (distance <= tolerance).all()
        rank = np.argsort(fmt.order)
        if fmt is formats.NF4:
            assert (np.abs(rank[ours[differ]] - rank[theirs[differ]]) == 1).all()
        # 4 of 16.8 million were seen for each format, none of them from nf4's pivots alone.
        assert differ.size <= 20

    @four_bits
    def test_thresholds_themselves_differ(self, fmt: formats.Format) -> None:
        """Values on the pivots show the difference that random weights nearly never do."""
        near = np.concatenate(
            [np.nextafter(fmt.thresholds, np.float32(s * np.inf)) for s in (-1, 1)]
            + [fmt.thresholds]
        )
        x = np.concatenate([[np.float32(1)], near, np.zeros(-(near.size + 1) % 64, np.float32)])
        blocks = np.concatenate([x[:64], np.ones(64, np.float32)]).astype(np.float32)
        theirs, _ = self.codes(blocks, fmt, np.zeros(2))
        packed, _ = reference.quantize(torch.from_numpy(blocks), 64, fmt.id)
        ours = torch.stack([packed >> 4, packed & 15], dim=1).view(-1).numpy()
        assert 4 <= (fmt.values[ours] != fmt.values[theirs]).sum() <= 16
