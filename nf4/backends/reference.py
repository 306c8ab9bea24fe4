"""Plain PyTorch on any device: the oracle that every other backend is tested against.

Quantization and dequantization follow ``nf4.formats`` word for word. Matmuls decode the weight to
float32 (float64 for float64 inputs) and multiply in that precision.
"""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

from nf4 import formats
from nf4.backends.philox import random_words
from nf4.backends.reference_optim import adamw_step

__all__ = [
    "adamw_step",
    "dequantize",
    "dequantize_out",
    "double_quantize",
    "dropout_mask",
    "linear",
    "linear_backward",
    "linear_lora",
    "linear_lora_backward",
    "quantize",
    "unsupported",
]

NAME = "reference"


def unsupported(device: torch.device) -> str | None:
    """Why this backend cannot run on ``device``, or None."""
    return None


@lru_cache
def _tables(format: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    fmt = formats.BY_ID[format]
    codes = torch.from_numpy(fmt.values.copy()).to(device)
    thresholds = torch.from_numpy(fmt.thresholds.copy()).to(device)
    order = torch.tensor(fmt.order, dtype=torch.uint8, device=device)
    return codes, thresholds, order


def _rank(v: Tensor, format: int) -> Tensor:
    """Code of each scaled value: the number of thresholds strictly below it, in code order."""
    _, thresholds, order = _tables(format, v.device)
    return order[torch.bucketize(v, thresholds, out_int32=True)]


def quantize(x: Tensor, block_size: int, format: int) -> tuple[Tensor, Tensor]:
    fmt = formats.BY_ID[format]
    flat = x.detach().reshape(-1).float()
    n = flat.numel()
    full = n - n % block_size
    blocks = flat[:full].view(-1, block_size)
    absmax = blocks.abs().amax(dim=1) if full else flat.new_empty(0)
    scale = 1.0 / absmax.clamp(min=formats.ABSMAX_FLOOR)
    scaled = (blocks * scale[:, None]).view(-1)
    if n > full:
        tail = flat[full:]
        tail_max = tail.abs().amax().reshape(1)
        if fmt.bits == 4:
            tail_max = tail_max.clamp(min=formats.ABSMAX_FLOOR)
            tail = tail / tail_max
        else:
            tail = tail * (1.0 / tail_max.clamp(min=formats.ABSMAX_FLOOR))
        absmax = torch.cat([absmax, tail_max])
        scaled = torch.cat([scaled, tail])
    codes = _rank(scaled, format)
    if fmt.bits == 4:
        if n % 2:
            codes = torch.cat([codes, codes.new_full((1,), fmt.zero_code)])
        codes = (codes[0::2] << 4) | codes[1::2]
    return codes.reshape(-1, 1), absmax


def double_quantize(absmax: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    n = absmax.numel()
    total = torch.zeros((), dtype=torch.float64)
    # In index order within a chunk and over chunks, so that every backend rounds alike.
    padded = torch.zeros(-(-n // formats.OFFSET_CHUNK) * formats.OFFSET_CHUNK, dtype=torch.float64)
    padded[:n] = absmax
    columns = padded.view(-1, formats.OFFSET_CHUNK).unbind(dim=1)
    chunk_sums = torch.zeros_like(columns[0])
    for column in columns:
        chunk_sums += column
    for chunk_sum in chunk_sums.tolist():
        total += chunk_sum
    offset = (total / max(n, 1)).to(torch.float32).to(absmax.device)
    codes, nested_absmax = quantize(absmax - offset, formats.NESTED_BLOCK_SIZE, formats.DYNAMIC8.id)
    return codes.view(-1), nested_absmax, offset


def _scales(absmax: Tensor, nested_absmax: Tensor | None, offset: Tensor | None) -> Tensor:
    """float32 scale of each block."""
    if nested_absmax is None or offset is None:
        return absmax
    codes, _, _ = _tables(formats.DYNAMIC8.id, absmax.device)
    nested = nested_absmax.repeat_interleave(formats.NESTED_BLOCK_SIZE)[: absmax.numel()]
    return codes[absmax.view(-1).long()] * nested + offset


def _dequantize_flat(
    packed: Tensor,
    absmax: Tensor,
    nested_absmax: Tensor | None,
    offset: Tensor | None,
    numel: int,
    block_size: int,
    format: int,
) -> Tensor:
    table, _, _ = _tables(format, packed.device)
    raw = packed.view(-1)
    if formats.BY_ID[format].bits == 4:
        raw = torch.stack([raw >> 4, raw & 0xF], dim=1).view(-1)[:numel]
    values = table[raw.long()]
    scales = _scales(absmax, nested_absmax, offset)
    return values * scales.repeat_interleave(block_size)[:numel]


def dequantize(
    packed: Tensor,
    absmax: Tensor,
    nested_absmax: Tensor | None,
    offset: Tensor | None,
    shape: list[int],
    block_size: int,
    format: int,
    dtype: torch.dtype,
) -> Tensor:
    out = torch.empty(shape, dtype=dtype, device=packed.device)
    dequantize_out(packed, absmax, nested_absmax, offset, block_size, format, out)
    return out


def dequantize_out(
    packed: Tensor,
    absmax: Tensor,
    nested_absmax: Tensor | None,
    offset: Tensor | None,
    block_size: int,
    format: int,
    out: Tensor,
) -> None:
    weight = (packed, absmax, nested_absmax, offset)
    out.copy_(_dequantize_flat(*weight, out.numel(), block_size, format).view(out.shape))


def _matmul_dtype(t: Tensor) -> torch.dtype:
    return torch.float64 if t.dtype is torch.float64 else torch.float32


def linear(
    x: Tensor,
    packed: Tensor,
    absmax: Tensor,
    nested_absmax: Tensor | None,
    offset: Tensor | None,
    bias: Tensor | None,
    n: int,
    block_size: int,
    format: int,
) -> Tensor:
    dtype = _matmul_dtype(x)
    weight = (packed, absmax, nested_absmax, offset)
    w = dequantize(*weight, [n, x.shape[-1]], block_size, format, torch.float32).to(dtype)
    y = x.to(dtype) @ w.t()
    if bias is not None:
        y = y + bias.to(dtype)
    return y.to(x.dtype)


def linear_backward(
    grad_y: Tensor,
    packed: Tensor,
    absmax: Tensor,
    nested_absmax: Tensor | None,
    offset: Tensor | None,
    k: int,
    block_size: int,
    format: int,
) -> Tensor:
    dtype = _matmul_dtype(grad_y)
    weight = (packed, absmax, nested_absmax, offset)
    w = dequantize(*weight, [grad_y.shape[-1], k], block_size, format, torch.float32).to(dtype)
    return (grad_y.to(dtype) @ w).to(grad_y.dtype)


def dropout_mask(shape: torch.Size, dropout_p: float, seed: Tensor) -> Tensor:
    """Multiplier of each element: 0 where dropped, ``1 / (1 - dropout_p)`` where kept.

    float32, on the seed's device. The rule stands in ``nf4.ops``.
    """
    keep = random_words(shape.numel(), seed) >= round(dropout_p * 2**32)
    return (keep.to(torch.float32) * (1.0 / (1.0 - dropout_p))).view(shape)


def _dropout(x: Tensor, dropout_p: float, seed: Tensor | None) -> Tensor:
    if dropout_p == 0.0 or seed is None:
        return x
    return x * dropout_mask(x.shape, dropout_p, seed).to(x.dtype)


def linear_lora(
    x: Tensor,
    packed: Tensor,
    absmax: Tensor,
    nested_absmax: Tensor | None,
    offset: Tensor | None,
    bias: Tensor | None,
    lora_a: Tensor,
    lora_b: Tensor,
    scaling: float,
    dropout_p: float,
    seed: Tensor | None,
    n: int,
    block_size: int,
    format: int,
) -> tuple[Tensor, Tensor]:
    dtype = _matmul_dtype(x)
    wide = x.to(dtype)
    weight = (packed, absmax, nested_absmax, offset)
    y = linear(wide, *weight, bias, n, block_size, format)
    s = _dropout(wide, dropout_p, seed) @ lora_a.to(dtype).t()
    y = y + scaling * (s @ lora_b.to(dtype).t())
    return y.to(x.dtype), s


def linear_lora_backward(
    grad_y: Tensor,
    x: Tensor,
    s: Tensor,
    packed: Tensor,
    absmax: Tensor,
    nested_absmax: Tensor | None,
    offset: Tensor | None,
    lora_a: Tensor,
    lora_b: Tensor,
    scaling: float,
    dropout_p: float,
    seed: Tensor | None,
    block_size: int,
    format: int,
    needs_dx: bool,
    needs_dab: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    dtype = _matmul_dtype(x)
    k = x.shape[-1]
    g = grad_y.to(dtype)
    ds = scaling * (g @ lora_b.to(dtype))
    dx, da, db = x.new_empty(0), lora_a.new_empty(0), lora_b.new_empty(0)
    if needs_dx:
        weight = (packed, absmax, nested_absmax, offset)
        base = linear_backward(g, *weight, k, block_size, format)
        dx = (base + _dropout(ds @ lora_a.to(dtype), dropout_p, seed)).to(x.dtype)
    if needs_dab:
        r = lora_a.shape[0]
        dropped = _dropout(x.to(dtype), dropout_p, seed)
        da = (ds.reshape(-1, r).t() @ dropped.reshape(-1, k)).to(lora_a.dtype)
        db = (scaling * (g.reshape(-1, g.shape[-1]).t() @ s.to(dtype).reshape(-1, r))).to(
            lora_b.dtype
        )
    return dx, da, db
