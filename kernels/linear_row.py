"""y = x W^T (+ bias) (+ scaling s B^T) for a single row x, on packed weights.

Per weight, nested and block size 64: 0.516 bytes read, and 3.9 instructions (sm_90, a static
count: the shuffle that looks the code up, the shift before it and the multiply-add 1 each, scales,
sums and x the rest). Without matrix instructions nothing passes through shared memory but x, and
all of the reduction is in one program, so that no partial sums are written.
"""

import triton
import triton.language as tl

from nf4.kernels._codes import decode, lane_entry
from nf4.kernels._pairs import load_pairs
from nf4.kernels._scales import load_scale


@triton.jit
def linear_row_kernel(
    x_ptr,  # [K], of 16 bits
    packed_ptr,  # [N * K / 2] uint8
    absmax_ptr,  # [N * K / BLOCK_SIZE] float32, or uint8 when nested
    nested_ptr,  # [ceil(blocks / 256)] float32 or None
    offset_ptr,  # [] float32 or None
    map_ptr,  # [256] float32, the map of nested scales
    value_ptr,  # [16] float32 of the format
    bias_ptr,  # [N] or None
    s_ptr,  # [R] float32 or None
    b_ptr,  # [N, R] or None
    out_ptr,  # [N]
    N,
    K,  # a multiple of BLOCK_SIZE
    R,
    scaling,
    BLOCK_SIZE: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,  # divides BLOCK_SIZE, or is divided by it
    BLOCK_R: tl.constexpr,
    EVEN: tl.constexpr,  # whether K is a multiple of BLOCK_K
    CODES: tl.constexpr,
    ASM: tl.constexpr,  # of _codes.dot_asm, else None
    CONSTRAINTS: tl.constexpr,
):
    HALF: tl.constexpr = BLOCK_K // 2
    BLOCKS: tl.constexpr = BLOCK_K // BLOCK_SIZE if BLOCK_K > BLOCK_SIZE else 1
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    row = tl.minimum(n, N - 1).to(tl.int64)
    # K is a multiple of 32, which the compiler must see to load 16 bytes at a time.
    byte = tl.arange(0, HALF)
    byte_ptr = packed_ptr + row[:, None] * (K // 32 * 16) + byte[None, :]
    block_ptr = row[:, None] * (K // BLOCK_SIZE) + tl.arange(0, BLOCKS)[None, :]
    acc = tl.zeros((BLOCK_N, BLOCKS), tl.float32)
    if ASM is not None:
        value = lane_entry(value_ptr, 16)
    for start in range(0, K, BLOCK_K):
        block = block_ptr + start // BLOCK_SIZE
        if EVEN:
            packed = tl.load(byte_ptr + start // 2)
            first_x, second_x = load_pairs(x_ptr, start // 2 + byte, None)
            inside = block >= 0
        else:
            left = (K - start) // 32 * 16
            packed = tl.load(byte_ptr + start // 2, mask=byte[None, :] < left, other=0)
            first_x, second_x = load_pairs(x_ptr, start // 2 + byte, byte < left)
            inside = block < (row[:, None] + 1) * (K // BLOCK_SIZE)
        scale = load_scale(absmax_ptr, nested_ptr, offset_ptr, map_ptr, block, inside)
        if ASM is None:
            first, second = decode(packed, CODES, None, None, tl.float32)
            dot = first * first_x[None, :] + second * second_x[None, :]
            dot = tl.reshape(dot, (BLOCK_N, BLOCKS, HALF // BLOCKS))
        else:
            dot = tl.inline_asm_elementwise(
                ASM,
                CONSTRAINTS,
                [packed, value, first_x[None, :], second_x[None, :]],
                dtype=tl.float32,
                is_pure=True,
                pack=4,
            )
            # Of four neighbours the first holds the sum.
            dot, _ = tl.split(tl.reshape(dot, (BLOCK_N, HALF // 4, 2, 2)))
            dot, _ = tl.split(dot)
            dot = tl.reshape(dot, (BLOCK_N, BLOCKS, HALF // 4 // BLOCKS))
        acc += tl.sum(dot, 2) * scale
    y = tl.sum(acc, 1)
    if s_ptr is not None:
        for start in range(0, R, BLOCK_R):
            r = start + tl.arange(0, BLOCK_R)
            b = tl.load(b_ptr + row[:, None] * R + r[None, :], mask=r[None, :] < R, other=0.0)
            s = tl.load(s_ptr + r, mask=r < R, other=0.0) * scaling
            y += tl.sum(b.to(tl.float32) * s[None, :], 1)
    if bias_ptr is not None:
        y += tl.load(bias_ptr + row).to(tl.float32)
    tl.store(out_ptr + n, y.to(out_ptr.dtype.element_ty), mask=n < N)
