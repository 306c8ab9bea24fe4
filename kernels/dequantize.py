"""Blockwise dequantization, nested scales included, in one launch.

Per element of a nested 4-bit weight with block size 64 to bfloat16: 0.5 bytes of codes and about
1/64 of scales read, 2 written, 2.516 in all; 11 instructions (sm_90, a static count: the decode
5.6, one multiply, half a conversion, scales and addresses the rest).
"""

import triton
import triton.language as tl

from nf4.kernels._codes import decode, interleave
from nf4.kernels._scales import load_scale


@triton.jit
def dequantize_kernel(
    packed_ptr,  # [packed bytes] uint8
    absmax_ptr,  # [blocks] float32, or uint8 when nested
    nested_ptr,  # [ceil(blocks / 256)] float32 or None
    offset_ptr,  # [] float32 or None
    map_ptr,  # [256] float32, the map of nested scales
    table_ptr,  # [256] float32 of an 8-bit format, else None
    out_ptr,  # [numel] any float
    numel,
    bytes_,  # of packed; a mask of its own, because one on 2 * byte would split the loads
    BLOCK_SIZE: tl.constexpr,
    BLOCKS: tl.constexpr,  # blocks of a program
    CODES: tl.constexpr,  # the 16 values of a 4-bit format, else None
    ASM: tl.constexpr,
    CONSTRAINTS: tl.constexpr,
):
    HALF: tl.constexpr = BLOCK_SIZE // 2
    block = tl.program_id(0).to(tl.int64) * BLOCKS + tl.arange(0, BLOCKS)  # [BLOCKS]
    inside = block * BLOCK_SIZE < numel
    element = block[:, None] * BLOCK_SIZE + tl.arange(0, BLOCK_SIZE)[None, :]
    if CODES is None:
        code = tl.load(packed_ptr + element, mask=element < numel, other=0).to(tl.int32)
        scale = load_scale(absmax_ptr, nested_ptr, offset_ptr, map_ptr, block, inside)
        value = tl.load(table_ptr + code) * scale[:, None]
    else:
        byte = block[:, None] * HALF + tl.arange(0, HALF)[None, :]
        # A thread takes 4 bytes at a time, whose 16-bit values are one 16-byte store that is
        # contiguous over the warp; wider loads would move values between threads first.
        byte = tl.max_contiguous(byte, [1, 4])
        packed = tl.load(packed_ptr + byte, mask=byte < bytes_, other=0)
        scale = load_scale(absmax_ptr, nested_ptr, offset_ptr, map_ptr, block, inside)
        first, second = decode(packed, CODES, ASM, CONSTRAINTS, tl.float32)
        value = interleave(first * scale[:, None], second * scale[:, None])
    tl.store(out_ptr + element, value.to(out_ptr.dtype.element_ty), mask=element < numel)
