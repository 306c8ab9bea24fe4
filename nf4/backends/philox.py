"""Philox4x32-10 in plain PyTorch: the random words that every backend draws alike.

In int64 arithmetic, since PyTorch has no unsigned 32-bit one. ``nf4.ops`` states key and counter.
"""

from __future__ import annotations

import torch
from torch import Tensor

_LOW32 = 0xFFFFFFFF


def philox4x32_10(
    counter: tuple[Tensor, Tensor, Tensor, Tensor], key: tuple[Tensor, Tensor]
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The four output words for four counter words and two key words, all 32 bits in int64.

    Philox4x32-10 of Salmon et al., "Parallel Random Numbers: As Easy as 1, 2, 3" (SC 2011).
    """
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(10):
        # int64 wraps, so the high word of a 32x32 product comes from 16-bit halves.
        hi0, lo0 = _mul32(c0, 0xD2511F53)
        hi1, lo1 = _mul32(c2, 0xCD9E8D57)
        c0, c1, c2, c3 = hi1 ^ c1 ^ k0, lo1, hi0 ^ c3 ^ k1, lo0
        k0, k1 = (k0 + 0x9E3779B9) & _LOW32, (k1 + 0xBB67AE85) & _LOW32
    return c0, c1, c2, c3


def random_words(n: int, seed: Tensor, first: int = 0) -> Tensor:
    """Words ``first .. first + n - 1`` of the stream of ``seed``, int64 in 0 .. 2^32 - 1.

    ``seed`` is int64 [1]; ``first`` must be a multiple of 4. On the seed's device.
    """
    start = first // 4
    block = torch.arange(start, start - (-n // 4), dtype=torch.int64, device=seed.device)
    zero = torch.zeros_like(block)
    key = (seed[0] & _LOW32, (seed[0] >> 32) & _LOW32)
    words = philox4x32_10((block & _LOW32, block >> 32, zero, zero), key)
    return torch.stack(words, dim=1).view(-1)[:n]


def _mul32(a: Tensor, b: int) -> tuple[Tensor, Tensor]:
    """High and low 32 bits of the product of two unsigned 32-bit values held in int64."""
    low = a * (b & 0xFFFF)
    high = a * (b >> 16) + (low >> 16)
    return high >> 16, ((high & 0xFFFF) << 16) | (low & 0xFFFF)
