"""dx = grad_y W (+ the LoRA term) on packed weights, without a transposed copy.

Per weight, nested and block size 64: 0.516 bytes read and 2 M flops; 2 M (N + K) bytes of
gradients, and 8 M K a part of a split reduction. The scales vary along the
reduction, so that weights are scaled before the product: codes in float16 (exact to 2^-12 of
themselves) times the float32 scale, rounded once.
"""

import triton
import triton.language as tl

from nf4.kernels._codes import decode, interleave
from nf4.kernels._dropout import keep
from nf4.kernels._scales import load_scale


@triton.jit(do_not_specialize_on_alignment=["M"])
def linear_backward_kernel(
    g_ptr,  # grad_y [M, N]
    packed_ptr,  # [N * K / 2] uint8
    absmax_ptr,  # [N * K / BLOCK_SIZE] float32, or uint8 when nested
    nested_ptr,  # [ceil(blocks / 256)] float32 or None
    offset_ptr,  # [] float32 or None
    map_ptr,  # [256] float32
    ds_ptr,  # [M, R] float32, or None without LoRA
    a_ptr,  # [R, K] or None
    seed_ptr,  # [1] int64 or None for no dropout
    threshold,
    out_ptr,  # [M, K], or float32 [SPLIT, M, K] partial sums
    M,
    N,
    K,  # a multiple of BLOCK_SIZE
    R,
    factor,  # 1 / (1 - dropout_p)
    BLOCK_SIZE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,  # divides BLOCK_SIZE
    BLOCK_R: tl.constexpr,
    SPLIT: tl.constexpr,
    WHOLE: tl.constexpr,
    CODE_DTYPE: tl.constexpr,
    DTYPE: tl.constexpr,
    PRECISION: tl.constexpr,
    CODES: tl.constexpr,
    ASM: tl.constexpr,
    CONSTRAINTS: tl.constexpr,
):
    HALF: tl.constexpr = BLOCK_K // 2
    split = tl.program_id(2)
    start_k = tl.program_id(0) * BLOCK_K
    m = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    token = tl.minimum(m, M - 1).to(tl.int64)
    k = start_k + tl.arange(0, BLOCK_K)

    acc = tl.zeros((BLOCK_M, BLOCK_K), tl.float32)
    if ds_ptr is not None:
        r_end = tl.where(split == 0, R, 0)
        for start in tl.range(0, r_end, BLOCK_R, num_stages=1):  # see linear.finish
            r = start + tl.arange(0, BLOCK_R)
            ds = tl.load(ds_ptr + token[:, None] * R + r[None, :], mask=r[None, :] < R, other=0.0)
            a_offset = r.to(tl.int64)[:, None] * K + k[None, :]
            a = tl.load(a_ptr + a_offset, mask=r[:, None] < R, other=0.0)
            acc = tl.dot(ds.to(DTYPE), a.to(DTYPE), acc, input_precision=PRECISION)
        if seed_ptr is not None:
            kept = keep(seed_ptr, threshold, token, start_k, K, BLOCK_K, WHOLE)
            acc = tl.where(kept, acc * factor, 0.0)

    tiles = tl.cdiv(N, BLOCK_N)
    each = (tiles + SPLIT - 1) // SPLIT
    first_tile = split * each
    byte = start_k // 2 + tl.arange(0, HALF)
    for tile in range(first_tile, tl.minimum(first_tile + each, tiles)):
        n = tile * BLOCK_N + tl.arange(0, BLOCK_N)
        inside = n < N
        row = tl.minimum(n, N - 1).to(tl.int64)
        packed = tl.load(packed_ptr + row[:, None] * (K // 32 * 16) + byte[None, :])
        block = row * (K // BLOCK_SIZE) + start_k // BLOCK_SIZE
        # Rows past the end get the scale 0, so that they add nothing.
        scale = load_scale(absmax_ptr, nested_ptr, offset_ptr, map_ptr, block, inside)
        g = tl.load(g_ptr + token[:, None] * N + n[None, :], mask=inside[None, :], other=0.0)
        first, second = decode(packed, CODES, ASM, CONSTRAINTS, CODE_DTYPE)
        w = interleave(first, second).to(tl.float32) * scale[:, None]  # [BLOCK_N, BLOCK_K]
        acc = tl.dot(g.to(DTYPE), w.to(DTYPE), acc, input_precision=PRECISION)

    element = token[:, None] * K + k[None, :]
    if SPLIT == 1:
        tl.store(out_ptr + element, acc.to(out_ptr.dtype.element_ty), mask=m[:, None] < M)
    else:
        element += split.to(tl.int64) * M * K
        tl.store(out_ptr + element, acc, mask=m[:, None] < M)
