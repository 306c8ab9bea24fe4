"""y = x W^T (+ bias) (+ scaling s B^T) on packed weights, and the sum of split partial results.

Per weight, nested and block size 64: 0.516 bytes read; 2.6 instructions to decode to 16 bits, by a
static count, and 2 M flops on the tensor cores; 2 R M more flops a row of W for LoRA. Activations:
2 M (K + N) bytes, and 8 M N a part of a split reduction (written and read once).

Per row and block one scale: the product of a tile with the bare codes is scaled in float32, which
is also closer to float64 than weights rounded to bfloat16 are. The transposed product W x^T puts
weights on the wide side of the matrix instruction (16 or 64 rows) and tokens on the narrow one (8),
so that decode wastes little.
"""

import triton
import triton.language as tl

from nf4.kernels._codes import decode, interleave
from nf4.kernels._scales import load_scale


@triton.jit
def finish(
    acc,  # [BLOCK_N, TOKENS] float32
    s_ptr,  # [M, R] float32 or None
    b_ptr,  # [N, R] any float
    bias_ptr,
    out_ptr,
    n,  # [BLOCK_N]
    row,  # the same in bounds, int64
    m,  # [TOKENS]
    token,  # the same in bounds, int64
    M,
    N,
    R,
    scaling,
    split,
    BLOCK_R: tl.constexpr,
    SPLIT: tl.constexpr,
    DTYPE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Store acc + B (scaling s)^T + bias. The up-projection is further tiles of the reduction."""
    if s_ptr is not None:
        r_end = tl.where(split == SPLIT - 1, R, 0)
        # Not pipelined: a second buffer would not fit beside the main loop's on sm_86.
        for start in tl.range(0, r_end, BLOCK_R, num_stages=1):
            r = start + tl.arange(0, BLOCK_R)
            b = tl.load(b_ptr + row[:, None] * R + r[None, :], mask=r[None, :] < R, other=0.0)
            s = tl.load(s_ptr + token[None, :] * R + r[:, None], mask=r[:, None] < R, other=0.0)
            acc = tl.dot(b.to(DTYPE), (s * scaling).to(DTYPE), acc, input_precision=PRECISION)
    inside = (n[:, None] < N) & (m[None, :] < M)
    element = token[None, :] * N + n[:, None]
    if SPLIT == 1:
        if bias_ptr is not None:
            acc += tl.load(bias_ptr + row).to(tl.float32)[:, None]
        tl.store(out_ptr + element, acc.to(out_ptr.dtype.element_ty), mask=inside)
    else:
        element += split.to(tl.int64) * M * N
        tl.store(out_ptr + element, acc, mask=inside)


@triton.jit(do_not_specialize_on_alignment=["M"])
def linear_kernel(
    x_ptr,  # [M, K]
    packed_ptr,  # [N * K / 2] uint8
    absmax_ptr,  # [N * K / BLOCK_SIZE] float32, or uint8 when nested
    nested_ptr,  # [ceil(blocks / 256)] float32 or None
    offset_ptr,  # [] float32 or None
    map_ptr,  # [256] float32, the map of nested scales
    bias_ptr,  # [N] or None
    s_ptr,  # [M, R] float32 or None
    b_ptr,  # [N, R] or None
    out_ptr,  # [M, N], or float32 [SPLIT, M, N] partial sums without bias
    M,
    N,
    K,  # a multiple of BLOCK_SIZE, so that no block crosses rows
    R,
    scaling,
    BLOCK_SIZE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,  # divides BLOCK_SIZE: one scale a row and tile
    BLOCK_R: tl.constexpr,
    SPLIT: tl.constexpr,
    DTYPE: tl.constexpr,  # that products are taken in
    PRECISION: tl.constexpr,
    PERMUTE: tl.constexpr,
    TWICE: tl.constexpr,  # two products with half of the tokens each
    CODES: tl.constexpr,
    ASM: tl.constexpr,
    CONSTRAINTS: tl.constexpr,
):
    HALF: tl.constexpr = BLOCK_K // 2
    TOKENS: tl.constexpr = BLOCK_M // 2 if TWICE else BLOCK_M
    split = tl.program_id(2)
    # Tiles of tokens run next to each other, so that weights come from memory once for all.
    n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)  # [BLOCK_N]
    m = tl.program_id(0) * BLOCK_M + tl.arange(0, TOKENS)  # [TOKENS]
    # Past the end the last row is read again and its result dropped: no masks in the loop.
    row = tl.minimum(n, N - 1).to(tl.int64)
    token = tl.minimum(m, M - 1).to(tl.int64)

    tiles = K // BLOCK_K
    each = (tiles + SPLIT - 1) // SPLIT
    start = split * each
    end = tl.minimum(start + each, tiles)
    # K is a multiple of 32, which the compiler must see in the pitch to load 16 bytes at a time.
    # Triton 3.9 fails on sm_100 where a whole row of the tile is that short.
    pitch = K // 2 if HALF < 32 else K // 32 * 16
    byte_ptr = packed_ptr + row[:, None] * pitch + tl.arange(0, HALF)[None, :]
    k = tl.arange(0, BLOCK_K)
    if PERMUTE:
        # The order of a reduction is free. In this one the bytes that a thread of a quad feeds to
        # wgmma from registers are neighbours in memory: one wide load for a byte at a time.
        k = k % 8 // 2 * (BLOCK_K // 4) + k // 8 * 2 + k % 2
        k = tl.max_contiguous(tl.multiple_of(k, 2), 2)
    x_tile_ptr = x_ptr + token[None, :] * K + k[:, None]
    first_block = row * (K // BLOCK_SIZE)
    everywhere = n >= 0

    acc = tl.zeros((BLOCK_N, TOKENS), tl.float32)
    if TWICE:
        # mma.sync gives square tiles to warps in two rows and two columns, which both decode the
        # weights they share: 9.7 instructions a weight on sm_80, and 7.2 by halves (static counts).
        acc2 = tl.zeros((BLOCK_N, TOKENS), tl.float32)
        token2 = tl.minimum(m + TOKENS, M - 1).to(tl.int64)
        x_tile_ptr2 = x_ptr + token2[None, :] * K + k[:, None]
    block = first_block + tl.minimum(start, tiles - 1) * BLOCK_K // BLOCK_SIZE
    next_scale = load_scale(absmax_ptr, nested_ptr, offset_ptr, map_ptr, block, everywhere)
    for tile in range(start, end):
        # Read a tile ahead: a scale is used outside the product, so the pipeliner leaves it alone.
        scale = next_scale
        block = first_block + tl.minimum(tile + 1, end - 1) * BLOCK_K // BLOCK_SIZE
        next_scale = load_scale(absmax_ptr, nested_ptr, offset_ptr, map_ptr, block, everywhere)
        packed = tl.load(byte_ptr + tile * HALF)
        x = tl.load(x_tile_ptr + tile * BLOCK_K).to(DTYPE)
        if PERMUTE:
            quads = tl.reshape(packed, (BLOCK_N, 4, HALF // 4))
            packed = tl.reshape(tl.permute(quads, (0, 2, 1)), (BLOCK_N, HALF))
        first, second = decode(packed, CODES, ASM, CONSTRAINTS, DTYPE)
        w = interleave(first, second)  # [BLOCK_N, BLOCK_K]
        acc += tl.dot(w, x, input_precision=PRECISION) * scale[:, None]
        if TWICE:
            x = tl.load(x_tile_ptr2 + tile * BLOCK_K).to(DTYPE)
            acc2 += tl.dot(w, x, input_precision=PRECISION) * scale[:, None]

    finish(
        acc, s_ptr, b_ptr, bias_ptr, out_ptr, n, row, m, token, M, N, R, scaling, split,
        BLOCK_R, SPLIT, DTYPE, PRECISION,
    )  # fmt: skip
    if TWICE:
        finish(
            acc2, s_ptr, b_ptr, bias_ptr, out_ptr, n, row, m + TOKENS, token2, M, N, R, scaling,
            split, BLOCK_R, SPLIT, DTYPE, PRECISION,
        )  # fmt: skip


@triton.jit
def sum_partials_kernel(
    partial_ptr,  # float32 [COUNT, numel], the parts ``stride`` elements apart
    bias_ptr,  # [N] or None, added to each row of N
    out_ptr,  # [numel]
    numel,
    stride,
    N,
    factor,
    COUNT: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """out = factor * (the sum of the partial results, in order) + bias."""
    element = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = element < numel
    total = tl.zeros((BLOCK,), tl.float32)
    # A load takes 0.45 us where it waits for the one before: eight are in flight.
    for _ in range(COUNT // 8):
        for i in tl.static_range(8):
            part_ptr = partial_ptr + tl.cast(stride, tl.int64) * i + element
            total += tl.load(part_ptr, mask=inside, other=0.0)
        partial_ptr += tl.cast(stride, tl.int64) * 8
    for i in tl.static_range(COUNT % 8):
        part_ptr = partial_ptr + tl.cast(stride, tl.int64) * i + element
        total += tl.load(part_ptr, mask=inside, other=0.0)
    total *= factor
    if bias_ptr is not None:
        total += tl.load(bias_ptr + element % N, mask=inside, other=0.0).to(tl.float32)
    tl.store(out_ptr + element, total.to(out_ptr.dtype.element_ty), mask=inside)
