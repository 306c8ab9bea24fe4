"""Tile function that regenerates the dropout mask: nothing of it is ever stored."""

import triton
import triton.language as tl


@triton.jit
def keep(seed_ptr, threshold, m, start, K, BLOCK: tl.constexpr, WHOLE: tl.constexpr):
    """Whether elements [m, start .. start + BLOCK) of a [M, K] tensor are kept, bool [A, BLOCK].

    The rule of nf4.ops: word ``e % 4`` of Philox4x32-10 at counter ``e // 4`` is at least
    ``threshold`` (the bits of a uint32 in an int32). WHOLE: K and start are multiples of 4, so
    that each counter serves four neighbours; else every element computes its own, four times the
    work. About 60 instructions a counter.
    """
    seed = tl.load(seed_ptr)
    if WHOLE:
        quad = m.to(tl.int64)[:, None] * (K // 4) + start // 4 + tl.arange(0, BLOCK // 4)[None, :]
        low = quad.to(tl.uint32)
        high = (quad >> 32).to(tl.uint32)
        zero = tl.zeros_like(low)
        w0, w1, w2, w3 = tl.philox(seed, low, high, zero, zero)  # [A, BLOCK / 4]
        words = tl.reshape(tl.join(tl.join(w0, w2), tl.join(w1, w3)), (m.shape[0], BLOCK))
    else:
        element = m.to(tl.int64)[:, None] * K + start + tl.arange(0, BLOCK)[None, :]
        quad = element >> 2
        low = quad.to(tl.uint32)
        high = (quad >> 32).to(tl.uint32)
        zero = tl.zeros_like(low)
        w0, w1, w2, w3 = tl.philox(seed, low, high, zero, zero)  # [A, BLOCK]
        odd = (element & 1) != 0
        words = tl.where((element & 2) != 0, tl.where(odd, w3, w2), tl.where(odd, w1, w0))
    return words >= tl.cast(threshold, tl.uint32)
