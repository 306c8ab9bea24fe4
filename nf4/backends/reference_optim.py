"""The AdamW step in plain PyTorch: the oracle of the optimizer kernels.

Every operation is one float32 rounding, in the order that ``nf4.optim.adamw`` writes down.
"""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

from nf4 import formats
from nf4.backends.philox import random_words

_BLOCK = formats.NESTED_BLOCK_SIZE


def adamw_step(
    params: list[Tensor],
    grads: list[Tensor],
    state1: list[Tensor],
    state2: list[Tensor],
    absmax1: list[Tensor],
    absmax2: list[Tensor],
    hyper: Tensor,
    seed: Tensor | None,
    offsets: list[int],
    skipped: Tensor,
) -> None:
    scalars = hyper.unbind()
    for i, (p, g) in enumerate(zip(params, grads, strict=True)):
        if p.numel() == 0:
            continue
        quantized = state1[i].dtype is torch.uint8
        if quantized:
            m = _decode(state1[i], absmax1[i], formats.DYNAMIC8)
            v = _decode(state2[i], absmax2[i], formats.DYNAMIC8_UNSIGNED)
        else:
            m, v = state1[i].view(-1), state2[i].view(-1)
        new_p, new_m, new_v = _update(p.view(-1).float(), g.view(-1).float(), m, v, scalars)
        finite = _blocks(new_m).isfinite().all(1) & _blocks(new_v).isfinite().all(1)
        keep = finite.repeat_interleave(_BLOCK)[: p.numel()]
        skipped += (~finite).sum()
        words = None
        if seed is not None and p.dtype is not torch.float32:
            words = random_words(p.numel(), seed, offsets[i])
        rounded = new_p.to(p.dtype) if words is None else stochastic_round(new_p, words, p.dtype)
        p.view(-1).copy_(torch.where(keep, rounded, p.view(-1)))
        if quantized:
            _encode(new_m, keep, state1[i], absmax1[i], formats.DYNAMIC8)
            _encode(new_v, keep, state2[i], absmax2[i], formats.DYNAMIC8_UNSIGNED)
        else:
            m.copy_(torch.where(keep, new_m, m))
            v.copy_(torch.where(keep, new_v, v))


def _update(
    p: Tensor, g: Tensor, m: Tensor, v: Tensor, scalars: tuple[Tensor, ...]
) -> tuple[Tensor, Tensor, Tensor]:
    beta1, gain1, beta2, gain2, inverse_c2, eps, decay, step_size = scalars
    m = beta1 * m + gain1 * g
    v = beta2 * v + (gain2 * g) * g
    # PyTorch's float32 sqrt on CPU is MKL's, which is at times an ulp off; through float64 it is
    # the IEEE one.
    root = v.double().sqrt().float()
    ratio = m / (root * inverse_c2 + eps)
    return p * decay - step_size * ratio, m, v


def _blocks(flat: Tensor) -> Tensor:
    """[ceil(n / 256), 256], padded with zeros."""
    return torch.nn.functional.pad(flat, (0, -flat.numel() % _BLOCK)).view(-1, _BLOCK)


@lru_cache
def _tables(format: int, device: torch.device) -> tuple[Tensor, Tensor]:
    fmt = formats.BY_ID[format]
    codes, thresholds = torch.from_numpy(fmt.values), torch.from_numpy(fmt.thresholds)
    return codes.to(device), thresholds.to(device)


def _decode(codes: Tensor, absmax: Tensor, fmt: formats.Format) -> Tensor:
    values, _ = _tables(fmt.id, codes.device)
    return values[codes.view(-1).int()] * absmax.repeat_interleave(_BLOCK)[: codes.numel()]


def _encode(x: Tensor, keep: Tensor, codes: Tensor, absmax: Tensor, fmt: formats.Format) -> None:
    _, thresholds = _tables(fmt.id, x.device)
    blocks = _blocks(x)
    block_max = blocks.abs().amax(dim=1)
    scaled = blocks * (1.0 / block_max.clamp(min=formats.ABSMAX_FLOOR))[:, None]
    # Both maps are sorted, so the rank is the code.
    rank = torch.bucketize(scaled.view(-1)[: x.numel()], thresholds, out_int32=True)
    if fmt is formats.DYNAMIC8_UNSIGNED:
        rank = torch.maximum(rank, (x > 0).int())
    codes.view(-1).copy_(torch.where(keep, rank.to(torch.uint8), codes.view(-1)))
    absmax.copy_(torch.where(keep[::_BLOCK], block_max, absmax))


def stochastic_round(x: Tensor, words: Tensor, dtype: torch.dtype) -> Tensor:
    """Round float32 ``x`` to a neighbour in ``dtype``, up with the probability of the remainder.

    The low bits of ``words`` (16 for bfloat16, 13 for float16) are added to the magnitude's bits,
    which are then cut off; float16 adds 2^-14 meanwhile where its spacing stops shrinking.
    """
    bits = 16 if dtype is torch.bfloat16 else 13
    magnitude = x.abs()
    base = torch.zeros_like(x)
    if dtype is torch.float16:
        base = torch.where(magnitude < 2.0**-14, 2.0**-14, 0.0)
    noise = (words & ((1 << bits) - 1)).int()
    raised = ((magnitude + base).view(torch.int32) + noise) & -(1 << bits)
    rounded = torch.copysign(raised.view(torch.float32) - base, x)
    return torch.where(x.isfinite(), rounded, x).to(dtype)
