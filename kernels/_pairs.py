"""Tile function that takes a word apart into the two neighbours that it holds."""

import triton
import triton.language as tl


@triton.jit
def load_pairs(x_ptr, pair, mask):
    """Elements ``2 * pair`` and ``2 * pair + 1``, float32, in one load; 0 where mask is false.

    x_ptr is aligned to two elements. A pair of registers' halves needs no instruction to take
    apart, and none to bring two codes into one byte.
    """
    DTYPE: tl.constexpr = x_ptr.dtype.element_ty
    WORD: tl.constexpr = tl.int64 if tl.float32 == DTYPE else tl.int32
    word_ptr = x_ptr.to(tl.pointer_type(WORD)) + pair
    word = tl.load(word_ptr) if mask is None else tl.load(word_ptr, mask=mask, other=0)
    if tl.bfloat16 == DTYPE:
        first = (word << 16).to(tl.float32, bitcast=True)
        second = (word & -65536).to(tl.float32, bitcast=True)
    elif tl.float16 == DTYPE:
        first = word.to(tl.int16).to(DTYPE, bitcast=True)
        second = (word >> 16).to(tl.int16).to(DTYPE, bitcast=True)
    else:
        first = word.to(tl.int32).to(DTYPE, bitcast=True)
        second = (word >> 32).to(tl.int32).to(DTYPE, bitcast=True)
    return first.to(tl.float32), second.to(tl.float32)
