"""The gradients of LoRA: ds and dB in one pass over grad_y, dA in one pass over x.

Bytes: 2 M N for grad_y, 2 M K for x, and float32 partial sums: 8 M R N / BLOCK_N for ds, 8 N R and
8 R K a slice of M for dB and dA (written and read once). Flops: 4 M N R and 2 M K R. Partial sums
are added in order by sum_partials_kernel: two launches give the same bits every time.
"""

import triton
import triton.language as tl

from nf4.kernels._dropout import keep
from nf4.kernels._stack import stack_rows


@triton.jit(do_not_specialize_on_alignment=["M"])
def lora_grad_y_kernel(
    g_ptr,  # grad_y [M, N]
    s_ptr,  # [M, R] float32, or None where dB is not wanted
    b_ptr,  # [N, R] any float
    ds_ptr,  # float32 [tiles of N, M, R]
    db_ptr,  # float32 [SLICES, N, R]
    M,
    N,
    R,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_R: tl.constexpr,
    SLICES: tl.constexpr,  # of M
    DTYPE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Partial sums of grad_y B and of grad_y^T s."""
    # Tiles of the rank run next to each other, so that grad_y comes from memory once for all.
    pid_n = tl.program_id(1).to(tl.int64)
    part = tl.program_id(2).to(tl.int64)
    n = pid_n * BLOCK_N + tl.arange(0, BLOCK_N)
    r = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    inside_n, inside_r = n < N, r < R
    b_offset = n[:, None] * R + r[None, :]
    inside_b = inside_n[:, None] & inside_r[None, :]
    b = tl.load(b_ptr + b_offset, mask=inside_b, other=0.0).to(DTYPE)  # [BLOCK_N, BLOCK_R]
    db = tl.zeros((BLOCK_N, BLOCK_R), tl.float32)
    tiles = tl.cdiv(M, BLOCK_M)
    each = (tiles + SLICES - 1) // SLICES
    for tile in range(part * each, tl.minimum(part * each + each, tiles)):
        m = tile * BLOCK_M + tl.arange(0, BLOCK_M).to(tl.int64)
        inside_m = m < M
        inside_g = inside_m[:, None] & inside_n[None, :]
        g = tl.load(g_ptr + m[:, None] * N + n[None, :], mask=inside_g, other=0.0).to(DTYPE)
        ds = tl.dot(g, b, input_precision=PRECISION)  # [BLOCK_M, BLOCK_R]
        s_offset = m[:, None] * R + r[None, :]
        inside_s = inside_m[:, None] & inside_r[None, :]
        tl.store(ds_ptr + pid_n * M * R + s_offset, ds, mask=inside_s)
        if s_ptr is not None:
            s = tl.load(s_ptr + s_offset, mask=inside_s, other=0.0).to(DTYPE)
            db = tl.dot(tl.trans(g), s, db, input_precision=PRECISION)
    if s_ptr is not None:
        tl.store(db_ptr + part * N * R + b_offset, db, mask=inside_b)


@triton.jit(do_not_specialize_on_alignment=["M"])
def lora_grad_a_kernel(
    x_ptr,  # [M, K]
    ds_ptr,  # float32 [M * R]: a member's [M, rank] after the other
    table_ptr,  # of kernels/_stack.py, or None for a single member
    seed_ptr,  # [members] int64 or None for no dropout
    threshold,
    da_ptr,  # float32 [SLICES, R, K]
    M,
    K,
    R,  # rows of all members
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr,
    SLICES: tl.constexpr,  # of M
    WHOLE: tl.constexpr,
    DTYPE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Partial sums of ds^T mask(x)."""
    start_k = tl.program_id(1) * BLOCK_K
    part = tl.program_id(2).to(tl.int64)
    k = start_k + tl.arange(0, BLOCK_K)
    tile_r = tl.program_id(0)
    member, exists, row, column, rank = stack_rows(table_ptr, tile_r, R, BLOCK_R)
    inside_k = k < K
    ds_row_ptr = ds_ptr + M * (row - column) + column  # [BLOCK_R]
    da = tl.zeros((BLOCK_R, BLOCK_K), tl.float32)
    tiles = tl.cdiv(M, BLOCK_M)
    each = (tiles + SLICES - 1) // SLICES
    for tile in range(part * each, tl.minimum(part * each + each, tiles)):
        m = tile * BLOCK_M + tl.arange(0, BLOCK_M).to(tl.int64)
        inside_m = m < M
        inside_x = inside_m[:, None] & inside_k[None, :]
        x = tl.load(x_ptr + m[:, None] * K + k[None, :], mask=inside_x, other=0.0)
        if seed_ptr is not None:
            kept = keep(seed_ptr + member, threshold, m, start_k, K, BLOCK_K, WHOLE)
            x = tl.where(kept, x, 0.0)
        inside_s = inside_m[None, :] & exists[:, None]
        ds_tile_ptr = ds_row_ptr[:, None] + m[None, :] * rank[:, None]
        ds = tl.load(ds_tile_ptr, mask=inside_s, other=0.0)
        da = tl.dot(ds.to(DTYPE), x.to(DTYPE), da, input_precision=PRECISION)
    a_offset = row[:, None] * K + k[None, :]
    inside_a = exists[:, None] & inside_k[None, :]
    tl.store(da_ptr + part * R * K + a_offset, da, mask=inside_a)
