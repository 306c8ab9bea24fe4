"""Launchers for the Triton kernels of ``kernels/``."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from nf4 import formats
from nf4.backends import tuning
from nf4.backends.triton_launch import (
    bucket_table,
    decoder,
    kernel,
    launch,
    target_of,
    threshold_table,
    unsupported,
    value_table,
)
from nf4.backends.triton_matmul import (
    Dropout,
    Weight,
    cdiv,
    dense_lora,
    fused_backward,
    fused_linear,
    lora_down,
    lora_grad_a,
    lora_grad_y,
)
from nf4.backends.triton_optim import adamw_step

__all__ = ["NAME", "adamw_step", "unsupported"]

NAME = "triton"

_MAP = formats.DYNAMIC8.id


def quantize(x: Tensor, block_size: int, format: int) -> tuple[Tensor, Tensor]:
    """One launch: packed uint8 [bytes, 1] and float32 absmax [blocks] of the flattened x."""
    fmt = formats.BY_ID[format]
    flat = x.detach().contiguous().view(-1)
    if flat.dtype is torch.float64:
        flat = flat.float()
    n = flat.numel()
    packed = flat.new_empty((fmt.packed_bytes(n), 1), dtype=torch.uint8)
    absmax = flat.new_empty(cdiv(n, block_size), dtype=torch.float32)
    if n == 0:
        return packed, absmax
    config = tuning.quantize(block_size)
    blocks = config.tile // block_size
    if fmt.bits == 4:
        table = bucket_table(format, flat.device)
    else:
        table = threshold_table(format, flat.device)
    launch(
        kernel("quantize", "quantize_kernel"),
        (cdiv(n, blocks * block_size),),
        {
            "x_ptr": flat,
            "table_ptr": table,
            "packed_ptr": packed,
            "absmax_ptr": absmax,
            "numel": n,
            "bytes_": packed.numel(),
            "BLOCK_SIZE": block_size,
            "BLOCKS": blocks,
            "BUCKETS": table.numel() // 4 if fmt.bits == 4 else None,
            "SHORT": fmt.bits == 4 and n % block_size != 0,
        },
        flat.device,
        num_warps=config.num_warps,
        exact=True,
    )
    return packed, absmax


def double_quantize(absmax: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Two launches: uint8 codes [n], float32 nested_absmax [ceil(n / 256)], float32 offset []."""
    absmax = absmax.detach().contiguous()
    n, device = absmax.numel(), absmax.device
    result = torch.empty_like(absmax, dtype=torch.uint8)
    nested = absmax.new_empty(cdiv(n, formats.NESTED_BLOCK_SIZE))
    if n == 0:
        return result, nested, absmax.new_zeros(())
    offset = absmax.new_empty(())
    config = tuning.double_quantize()
    chunks = cdiv(n, formats.OFFSET_CHUNK)
    sums = absmax.new_empty(chunks, dtype=torch.float64)
    launch(
        kernel("double_quantize", "chunk_sums_kernel"),
        (cdiv(chunks, config.chunks),),
        {
            "absmax_ptr": absmax,
            "sums_ptr": sums,
            "n": n,
            "CHUNK": formats.OFFSET_CHUNK,
            "CHUNKS": config.chunks,
        },
        device,
        num_warps=1,
        exact=True,
    )
    launch(
        kernel("double_quantize", "double_quantize_kernel"),
        (cdiv(nested.numel(), config.blocks),),
        {
            "absmax_ptr": absmax,
            "sums_ptr": sums,
            "threshold_ptr": threshold_table(_MAP, device),
            "codes_ptr": result,
            "nested_ptr": nested,
            "offset_ptr": offset,
            "n": n,
            "chunks": chunks,
            "BLOCKS": config.blocks,
            "UNROLL": config.unroll,
        },
        device,
        num_warps=config.num_warps,
        exact=True,
    )
    return result, nested, offset


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
    """One launch: a new tensor of ``shape`` and ``dtype``."""
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
    """One launch into ``out``; through a new tensor where ``out`` is strided."""
    n = out.numel()
    if n == 0:
        return
    target = (
        out if out.is_contiguous() else torch.empty_like(out, memory_format=torch.contiguous_format)
    )
    config = tuning.dequantize(block_size)
    blocks = config.tile // block_size
    fmt = formats.BY_ID[format]
    launch(
        kernel("dequantize", "dequantize_kernel"),
        (cdiv(n, blocks * block_size),),
        {
            "packed_ptr": packed.contiguous(),
            "absmax_ptr": absmax.contiguous(),
            "nested_ptr": nested_absmax,
            "offset_ptr": offset,
            "map_ptr": value_table(_MAP, out.device),
            "table_ptr": value_table(format, out.device) if fmt.bits == 8 else None,
            "out_ptr": target,
            "numel": n,
            "bytes_": fmt.packed_bytes(n),
            "BLOCK_SIZE": block_size,
            "BLOCKS": blocks,
            **decoder(format, torch.float32),
        },
        out.device,
        num_warps=config.num_warps,
        exact=True,
    )
    if target is not out:
        out.copy_(target)


def _check_dtype(op: str, t: Tensor) -> None:
    if t.dtype not in (torch.float32, torch.float16, torch.bfloat16):
        raise TypeError(
            f"nf4.{op}: backend 'triton' takes float32, float16 or bfloat16, got {t.dtype}"
        )


def _rows(t: Tensor) -> Tensor:
    """t [..., F] as contiguous [M, F]."""
    return t.detach().reshape(-1, t.shape[-1]).contiguous()


def _workspace(w: Weight, dtype: torch.dtype) -> Tensor:
    """The weight as a new dense [n, k]."""
    weight = (w.packed, w.absmax, w.nested_absmax, w.offset)
    return dequantize(*weight, [w.n, w.k], w.block_size, w.format, dtype)


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
    """x [..., K] times W^T, plus bias: [..., N] of x's dtype."""
    _check_dtype("linear", x)
    rows = _rows(x)
    m, k = rows.shape
    w = Weight(packed, absmax, nested_absmax, offset, n, k, block_size, format)
    if m * n == 0:
        return x.new_empty(*x.shape[:-1], n)
    if bias is not None:
        bias = bias.contiguous()
    config = tuning.linear(w.shape(m, x.dtype), target_of(x.device))
    if config is None:
        # No LoRA term to carry: the vendor's dense product.
        y = F.linear(rows, _workspace(w, x.dtype), None if bias is None else bias.to(x.dtype))
    else:
        y = fused_linear(rows, w, config, bias)
    return y.view(*x.shape[:-1], n)


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
    """grad_y [..., N] times W: [..., K] of grad_y's dtype."""
    _check_dtype("linear_backward", grad_y)
    rows = _rows(grad_y)
    m, n = rows.shape
    w = Weight(packed, absmax, nested_absmax, offset, n, k, block_size, format)
    if m * k == 0:
        return grad_y.new_empty(*grad_y.shape[:-1], k)
    config = tuning.linear_backward(w.shape(m, grad_y.dtype), target_of(grad_y.device))
    if config is None:
        dx = torch.mm(rows, _workspace(w, grad_y.dtype))
    else:
        dx = fused_backward(rows, w, config)
    return dx.view(*grad_y.shape[:-1], k)


def _dense_lora(
    rows: Tensor,
    w: Tensor,
    u: Tensor,
    v: Tensor,
    scaling: float,
    bias: Tensor | None,
    dropout: Dropout,
) -> Tensor:
    """rows [M, K] times the dense w [K, N] plus mask(scaling * u v) plus bias."""
    dtype = rows.dtype
    if tuning.tensor_cores(dtype.itemsize, target_of(rows.device)):
        return dense_lora(rows, w, u, v, scaling, bias, dropout, dtype)
    # Without Triton on tensor cores the vendor's product is faster than one that carries LoRA.
    term = dense_lora(None, None, u, v, scaling, bias, dropout, dtype)
    return torch.addmm(term, rows, w)


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
    """y [..., N] of x's dtype, and s = dropout(x) lora_a^T, float32 [..., r]."""
    _check_dtype("linear_lora", x)
    rows = _rows(x)
    m, k = rows.shape
    r = lora_a.shape[0]
    w = Weight(packed, absmax, nested_absmax, offset, n, k, block_size, format)
    if m * n == 0:
        empty = x.new_zeros(*x.shape[:-1], r, dtype=torch.float32)
        return x.new_empty(*x.shape[:-1], n), empty
    if bias is not None:
        bias = bias.contiguous()
    lora_a, lora_b = lora_a.detach().contiguous(), lora_b.detach().contiguous()
    s = lora_down(rows, lora_a, Dropout.of(dropout_p, seed))
    config = tuning.linear(w.shape(m, x.dtype), target_of(x.device))
    if config is None:
        dense = _workspace(w, x.dtype).t()
        y = _dense_lora(rows, dense, s, lora_b.t(), scaling, bias, Dropout())
    else:
        y = fused_linear(rows, w, config, bias, s, lora_b, scaling)
    return y.view(*x.shape[:-1], n), s.view(*x.shape[:-1], r)


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
    """dx like x, and dA and dB like the adapters; empty where not needed."""
    _check_dtype("linear_lora_backward", grad_y)
    grads, rows = _rows(grad_y), _rows(x)
    (m, n), k = grads.shape, rows.shape[1]
    w = Weight(packed, absmax, nested_absmax, offset, n, k, block_size, format)
    dx, da, db = x.new_empty(0), lora_a.new_empty(0), lora_b.new_empty(0)
    lora_a, lora_b = lora_a.detach().contiguous(), lora_b.detach().contiguous()
    if m == 0:
        dx = x.new_empty(x.shape if needs_dx else (0,))
        if needs_dab:
            da, db = torch.zeros_like(lora_a), torch.zeros_like(lora_b)
        return dx, da, db
    if not (needs_dx or needs_dab):
        return dx, da, db
    dropout = Dropout.of(dropout_p, seed)
    saved = _rows(s) if needs_dab else None
    ds, grad_b = lora_grad_y(grads, saved, lora_b, scaling)
    if grad_b is not None:
        da, db = lora_grad_a(rows, ds, dropout, lora_a.dtype), grad_b
    if needs_dx:
        config = tuning.linear_backward(w.shape(m, x.dtype), target_of(x.device))
        if config is None:
            flat = _dense_lora(grads, _workspace(w, x.dtype), ds, lora_a, 1.0, None, dropout)
        else:
            flat = fused_backward(grads, w, config, ds, lora_a, dropout)
        dx = flat.view(x.shape)
    return dx, da, db
