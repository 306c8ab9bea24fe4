"""Blockwise quantization: scales and codes in one pass.

Per element of a bfloat16 weight in NF4 with block size 64: 2 bytes read, 0.5 bytes of codes and
1/16 bytes of scales written, 2.5625 in all; 16 instructions (sm_90, a static count: unpacking and
absmax 2, scaling 1, the bucket 1, two shuffles, the code 2, packing 1, the quotient of the scale,
which four threads find for each block, and addresses the rest).
"""

import triton
import triton.language as tl

from nf4.kernels._codes import encode4, encode8, lane_entry
from nf4.kernels._pairs import load_pairs

ABSMAX_FLOOR = tl.constexpr(1e-38)


@triton.jit
def block_absmax(magnitude):
    """[A] float32: the largest of each row of absolute values [A, B]."""
    # By the bits: they order magnitudes as the values do, with infinity and then NaN on top, which
    # a float32 maximum would drop.
    return tl.max(magnitude.to(tl.int32, bitcast=True), axis=1).to(tl.float32, bitcast=True)


@triton.jit
def floored(absmax):
    """What a block is divided by; NaN stays."""
    # Not the plain constant, which is below the normal range: Triton would compare in float64.
    floor = tl.full(absmax.shape, ABSMAX_FLOOR, tl.float32)
    return tl.where(absmax < floor, floor, absmax)


@triton.jit
def inverse(absmax):
    """What a block is multiplied with."""
    # `1.0 / x` is an approximation on the device; the stored codes need the IEEE quotient.
    return tl.math.div_rn(tl.full(absmax.shape, 1.0, tl.float32), floored(absmax))


@triton.jit
def scale_blocks(x):
    """x [A, B] float32 scaled into [-1, 1] by row, and the absmax [A] to store."""
    absmax = block_absmax(tl.abs(x))
    return x * inverse(absmax)[:, None], absmax


@triton.jit
def _halves(x_ptr, byte, numel, bytes_, PAIRS: tl.constexpr):
    """The first and the second element of each byte, float32; 0 past the end.

    PAIRS: both in one load, where x has whole and aligned pairs.
    """
    if PAIRS:
        first, second = load_pairs(x_ptr, byte, byte < bytes_)
    else:
        first = tl.load(x_ptr + 2 * byte, mask=2 * byte < numel, other=0.0).to(tl.float32)
        second = tl.load(x_ptr + 2 * byte + 1, mask=2 * byte + 1 < numel, other=0.0).to(tl.float32)
    return first, second


@triton.jit
def quantize_kernel(
    x_ptr,  # [numel] any float
    # [4 * BUCKETS] int64 of a 4-bit format, or [32] with ASM; [255] float32 thresholds of an 8-bit
    table_ptr,
    packed_ptr,  # [bytes_] uint8
    absmax_ptr,  # [ceil(numel / BLOCK_SIZE)] float32
    numel,
    bytes_,
    BLOCK_SIZE: tl.constexpr,
    BLOCKS: tl.constexpr,  # blocks of a program
    BUCKETS: tl.constexpr,  # of a 4-bit format, else None
    PAIRS: tl.constexpr,  # numel is even and x aligned to two elements
    SHORT: tl.constexpr,  # whether the last block is short and divides: see nf4.formats
    ASM: tl.constexpr,  # of _codes.encode_asm, else None
    CONSTRAINTS: tl.constexpr,
):
    pid = tl.program_id(0).to(tl.int64)
    block = pid * BLOCKS + tl.arange(0, BLOCKS)  # [BLOCKS]
    if BUCKETS is None:
        element = block[:, None] * BLOCK_SIZE + tl.arange(0, BLOCK_SIZE)[None, :]
        x = tl.load(x_ptr + element, mask=element < numel, other=0.0).to(tl.float32)
        scaled, absmax = scale_blocks(x)
        codes = encode8(scaled, table_ptr).to(tl.uint8)
        tl.store(packed_ptr + element, codes, mask=element < numel)
    else:
        HALF: tl.constexpr = BLOCK_SIZE // 2
        byte = block[:, None] * HALF + tl.arange(0, HALF)[None, :]
        first, second = _halves(x_ptr, byte, numel, bytes_, PAIRS)
        absmax = block_absmax(
            tl.maximum(tl.abs(first), tl.abs(second), propagate_nan=tl.PropagateNan.ALL)
        )
        scale = inverse(absmax)[:, None]
        v1, v2 = first * scale, second * scale
        if SHORT and (pid + 1) * BLOCKS * BLOCK_SIZE > numel:
            divisor = floored(absmax)
            short = (block + 1) * BLOCK_SIZE > numel
            absmax = tl.where(short, divisor, absmax)
            divisor = tl.broadcast_to(divisor[:, None], first.shape)
            v1 = tl.where(short[:, None], tl.math.div_rn(first, divisor), v1)
            v2 = tl.where(short[:, None], tl.math.div_rn(second, divisor), v2)
        # The pad of an odd count is the code of zero.
        if ASM is None:
            code1 = encode4(v1, table_ptr, BUCKETS)
            code2 = encode4(v2, table_ptr, BUCKETS)
        else:
            entry = lane_entry(table_ptr, 32)
            threshold, code = (entry >> 32).to(tl.int32), entry.to(tl.int32)
            code1 = tl.inline_asm_elementwise(
                ASM, CONSTRAINTS, [v1, threshold, code], dtype=tl.int32, is_pure=True, pack=1
            )
            code2 = tl.inline_asm_elementwise(
                ASM, CONSTRAINTS, [v2, threshold, code], dtype=tl.int32, is_pure=True, pack=1
            )
        # A thread takes 8 bytes, from 32 of a 16-bit x. Narrower, more threads divide
        # for the same block; wider, a warp's loads are not contiguous: 38, 40 and 41 us for
        # 14336 x 4096 on an H200.
        byte = tl.max_contiguous(byte, [1, 8])
        tl.store(packed_ptr + byte, (code1 << 4 | code2).to(tl.uint8), mask=byte < bytes_)
    tl.store(absmax_ptr + block, absmax, mask=block * BLOCK_SIZE < numel)
