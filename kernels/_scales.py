"""Tile function that reads block scales, nested or not."""

import triton
import triton.language as tl

NESTED_BLOCK_SIZE = tl.constexpr(256)
# A division would also round negative indices, which there are none of.
NESTED_SHIFT = tl.constexpr(8)


@triton.jit
def load_scale(absmax_ptr, nested_ptr, offset_ptr, map_ptr, block, mask):
    """float32 scales of ``block`` (int64 indices of any shape), 0 where ``mask`` is false.

    ``nested_ptr`` None: absmax holds them as float32. Else absmax holds uint8 codes of the 8-bit
    map at ``map_ptr``: 1 + 1/64 bytes a scale from memory and the map from cache.
    """
    if nested_ptr is None:
        scale = tl.load(absmax_ptr + block, mask=mask, other=0.0)
    else:
        code = tl.load(absmax_ptr + block, mask=mask, other=0).to(tl.int32)
        nested = tl.load(nested_ptr + (block >> NESTED_SHIFT), mask=mask, other=0.0)
        scale = tl.where(mask, tl.load(map_ptr + code) * nested + tl.load(offset_ptr), 0.0)
    return scale
