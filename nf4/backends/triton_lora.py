"""Launchers of LoRA's down-projection and gradients, for adapters that share x."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from nf4.backends import tuning
from nf4.backends.triton_launch import kernel, launch, target_of
from nf4.backends.triton_matmul import Dropout, cdiv, products, sum_partials


@dataclass(frozen=True)
class Stack:
    """LoRA adapters that share x: the rows of their A, and their own dropout masks."""

    ranks: tuple[int, ...]
    dropout: Dropout

    @property
    def size(self) -> int:
        """Rows of the stacked A."""
        return sum(self.ranks)

    @property
    def tiled_rank(self) -> int:
        """Rows that can lie in one tile: all, or where masks differ those of one member."""
        return self.size if self.dropout.seed is None else max(self.ranks)

    def split(self, buffer: Tensor, each: int) -> list[Tensor]:
        """The members' parts of a buffer [..., size * each], as views."""
        return list(buffer.split([each * r for r in self.ranks], dim=-1))

    def tiles(self, block_r: int, device: torch.device) -> tuple[int, Tensor | None]:
        """The number of tiles, and the table of their rows, None for a single member."""
        if len(self.ranks) == 1:
            return cdiv(self.size, block_r), None
        table = _table(self.ranks, block_r, self.dropout.seed is not None, device)
        return table.shape[0] // block_r, table


# Never dropped: a captured graph may read it at every replay.
@cache
def _table(ranks: tuple[int, ...], block_r: int, separate: bool, device: torch.device) -> Tensor:
    """int32 [tiles * block_r, 4], as ``kernels/_stack.py`` reads it.

    ``separate``: every member begins a tile of its own.
    """
    table: list[tuple[int, int, int, int]] = []
    row = 0
    for member, r in enumerate(ranks):
        table += [(row + column, column, r, member) for column in range(r)]
        row += r
        if separate or row == sum(ranks):
            table += [(0, 0, 0, member)] * (-len(table) % block_r)
    return torch.tensor(table, dtype=torch.int32).to(device)


def lora_down(x: Tensor, lora_a: Tensor, stack: Stack) -> list[Tensor]:
    """dropout(x) lora_a^T for each member of the stack, whose A are stacked in ``lora_a``.

    float32 [M, r] each.
    """
    m, k = x.shape
    config = tuning.lora_down(m, k, stack.tiled_rank, x.dtype.itemsize, target_of(x.device))
    tiles, table = stack.tiles(config.block_n, x.device)
    dropout, size = stack.dropout, stack.size
    out = x.new_empty(config.split, m * size, dtype=torch.float32)
    arguments = dropout.arguments(k)
    if config.split > 1:
        arguments["factor"] = 1.0
    launch(
        kernel("linear_lora", "lora_down_kernel"),
        # Tiles of one x run together, so that x comes from memory once also where masks differ.
        (tiles, cdiv(m, config.block_m), config.split),
        {
            "x_ptr": x,
            "a_ptr": lora_a,
            "table_ptr": table,
            **arguments,
            "out_ptr": out,
            "M": m,
            "K": k,
            "R": size,
            "BLOCK_M": config.block_m,
            "BLOCK_R": config.block_n,
            "BLOCK_K": config.block_k,
            "SPLIT": config.split,
            **products(x.dtype, x.device),
        },
        x.device,
        num_warps=config.num_warps,
        num_stages=config.num_stages,
    )
    if config.split == 1 and len(stack.ranks) == 1:
        return [out.view(m, size)]
    factor = dropout.factor if config.split > 1 else 1.0
    # Into tensors of their own: results of an op must not share a storage.
    return [
        sum_partials(part, (m, r), torch.float32, factor, None)
        for part, r in zip(stack.split(out, m), stack.ranks, strict=True)
    ]


def lora_grad_y(
    grad_y: Tensor, s: Tensor | None, lora_b: Tensor, scaling: float, out: Tensor
) -> Tensor | None:
    """ds = scaling * grad_y lora_b into ``out``, float32 [M, R].

    With s the result is dB = scaling * grad_y^T s: [N, R].
    """
    m, n = grad_y.shape
    r, device = lora_b.shape[1], grad_y.device
    config = tuning.lora_grad_y(m, n, r, grad_y.dtype.itemsize, target_of(device))
    tiles = cdiv(n, config.block_n)
    ds = grad_y.new_empty(tiles, m, r, dtype=torch.float32)
    db = grad_y.new_empty(config.split, n, r, dtype=torch.float32) if s is not None else None
    tile_r = tuning.lora_tile(r)
    launch(
        kernel("linear_lora_backward", "lora_grad_y_kernel"),
        (cdiv(r, tile_r), tiles, config.split),
        {
            "g_ptr": grad_y,
            "s_ptr": s,
            "b_ptr": lora_b,
            "ds_ptr": ds,
            "db_ptr": ds if db is None else db,
            "M": m,
            "N": n,
            "R": r,
            "BLOCK_M": config.block_m,
            "BLOCK_N": config.block_n,
            "BLOCK_R": tile_r,
            "SLICES": config.split,
            **products(grad_y.dtype, device),
        },
        device,
        num_warps=config.num_warps,
        num_stages=config.num_stages,
    )
    sum_partials(ds, (m, r), torch.float32, scaling, None, out)
    return None if db is None else sum_partials(db, (n, r), lora_b.dtype, scaling, None)


def lora_grad_a(x: Tensor, ds: Tensor, stack: Stack, dtype: torch.dtype) -> list[Tensor]:
    """dA = ds^T dropout(x) for each member: [r, K]; ``ds`` holds their [M, r] as ``lora_down``."""
    m, k = x.shape
    dropout, size = stack.dropout, stack.size
    config = tuning.lora_grad(
        m, k, stack.tiled_rank, dropout.seed is not None, x.dtype.itemsize, target_of(x.device)
    )
    tile_r = tuning.lora_tile(stack.tiled_rank)
    tiles, table = stack.tiles(tile_r, x.device)
    da = x.new_empty(config.split, size * k, dtype=torch.float32)
    arguments = dropout.arguments(k)
    factor = arguments.pop("factor")
    launch(
        kernel("linear_lora_backward", "lora_grad_a_kernel"),
        (tiles, cdiv(k, config.block_n), config.split),
        {
            "x_ptr": x,
            "ds_ptr": ds,
            "table_ptr": table,
            **arguments,
            "da_ptr": da,
            "M": m,
            "K": k,
            "R": size,
            "BLOCK_M": config.block_m,
            "BLOCK_K": config.block_n,
            "BLOCK_R": tile_r,
            "SLICES": config.split,
            **products(x.dtype, x.device),
        },
        x.device,
        num_warps=config.num_warps,
        num_stages=config.num_stages,
    )
    return [
        sum_partials(part, (r, k), dtype, factor, None)
        for part, r in zip(stack.split(da, k), stack.ranks, strict=True)
    ]
