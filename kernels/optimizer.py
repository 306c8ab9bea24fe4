"""The AdamW step over many parameters in one launch.

Per element of a float32 parameter with 8-bit moments: 4 + 4 + 2 bytes read and 4 + 2 written, and
1/16 byte of scales; about 90 instructions, most of them two searches among 255 thresholds. The
arithmetic stands in nf4.optim.adamw; launch with floating-point fusion off.
"""

import triton
import triton.language as tl

from nf4.kernels._codes import encode8
from nf4.kernels.quantize import scale_blocks

BLOCK_SIZE = tl.constexpr(256)
INFINITY_BITS = tl.constexpr(0x7F800000)
ROW = tl.constexpr(9)  # columns of the table


@triton.jit
def _round(x, words, DTYPE: tl.constexpr):
    """x float32 cut to a 16-bit type after adding the low bits of the random words."""
    cut: tl.constexpr = 0xFFFF if tl.bfloat16 == DTYPE else 0x1FFF
    bits = x.to(tl.int32, bitcast=True)
    magnitude = bits & 0x7FFFFFFF
    value = magnitude.to(tl.float32, bitcast=True)
    if tl.float16 == DTYPE:
        # Below 2^-14 the spacing of float16 stays what it is there.
        base = tl.where(magnitude < 0x38800000, 6.103515625e-05, 0.0)
        value = value + base
    noise = words.to(tl.int32, bitcast=True) & cut
    rounded = ((value.to(tl.int32, bitcast=True) + noise) & ~cut).to(tl.float32, bitcast=True)
    if tl.float16 == DTYPE:
        rounded = rounded - base
    signed = rounded.to(tl.int32, bitcast=True) | (bits & -0x80000000)
    kept = tl.where(magnitude < INFINITY_BITS, signed, bits)
    return kept.to(tl.float32, bitcast=True).to(DTYPE)


@triton.jit
def _words(seed_ptr, first, BLOCKS: tl.constexpr):
    """Random words first .. of BLOCKS blocks, [BLOCKS, 256]; first [BLOCKS] are multiples of 4."""
    quad = first[:, None] // 4 + tl.arange(0, BLOCK_SIZE // 4)[None, :]
    low = quad.to(tl.uint32)
    high = (quad >> 32).to(tl.uint32)
    zero = tl.zeros_like(low)
    w0, w1, w2, w3 = tl.philox(tl.load(seed_ptr), low, high, zero, zero)
    return tl.reshape(tl.join(tl.join(w0, w2), tl.join(w1, w3)), (BLOCKS, BLOCK_SIZE))


@triton.jit
def _pointer(row_ptr, COLUMN: tl.constexpr, DTYPE: tl.constexpr, ALIGNED: tl.constexpr):
    """The address in one column of a parameter's row."""
    pointer = tl.load(row_ptr + COLUMN).to(tl.pointer_type(DTYPE))
    if ALIGNED:
        pointer = tl.multiple_of(pointer, 16)
    return pointer


@triton.jit
def _step_tile(
    row_ptr,  # [9] int64, see adamw_kernel
    tile,
    numel,
    hyper_ptr,
    seed_ptr,
    skipped_ptr,
    map1_ptr,
    map2_ptr,
    threshold1_ptr,
    threshold2_ptr,
    PARAM: tl.constexpr,
    GRAD: tl.constexpr,
    QUANTIZED: tl.constexpr,
    ALIGNED: tl.constexpr,
    BLOCKS: tl.constexpr,
    WHOLE: tl.constexpr,  # the tile ends within the parameter
):
    """Step BLOCKS blocks of one parameter."""
    STATE: tl.constexpr = tl.uint8 if QUANTIZED else tl.float32
    p_ptr = _pointer(row_ptr, 0, PARAM, ALIGNED)
    g_ptr = _pointer(row_ptr, 1, GRAD, ALIGNED)
    state1_ptr = _pointer(row_ptr, 2, STATE, ALIGNED)
    state2_ptr = _pointer(row_ptr, 3, STATE, ALIGNED)
    absmax1_ptr = _pointer(row_ptr, 4, tl.float32, ALIGNED)
    absmax2_ptr = _pointer(row_ptr, 5, tl.float32, ALIGNED)
    beta1, gain1 = tl.load(hyper_ptr), tl.load(hyper_ptr + 1)
    beta2, gain2 = tl.load(hyper_ptr + 2), tl.load(hyper_ptr + 3)
    inverse_c2, eps = tl.load(hyper_ptr + 4), tl.load(hyper_ptr + 5)
    decay, step_size = tl.load(hyper_ptr + 6), tl.load(hyper_ptr + 7)

    block = tile * BLOCKS + tl.arange(0, BLOCKS)  # [BLOCKS]
    element = block[:, None] * BLOCK_SIZE + tl.arange(0, BLOCK_SIZE)[None, :]
    exists = block * BLOCK_SIZE < numel
    # A mask that differs between neighbours would split every access.
    mask = tl.broadcast_to(exists[:, None], element.shape) if WHOLE else element < numel
    p = tl.load(p_ptr + element, mask=mask, other=0.0).to(tl.float32)
    g = tl.load(g_ptr + element, mask=mask, other=0.0).to(tl.float32)
    if QUANTIZED:
        code1 = tl.load(state1_ptr + element, mask=mask, other=0).to(tl.int32)
        code2 = tl.load(state2_ptr + element, mask=mask, other=0).to(tl.int32)
        scale1 = tl.load(absmax1_ptr + block, mask=exists, other=0.0)
        scale2 = tl.load(absmax2_ptr + block, mask=exists, other=0.0)
        # Past the end the codes stand for nothing, and must not raise the block's maximum.
        m = tl.load(map1_ptr + code1, mask=mask, other=0.0) * scale1[:, None]
        v = tl.load(map2_ptr + code2, mask=mask, other=0.0) * scale2[:, None]
    else:
        m = tl.load(state1_ptr + element, mask=mask, other=0.0)
        v = tl.load(state2_ptr + element, mask=mask, other=0.0)

    m = beta1 * m + gain1 * g
    v = beta2 * v + (gain2 * g) * g
    denominator = tl.math.sqrt_rn(v) * inverse_c2 + eps
    p = p * decay - step_size * tl.math.div_rn(m, denominator)

    scaled1, largest1 = scale_blocks(m)
    scaled2, largest2 = scale_blocks(v)
    finite = (largest1.to(tl.int32, bitcast=True) < INFINITY_BITS) & (
        largest2.to(tl.int32, bitcast=True) < INFINITY_BITS
    )
    left = tl.sum((exists & (finite == 0)).to(tl.int64))
    if left > 0:
        tl.atomic_add(skipped_ptr, left)
    exists = exists & finite
    mask = mask & finite[:, None]
    if seed_ptr is None or tl.float32 == PARAM:
        rounded = p.to(PARAM)
    else:
        first = tl.load(row_ptr + 7) + block * BLOCK_SIZE
        rounded = _round(p, _words(seed_ptr, first, BLOCKS), PARAM)
    tl.store(p_ptr + element, rounded, mask=mask)
    if QUANTIZED:
        rank1 = encode8(scaled1, threshold1_ptr)
        rank2 = encode8(scaled2, threshold2_ptr)
        # A positive second moment never becomes zero.
        rank2 = tl.where((v > 0) & (rank2 == 0), 1, rank2)
        tl.store(state1_ptr + element, rank1.to(tl.uint8), mask=mask)
        tl.store(state2_ptr + element, rank2.to(tl.uint8), mask=mask)
        tl.store(absmax1_ptr + block, largest1, mask=exists)
        tl.store(absmax2_ptr + block, largest2, mask=exists)
    else:
        tl.store(state1_ptr + element, m, mask=mask)
        tl.store(state2_ptr + element, v, mask=mask)


@triton.jit
def _step_kind(
    row_ptr,
    tile,
    hyper_ptr,
    seed_ptr,
    skipped_ptr,
    map1_ptr,
    map2_ptr,
    threshold1_ptr,
    threshold2_ptr,
    PARAM: tl.constexpr,
    GRAD: tl.constexpr,
    QUANTIZED: tl.constexpr,  # 8-bit moments, else float32
    ALIGNED: tl.constexpr,  # every address is a multiple of 16
    BLOCKS: tl.constexpr,
):
    """Step a tile of a parameter of one kind."""
    numel = tl.load(row_ptr + 6)
    if (tile + 1) * (BLOCKS * BLOCK_SIZE) <= numel:
        _step_tile(
            row_ptr, tile, numel, hyper_ptr, seed_ptr, skipped_ptr, map1_ptr, map2_ptr,
            threshold1_ptr, threshold2_ptr, PARAM, GRAD, QUANTIZED, ALIGNED, BLOCKS, True,
        )  # fmt: skip
    else:
        _step_tile(
            row_ptr, tile, numel, hyper_ptr, seed_ptr, skipped_ptr, map1_ptr, map2_ptr,
            threshold1_ptr, threshold2_ptr, PARAM, GRAD, QUANTIZED, ALIGNED, BLOCKS, False,
        )  # fmt: skip


@triton.jit
def adamw_kernel(
    table_ptr,  # [params, 9] int64: six addresses, numel, first random word, index into KINDS
    tiles_ptr,  # [programs, 2] int32: parameter, and tile within it
    hyper_ptr,  # [8] float32
    seed_ptr,  # [1] int64, or None: round to nearest
    skipped_ptr,  # [1] int64
    map1_ptr,  # [256] float32
    map2_ptr,  # [256] float32
    threshold1_ptr,  # [255] float32
    threshold2_ptr,  # [255] float32
    KINDS: tl.constexpr,  # dtypes of parameter and gradient, quantized, aligned: see _step_kind
    BLOCKS: tl.constexpr,  # of a tile
):
    pid = tl.program_id(0)
    row_ptr = table_ptr + tl.load(tiles_ptr + 2 * pid).to(tl.int64) * ROW
    tile = tl.load(tiles_ptr + 2 * pid + 1).to(tl.int64)
    kind = tl.load(row_ptr + 8)
    # Code of its own for each kind that the parameters have: where a load may be of any of three
    # dtypes, its conversion stands in a branch, and the next load waits for it.
    for i in tl.static_range(len(KINDS)):
        if kind == i:
            _step_kind(
                row_ptr, tile, hyper_ptr, seed_ptr, skipped_ptr, map1_ptr, map2_ptr,
                threshold1_ptr, threshold2_ptr, KINDS[i][0], KINDS[i][1], KINDS[i][2],
                KINDS[i][3], BLOCKS,
            )  # fmt: skip
