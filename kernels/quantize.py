"""Blockwise quantization: scales and codes in one pass.

Per element of a bfloat16 weight in a 4-bit format with block size 64: 2 bytes read, 0.5 bytes of
codes and 1/16 bytes of scales written, 2.5625 in all; 24 instructions (sm_90, a static count:
absmax 2, scaling 1, the bucket 3, its entry 4, packing 2, conversion and addresses the rest).
"""

import triton
import triton.language as tl

from nf4.kernels._codes import encode4, encode8

ABSMAX_FLOOR = tl.constexpr(1e-38)


@triton.jit
def scale_blocks(x, DIVIDE: tl.constexpr):
    """x [A, B] float32 scaled into [-1, 1] by row, and the absmax [A] to store.

    DIVIDE is the rule of a short last block of a 4-bit format: see nf4.formats.
    """
    # By the bits: they order magnitudes as the values do, with infinity and then NaN on top, which
    # a float32 maximum would drop.
    bits = x.to(tl.int32, bitcast=True) & 0x7FFFFFFF
    absmax = tl.max(bits, axis=1).to(tl.float32, bitcast=True)  # [A]
    floored = tl.where(absmax < ABSMAX_FLOOR, ABSMAX_FLOOR, absmax)
    # `1.0 / x` is an approximation on the device; the stored codes need the IEEE quotient.
    if DIVIDE:
        x = tl.math.div_rn(x, tl.broadcast_to(floored[:, None], x.shape))
        absmax = floored
    else:
        scale = tl.math.div_rn(tl.full(floored.shape, 1.0, tl.float32), floored)
        x = x * scale[:, None]
    return x, absmax


@triton.jit
def quantize_kernel(
    x_ptr,  # [numel] any float
    table_ptr,  # [4 * BUCKETS] int64 of a 4-bit format, [255] float32 thresholds of an 8-bit one
    packed_ptr,  # [packed bytes] uint8
    absmax_ptr,  # [ceil(numel / BLOCK_SIZE)] float32
    numel,
    bytes_,  # of packed; a mask of its own, because one on 2 * byte would split the stores
    BLOCK_SIZE: tl.constexpr,
    BLOCKS: tl.constexpr,  # blocks of a program
    BUCKETS: tl.constexpr,  # of a 4-bit format, else None
    SHORT: tl.constexpr,  # whether the last block is short and divides
):
    pid = tl.program_id(0).to(tl.int64)
    block = pid * BLOCKS + tl.arange(0, BLOCKS)  # [BLOCKS]
    element = block[:, None] * BLOCK_SIZE + tl.arange(0, BLOCK_SIZE)[None, :]
    x = tl.load(x_ptr + element, mask=element < numel, other=0.0).to(tl.float32)
    scaled, absmax = scale_blocks(x, False)
    if SHORT and (pid + 1) * BLOCKS * BLOCK_SIZE > numel:
        divided, floored = scale_blocks(x, True)
        short = (block + 1) * BLOCK_SIZE > numel
        scaled = tl.where(short[:, None], divided, scaled)
        absmax = tl.where(short, floored, absmax)
    tl.store(absmax_ptr + block, absmax, mask=block * BLOCK_SIZE < numel)
    if BUCKETS is None:
        codes = encode8(scaled, table_ptr)
        tl.store(packed_ptr + element, codes.to(tl.uint8), mask=element < numel)
    else:
        # A masked element is zero, so that the pad of an odd count is the code of zero.
        codes = encode4(scaled, table_ptr, BUCKETS)
        first, second = tl.split(tl.reshape(codes, (BLOCKS, BLOCK_SIZE // 2, 2)))
        half: tl.constexpr = BLOCK_SIZE // 2
        byte = block[:, None] * half + tl.arange(0, half)[None, :]
        tl.store(packed_ptr + byte, ((first << 4) | second).to(tl.uint8), mask=byte < bytes_)
