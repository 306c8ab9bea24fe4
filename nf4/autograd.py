"""Backward formulas: ``autograd.Function`` over the ops of ``nf4.ops``.

A Function calling a library op costs about 20 us a call in eager mode, against 50 to 60 us for
``torch.library.register_autograd`` (measured on CPU, torch 2.13). Each Function keeps the op
namespace of its forward, so the backward runs on the same backend.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


def _ops(namespace: str) -> Any:
    return getattr(torch.ops, namespace)


def _bias_grad(grad_y: Tensor, bias_dtype: torch.dtype) -> Tensor:
    flat = grad_y.reshape(-1, grad_y.shape[-1])
    # float32 sums: a bf16 column sum over many tokens would lose most of its bits.
    wide = torch.float64 if flat.dtype is torch.float64 else torch.float32
    return flat.sum(dim=0, dtype=wide).to(bias_dtype)


class Linear(torch.autograd.Function):
    """y = x W^T + bias, differentiable in x and bias. Saves no copy of W, only its packed bytes."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        packed: Tensor,
        absmax: Tensor,
        nested_absmax: Tensor | None,
        offset: Tensor | None,
        bias: Tensor | None,
        n: int,
        block_size: int,
        format: int,
        namespace: str,
    ) -> Tensor:
        ctx.save_for_backward(packed, absmax, nested_absmax, offset)
        ctx.k, ctx.layout, ctx.namespace = x.shape[-1], (block_size, format), namespace
        ctx.bias_dtype = None if bias is None else bias.dtype
        return _ops(namespace).linear(
            x, packed, absmax, nested_absmax, offset, bias, n, block_size, format
        )

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_y: Tensor) -> tuple[Tensor | None, ...]:
        weight = ctx.saved_tensors
        dx = dbias = None
        if ctx.needs_input_grad[0]:
            dx = _ops(ctx.namespace).linear_backward(grad_y, *weight, ctx.k, *ctx.layout)
        if ctx.needs_input_grad[5]:
            dbias = _bias_grad(grad_y, ctx.bias_dtype)
        return (dx, None, None, None, None, dbias, None, None, None, None)


class LinearLora(torch.autograd.Function):
    """y = x W^T + bias + scaling * dropout(x) A^T B^T, differentiable in x, bias, A and B.

    Saved for the backward besides the parameters: x, the r-wide product S, and the dropout seed.
    """

    @staticmethod
    def forward(
        ctx: Any,
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
        namespace: str,
    ) -> Tensor:
        weight = (packed, absmax, nested_absmax, offset)
        lora = (lora_a, lora_b, scaling, dropout_p, seed)
        y, s = _ops(namespace).linear_lora(x, *weight, bias, *lora, n, block_size, format)
        ctx.save_for_backward(x, s, *weight, lora_a, lora_b, seed)
        ctx.scaling, ctx.dropout_p = scaling, dropout_p
        ctx.layout, ctx.namespace = (block_size, format), namespace
        ctx.bias_dtype = None if bias is None else bias.dtype
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_y: Tensor) -> tuple[Tensor | None, ...]:
        x, s, *weight, lora_a, lora_b, seed = ctx.saved_tensors
        needs_dx = ctx.needs_input_grad[0]
        needs_da, needs_db = ctx.needs_input_grad[6], ctx.needs_input_grad[7]
        dx = da = db = dbias = None
        if needs_dx or needs_da or needs_db:
            dx, da, db = _ops(ctx.namespace).linear_lora_backward(
                grad_y,
                x,
                s,
                *weight,
                lora_a,
                lora_b,
                ctx.scaling,
                ctx.dropout_p,
                seed,
                *ctx.layout,
                needs_dx,
                needs_da or needs_db,
            )
        if ctx.needs_input_grad[5]:
            dbias = _bias_grad(grad_y, ctx.bias_dtype)
        return (
            dx if needs_dx else None,
            *(None,) * 4,
            dbias,
            da if needs_da else None,
            db if needs_db else None,
            *(None,) * 7,
        )


_PER_MEMBER = 7  # tensors: the weight's four, bias, A, B
_FIXED = 7  # arguments before them


class LinearLoraGroup(torch.autograd.Function):
    """``LinearLora`` for members that share x: one output each, one gradient of x.

    Takes x, the seeds, plain values, and then each member's packed, absmax, nested_absmax, offset,
    bias, A and B. Saved for the backward besides these: x, each S, and the seeds.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        seeds: Tensor | None,
        scalings: tuple[float, ...],
        dropout_p: float,
        block_size: int,
        format: int,
        namespace: str,
        *tensors: Tensor | None,
    ) -> tuple[Tensor, ...]:
        columns = [list(tensors[i::_PER_MEMBER]) for i in range(_PER_MEMBER)]
        *weights, bias, a, b = columns
        lora = (a, b, list(scalings), dropout_p, seeds)
        ys, ss = _ops(namespace).linear_lora_group(x, *weights, bias, *lora, block_size, format)
        flat = (t for column in (*weights, a, b) for t in column)
        ctx.save_for_backward(x, seeds, *ss, *flat)
        ctx.scalings, ctx.dropout_p = scalings, dropout_p
        ctx.layout, ctx.namespace = (block_size, format), namespace
        ctx.bias_dtypes = tuple(None if t is None else t.dtype for t in bias)
        return tuple(ys)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_ys: Tensor) -> tuple[Tensor | None, ...]:
        count = len(grad_ys)
        x, seeds, *saved = ctx.saved_tensors
        ss, *weights, a, b = (list(saved[i * count : (i + 1) * count]) for i in range(7))
        needs = ctx.needs_input_grad[_FIXED:]
        needs_bias, needs_a, needs_b = (needs[i::_PER_MEMBER] for i in (4, 5, 6))
        needs_dx, needs_dab = ctx.needs_input_grad[0], any(needs_a) or any(needs_b)
        dx, das, dbs = None, [None] * count, [None] * count
        if needs_dx or needs_dab:
            lora = (a, b, list(ctx.scalings), ctx.dropout_p, seeds)
            dx, das, dbs = _ops(ctx.namespace).linear_lora_group_backward(
                list(grad_ys), x, ss, *weights, *lora, *ctx.layout, needs_dx, needs_dab
            )
        out: list[Tensor | None] = [dx if needs_dx else None]
        out += [None] * (_FIXED - 1)
        for i in range(count):
            dbias = _bias_grad(grad_ys[i], ctx.bias_dtypes[i]) if needs_bias[i] else None
            out += [None, None, None, None, dbias]
            out += [das[i] if needs_a[i] else None, dbs[i] if needs_b[i] else None]
        return tuple(out)
