"""Double quantization: the block scales to 8-bit codes around their mean.

Per scale: 4 bytes read twice, 1 + 1/64 bytes written; one float64 addition and about 100
instructions (sm_90, a static count), most of them the search among 255 thresholds. Every program
of the second kernel also adds one float64 for each 256 scales there are. The sums run in float64
in the one order that nf4.formats fixes, so that every backend stores the same bits.
"""

import triton
import triton.language as tl

from nf4.kernels._codes import encode8
from nf4.kernels._scales import NESTED_BLOCK_SIZE
from nf4.kernels.quantize import scale_blocks


@triton.jit
def chunk_sums_kernel(
    absmax_ptr,  # [n] float32
    sums_ptr,  # [ceil(n / CHUNK)] float64
    n,
    CHUNK: tl.constexpr,
    CHUNKS: tl.constexpr,  # chunks of a program, one a thread
):
    chunk = tl.program_id(0).to(tl.int64) * CHUNKS + tl.arange(0, CHUNKS)  # [CHUNKS]
    total = tl.zeros((CHUNKS,), tl.float64)
    for i in range(CHUNK):
        element = chunk * CHUNK + i
        total += tl.load(absmax_ptr + element, mask=element < n, other=0.0).to(tl.float64)
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
    UNROLL: tl.constexpr,
):
    # Every program adds up all chunk sums in order: the same bits in each, and no launch or grid
    # barrier between the mean and its use. UNROLL loads are in flight at a time.
    total = tl.full((), 0.0, tl.float64)
    for start in range(0, chunks, UNROLL):
        for i in tl.static_range(UNROLL):
            total += tl.load(sums_ptr + start + i, mask=start + i < chunks, other=0.0)
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
