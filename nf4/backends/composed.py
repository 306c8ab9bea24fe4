"""Ops made of a backend's other ops, for the backends that have no kernel of their own for them.

The results are those of the separate calls bit for bit, which makes this the oracle too. A backend
module takes an op over by defining it (Python) or by registering it (C++).
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

__all__ = ["linear_lora_group", "linear_lora_group_backward"]


def _seed(seeds: Tensor | None, member: int) -> Tensor | None:
    return None if seeds is None else seeds[member : member + 1]


def linear_lora_group(
    ops: Any,
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
    """``ops.linear_lora`` for each member; ``ops`` is the op namespace of one backend."""
    ys, ss = [], []
    for i in range(len(packed)):
        weight = (packed[i], absmax[i], nested_absmax[i], offset[i])
        lora = (lora_a[i], lora_b[i], scaling[i], dropout_p, _seed(seeds, i))
        n = lora_b[i].shape[0]
        y, s = ops.linear_lora(x, *weight, bias[i], *lora, n, block_size, format)
        ys.append(y)
        ss.append(s)
    return ys, ss


def linear_lora_group_backward(
    ops: Any,
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
    """``ops.linear_lora_backward`` for each member; dx is summed from the last member on.

    That is the order, and the rounding, in which autograd adds the gradients of separate calls.
    """
    dx = x.new_empty(0)
    das, dbs = [], []
    for i in reversed(range(len(packed))):
        weight = (packed[i], absmax[i], nested_absmax[i], offset[i])
        lora = (lora_a[i], lora_b[i], scaling[i], dropout_p, _seed(seeds, i))
        needs = (needs_dx, needs_dab)
        part, da, db = ops.linear_lora_backward(
            grad_ys[i], x, ss[i], *weight, *lora, block_size, format, *needs
        )
        dx = part if i == len(packed) - 1 else dx.add_(part)
        das.append(da)
        dbs.append(db)
    return dx, das[::-1], dbs[::-1]
