"""LoRA's down-projection, and the matmul on 16-bit weights that carries a LoRA term.

The down-projection reads x once for all adapters that share it (their A stacked by rows):
2 M K + 4 R K bytes (adapters in float32), 8 M R a part of a split reduction, and 2 M R K flops;
about 60 instructions of Philox for four elements under dropout. The dense matmul reads a
dequantized workspace: 2 (N K + M K + M N) bytes and 2 M N (K + R) flops; its LoRA term is R more
columns of the reduction and no pass over the output.
"""

import triton
import triton.language as tl

from nf4.kernels._dropout import keep
from nf4.kernels._stack import stack_rows


@triton.jit(do_not_specialize_on_alignment=["M"])
def lora_down_kernel(
    x_ptr,  # [M, K]
    a_ptr,  # [rows, K] any float: the A of all members, stacked
    table_ptr,  # of kernels/_stack.py, or None for a single member
    seed_ptr,  # [members] int64 or None for no dropout
    threshold,  # words below it are dropped
    out_ptr,  # float32 [SPLIT, M * R]: a member's [M, rank] after the other
    M,
    K,
    R,  # rows of all members
    factor,  # 1 / (1 - dropout_p) of the only split; partial sums take it when they are added
    BLOCK_M: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_K: tl.constexpr,
    SPLIT: tl.constexpr,
    WHOLE: tl.constexpr,
    DTYPE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """factor * dropout(x) A^T over one slice of K."""
    split = tl.program_id(2)
    m = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    token = tl.minimum(m, M - 1).to(tl.int64)
    tile_r = tl.program_id(0)
    member, exists, row, column, rank = stack_rows(table_ptr, tile_r, R, BLOCK_R)
    a_row = tl.minimum(row, R - 1)
    tiles = tl.cdiv(K, BLOCK_K)
    each = (tiles + SPLIT - 1) // SPLIT
    start = split * each
    acc = tl.zeros((BLOCK_M, BLOCK_R), tl.float32)
    for tile in range(start, tl.minimum(start + each, tiles)):
        k = tile * BLOCK_K + tl.arange(0, BLOCK_K)
        x = tl.load(x_ptr + token[:, None] * K + k[None, :], mask=k[None, :] < K, other=0.0)
        if seed_ptr is not None:
            kept = keep(seed_ptr + member, threshold, token, tile * BLOCK_K, K, BLOCK_K, WHOLE)
            x = tl.where(kept, x, 0.0)
        a = tl.load(a_ptr + a_row[None, :] * K + k[:, None], mask=k[:, None] < K, other=0.0)
        acc = tl.dot(x.to(DTYPE), a.to(DTYPE), acc, input_precision=PRECISION)
    element = (split.to(tl.int64) * R + (row - column)[None, :]) * M
    element += token[:, None] * rank[None, :] + column[None, :]
    tl.store(out_ptr + element, acc * factor, mask=(m[:, None] < M) & exists[None, :])


@triton.jit(do_not_specialize_on_alignment=["M"])
def dense_lora_kernel(
    x_ptr,  # [M, K]
    w_ptr,  # element (k, n) at k * stride_wk + n * stride_wn
    u_ptr,  # [M, R] float32
    v_ptr,  # any float, element (r, n) at r * stride_vr + n * stride_vn
    bias_ptr,  # [N] or None
    seed_ptr,  # [1] int64, or None where the LoRA term is not masked
    threshold,
    out_ptr,  # [M, N]
    M,
    N,
    K,
    R,
    stride_wk,
    stride_wn,
    stride_vr,
    stride_vn,
    scaling,
    factor,  # 1 / (1 - dropout_p)
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr,
    GROUP: tl.constexpr,  # rows of tiles that run together, to share w in the second-level cache
    WHOLE: tl.constexpr,
    EVEN: tl.constexpr,  # whether K is a multiple of BLOCK_K
    DTYPE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """out = x W + factor * mask(scaling U V) + bias; K may be 0.

    The LoRA tile comes first: the mask then multiplies the accumulator, without further registers.
    """
    tiles_m = tl.cdiv(M, BLOCK_M)
    tiles_n = tl.cdiv(N, BLOCK_N)
    pid = tl.program_id(0)
    group = pid // (GROUP * tiles_n)
    rows = tl.minimum(tiles_m - group * GROUP, GROUP)
    pid_m = group * GROUP + pid % (GROUP * tiles_n) % rows
    pid_n = pid % (GROUP * tiles_n) // rows
    m = pid_m * BLOCK_M + tl.arange(0, BLOCK_M)
    n = pid_n * BLOCK_N + tl.arange(0, BLOCK_N)
    token = tl.minimum(m, M - 1).to(tl.int64)
    # A remainder, because a minimum would hide that columns are neighbours and split every load.
    column = (n % N).to(tl.int64)

    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for start in tl.range(0, R, BLOCK_R, num_stages=1):  # see linear.finish
        r = start + tl.arange(0, BLOCK_R)
        u = tl.load(u_ptr + token[:, None] * R + r[None, :], mask=r[None, :] < R, other=0.0)
        v_offset = r.to(tl.int64)[:, None] * stride_vr + column[None, :] * stride_vn
        v = tl.load(v_ptr + v_offset, mask=r[:, None] < R, other=0.0)
        acc = tl.dot((u * scaling).to(DTYPE), v.to(DTYPE), acc, input_precision=PRECISION)
    if seed_ptr is not None:
        kept = keep(seed_ptr, threshold, token, pid_n * BLOCK_N, N, BLOCK_N, WHOLE)
        acc = tl.where(kept, acc * factor, 0.0)

    k = tl.arange(0, BLOCK_K)
    x_tile_ptr = x_ptr + token[:, None] * K + k[None, :]
    w_tile_ptr = w_ptr + k.to(tl.int64)[:, None] * stride_wk + column[None, :] * stride_wn
    w_step = tl.cast(stride_wk, tl.int64) * BLOCK_K
    for tile in range(0, tl.cdiv(K, BLOCK_K)):
        if EVEN:
            x = tl.load(x_tile_ptr)
            w = tl.load(w_tile_ptr)
        else:
            left = K - tile * BLOCK_K
            x = tl.load(x_tile_ptr, mask=k[None, :] < left, other=0.0)
            w = tl.load(w_tile_ptr, mask=k[:, None] < left, other=0.0)
        acc = tl.dot(x.to(DTYPE), w.to(DTYPE), acc, input_precision=PRECISION)
        x_tile_ptr += BLOCK_K
        w_tile_ptr += w_step
    if bias_ptr is not None:
        acc += tl.load(bias_ptr + column).to(tl.float32)[None, :]
    element = token[:, None] * N + n[None, :]
    inside = (m[:, None] < M) & (n[None, :] < N)
    tl.store(out_ptr + element, acc.to(out_ptr.dtype.element_ty), mask=inside)
