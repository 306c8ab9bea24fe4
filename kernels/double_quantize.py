"""Double quantization: the block scales to 8-bit codes around their mean.

Per scale: 4 bytes read twice, 1 + 1/64 bytes written, and about 110 instructions (sm_90, a static
count), most of them the search among 255 thresholds. Every program of the second kernel also adds
one float64 for each 256 scales there are.

The sums run in float64 in the one order that nf4.formats fixes, so that every backend stores the
same bits: a chain of dependent additions. But if no summand is negative, all are multiples of some
2^e and the sum is at most 2^(e + 52), then no addition rounds and every order gives that sum. The
scales of a weight hardly ever break this; who finds it broken adds in index order.
"""

import triton
import triton.language as tl

from nf4.kernels._codes import encode8
from nf4.kernels._scales import NESTED_BLOCK_SIZE
from nf4.kernels.quantize import scale_blocks

# What a negative summand and what none gives, in the exponents of float64.
_INEXACT = tl.constexpr(0)
_LARGEST = tl.constexpr(2046)


@triton.jit
def _bound(v):
    """int64 exponent field of 2^52 times the lowest bit set in each float64 of v."""
    bits = v.to(tl.int64, bitcast=True)
    exponent = bits >> 52
    mantissa = bits & 0xFFFFFFFFFFFFF | tl.where(exponent > 0, 0x10000000000000, 0)
    lowest = (mantissa & -mantissa).to(tl.float64).to(tl.int64, bitcast=True) >> 52
    field = tl.minimum(tl.maximum(exponent, 1) + lowest - 1023, _LARGEST)
    return tl.where(bits < 0, _INEXACT, tl.where(bits == 0, _LARGEST, field))


@triton.jit
def _rounded(total, bound):
    """Whether a sum may depend on its order; also where it is NaN."""
    return (bound == _INEXACT) | ~(total <= (bound << 52).to(tl.float64, bitcast=True))


@triton.jit
def chunk_sums_kernel(
    absmax_ptr,  # [n] float32
    sums_ptr,  # [ceil(n / CHUNK)] float64
    n,
    CHUNK: tl.constexpr,
    CHUNKS: tl.constexpr,  # of a program
):
    chunk = tl.program_id(0).to(tl.int64) * CHUNKS + tl.arange(0, CHUNKS)  # [CHUNKS]
    element = chunk[:, None] * CHUNK + tl.arange(0, CHUNK)[None, :]
    x = tl.load(absmax_ptr + element, mask=element < n, other=0.0).to(tl.float64)
    total = tl.sum(x, 1)
    rounded = _rounded(total, tl.min(_bound(x), 1))
    if tl.max(rounded.to(tl.int32), 0) > 0:
        total = tl.zeros((CHUNKS,), tl.float64)
        for i in range(CHUNK):
            one = chunk * CHUNK + i
            total += tl.load(absmax_ptr + one, mask=one < n, other=0.0).to(tl.float64)
    tl.store(sums_ptr + chunk, total, mask=chunk * CHUNK < n)


@triton.jit
def double_quantize_kernel(
    absmax_ptr,  # [n] float32
    sums_ptr,  # [chunks] float64
    threshold_ptr,  # [255] float32
    codes_ptr,  # [n] uint8
    nested_ptr,  # [ceil(n / 256)] float32
    offset_ptr,  # [] float32
    n,
    chunks,
    BLOCKS: tl.constexpr,
    SUMS: tl.constexpr,  # added at a time
):
    # Every program adds up all chunk sums: no launch or grid barrier between the mean and its use.
    totals = tl.zeros((SUMS,), tl.float64)
    bounds = tl.full((SUMS,), _LARGEST, tl.int64)
    for start in range(0, chunks, SUMS):
        i = start + tl.arange(0, SUMS)
        sums = tl.load(sums_ptr + i, mask=i < chunks, other=0.0)
        totals += sums
        bounds = tl.minimum(bounds, _bound(sums))
    total = tl.sum(totals, 0)
    if _rounded(total, tl.min(bounds, 0)):
        total = tl.full((), 0.0, tl.float64)
        for i in range(chunks):
            total += tl.load(sums_ptr + i)
    offset = (total / tl.cast(n, tl.float64)).to(tl.float32)
    pid = tl.program_id(0).to(tl.int64)
    if pid == 0:
        tl.store(offset_ptr, offset)
    block = pid * BLOCKS + tl.arange(0, BLOCKS)  # [BLOCKS]
    element = block[:, None] * NESTED_BLOCK_SIZE + tl.arange(0, NESTED_BLOCK_SIZE)[None, :]
    inside = element < n
    x = tl.load(absmax_ptr + element, mask=inside, other=0.0)
    scaled, nested = scale_blocks(tl.where(inside, x - offset, 0.0))
    codes = encode8(scaled, threshold_ptr)
    tl.store(nested_ptr + block, nested, mask=block * NESTED_BLOCK_SIZE < n)
    tl.store(codes_ptr + element, codes.to(tl.uint8), mask=inside)
