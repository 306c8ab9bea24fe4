"""Blockwise quantization: scales and codes in one pass.

Per element of a bfloat16 weight in a 4-bit format with block size 64: 2 bytes read, 0.5 bytes of
codes and 1/16 bytes of scales written, 2.5625 in all; 16 instructions (sm_90, a static count:
unpacking and absmax 2, scaling 1, the bucket 2, its entry 3, the code 3, packing 1, and addresses
and the quotient of the scale the rest).
"""

import triton
import triton.language as tl

from nf4.kernels._codes import encode4, encode8

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
    return tl.where(absmax < ABSMAX_FLOOR, ABSMAX_FLOOR, absmax)


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

    PAIRS: both in one load, where x has whole and aligned pairs. A pair of registers' halves needs
    no instruction to take apart, and none to bring two codes into one byte.
    """
    DTYPE: tl.constexpr = x_ptr.dtype.element_ty
    if PAIRS:
        WORD: tl.constexpr = tl.int64 if tl.float32 == DTYPE else tl.int32
        word = tl.load(x_ptr.to(tl.pointer_type(WORD)) + byte, mask=byte < bytes_, other=0)
        if tl.bfloat16 == DTYPE:
            first = (word << 16).to(tl.float32, bitcast=True)
            second = (word & -65536).to(tl.float32, bitcast=True)
        elif tl.float16 == DTYPE:
            first = word.to(tl.int16).to(DTYPE, bitcast=True)
            second = (word >> 16).to(tl.int16).to(DTYPE, bitcast=True)
        else:
            first = word.to(tl.int32).to(DTYPE, bitcast=True)
            second = (word >> 32).to(tl.int32).to(DTYPE, bitcast=True)
    else:
        first = tl.load(x_ptr + 2 * byte, mask=2 * byte < numel, other=0.0)
        second = tl.load(x_ptr + 2 * byte + 1, mask=2 * byte + 1 < numel, other=0.0)
    return first.to(tl.float32), second.to(tl.float32)


@triton.jit
def quantize_kernel(
    x_ptr,  # [numel] any float
    table_ptr,  # [4 * BUCKETS] int64 of a 4-bit format, [255] float32 thresholds of an 8-bit one
    packed_ptr,  # [bytes_] uint8
    absmax_ptr,  # [ceil(numel / BLOCK_SIZE)] float32
    numel,
    bytes_,
    BLOCK_SIZE: tl.constexpr,
    BLOCKS: tl.constexpr,  # blocks of a program
    BUCKETS: tl.constexpr,  # of a 4-bit format, else None
    PAIRS: tl.constexpr,  # numel is even and x aligned to two elements
    SHORT: tl.constexpr,  # whether the last block is short and divides: see nf4.formats
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
        code1 = encode4(v1, table_ptr, BUCKETS)
        code2 = encode4(v2, table_ptr, BUCKETS)
        tl.store(packed_ptr + byte, (code1 << 4 | code2).to(tl.uint8), mask=byte < bytes_)
    tl.store(absmax_ptr + block, absmax, mask=block * BLOCK_SIZE < numel)
