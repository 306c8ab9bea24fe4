"""The matmul ops on the Triton kernels: one weight, or a group of weights that share x."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from nf4.backends import tuning
from nf4.backends.triton_launch import target_of
from nf4.backends.triton_lora import Stack, lora_down, lora_grad_a, lora_grad_y
from nf4.backends.triton_matmul import (
    Dropout,
    Weight,
    dense_lora,
    fused_backward,
    fused_linear,
)
from nf4.backends.triton_quantize import dequantize


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
    if tuning.carries_lora(dtype.itemsize, target_of(rows.device)):
        return dense_lora(rows, w, u, v, scaling, bias, dropout, dtype)
    # In place, which saves the copy that torch.addmm makes of what it adds to.
    return dense_lora(None, None, u, v, scaling, bias, dropout, dtype).addmm_(rows, w)


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
    lists = ([packed], [absmax], [nested_absmax], [offset], [bias], [lora_a], [lora_b], [scaling])
    (y,), (s,) = linear_lora_group(x, *lists, dropout_p, seed, block_size, format)
    return y, s


def linear_lora_group(
    x: Tensor,
    packed: list[Tensor],
    absmax: list[Tensor],
    nested_absmax: list[Tensor | None],
    offset: list[Tensor | None],
    bias: list[Tensor | None],
    lora_a: list[Tensor],
    lora_b: list[Tensor],
    scaling: list[float],
    dropout_p: float,
    seeds: Tensor | None,
    block_size: int,
    format: int,
) -> tuple[list[Tensor], list[Tensor]]:
    """ys and ss of the members. x is read once for all of the ss."""
    _check_dtype("linear_lora_group", x)
    rows = _rows(x)
    m, k = rows.shape
    lead = x.shape[:-1]
    if m == 0:
        ss = [x.new_zeros(*lead, a.shape[0], dtype=torch.float32) for a in lora_a]
        return [x.new_empty(*lead, b.shape[0]) for b in lora_b], ss
    stack = Stack(tuple(a.shape[0] for a in lora_a), Dropout.of(dropout_p, seeds))
    ss = lora_down(rows, _stacked(lora_a), stack)
    ys = []
    for i, s in enumerate(ss):
        weight = (packed[i], absmax[i], nested_absmax[i], offset[i])
        n = lora_b[i].shape[0]
        w = Weight(*weight, n, k, block_size, format)
        y = _up(rows, w, bias[i], s, lora_b[i].detach().contiguous(), scaling[i])
        ys.append(y.view(*lead, n))
    return ys, [s.view(*lead, s.shape[1]) for s in ss]


def _stacked(lora_a: list[Tensor]) -> Tensor:
    return lora_a[0].detach().contiguous() if len(lora_a) == 1 else torch.cat(lora_a).detach()


def _up(
    rows: Tensor, w: Weight, bias: Tensor | None, s: Tensor, lora_b: Tensor, scaling: float
) -> Tensor:
    """rows W^T + scaling s lora_b^T + bias: [M, N]."""
    if w.n == 0:
        return rows.new_empty(rows.shape[0], 0)
    if bias is not None:
        bias = bias.contiguous()
    config = tuning.linear(w.shape(rows.shape[0], rows.dtype), target_of(rows.device))
    if config is None:
        dense = _workspace(w, rows.dtype).t()
        return _dense_lora(rows, dense, s, lora_b.t(), scaling, bias, Dropout())
    return fused_linear(rows, w, config, bias, s, lora_b, scaling)


def _input_gradient(
    grads: Tensor, w: Weight, ds: Tensor, lora_a: Tensor, dropout: Dropout
) -> Tensor:
    """grads W + mask(ds lora_a): [M, K]."""
    config = tuning.linear_backward(w.shape(grads.shape[0], grads.dtype), target_of(grads.device))
    if config is None:
        return _dense_lora(grads, _workspace(w, grads.dtype), ds, lora_a, 1.0, None, dropout)
    return fused_backward(grads, w, config, ds, lora_a, dropout)


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
    lists = ([packed], [absmax], [nested_absmax], [offset], [lora_a], [lora_b], [scaling])
    rest = (dropout_p, seed, block_size, format, needs_dx, needs_dab)
    dx, (da,), (db,) = linear_lora_group_backward([grad_y], x, [s], *lists, *rest)
    return dx, da, db


def linear_lora_group_backward(
    grad_ys: list[Tensor],
    x: Tensor,
    ss: list[Tensor],
    packed: list[Tensor],
    absmax: list[Tensor],
    nested_absmax: list[Tensor | None],
    offset: list[Tensor | None],
    lora_a: list[Tensor],
    lora_b: list[Tensor],
    scaling: list[float],
    dropout_p: float,
    seeds: Tensor | None,
    block_size: int,
    format: int,
    needs_dx: bool,
    needs_dab: bool,
) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    """dx summed over the members, das and dbs. x is read once for all of the das."""
    _check_dtype("linear_lora_group_backward", x)
    rows = _rows(x)
    m, k = rows.shape
    dx = x.new_empty(x.shape if needs_dx and m == 0 else (0,))
    das = [torch.zeros_like(a) if needs_dab and m == 0 else a.new_empty(0) for a in lora_a]
    dbs = [torch.zeros_like(b) if needs_dab and m == 0 else b.new_empty(0) for b in lora_b]
    if m == 0 or not (needs_dx or needs_dab):
        return dx, das, dbs
    grads = [_rows(grad_y) for grad_y in grad_ys]
    stack = Stack(tuple(a.shape[0] for a in lora_a), Dropout.of(dropout_p, seeds))
    ds = x.new_empty(m * stack.size, dtype=torch.float32)
    parts = [p.view(m, r) for p, r in zip(stack.split(ds, m), stack.ranks, strict=True)]
    for i, part in enumerate(parts):
        saved = _rows(ss[i]) if needs_dab else None
        grad_b = lora_grad_y(grads[i], saved, lora_b[i].detach().contiguous(), scaling[i], part)
        if grad_b is not None:
            dbs[i] = grad_b
    if needs_dab:
        das = lora_grad_a(rows, ds, stack, lora_a[0].dtype)
    if needs_dx:
        # From the last member on: the order in which autograd adds separate calls.
        for i in reversed(range(len(parts))):
            n = lora_b[i].shape[0]
            w = Weight(packed[i], absmax[i], nested_absmax[i], offset[i], n, k, block_size, format)
            a = lora_a[i].detach().contiguous()
            part = _input_gradient(grads[i], w, parts[i], a, stack.dropout.member(i))
            dx = part if i == len(parts) - 1 else dx.add_(part)
        dx = dx.view(x.shape)
    return dx, das, dbs
