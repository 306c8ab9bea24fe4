"""Launcher of the optimizer kernel: one launch for all parameters, of any dtypes."""

from __future__ import annotations

from collections import OrderedDict
from typing import Any

import torch
from torch import Tensor

from nf4 import formats
from nf4.backends.triton_launch import kernel, launch, threshold_table, value_table

_BLOCK = formats.NESTED_BLOCK_SIZE
# Blocks of a program: 1024 elements, eight for each thread of four warps.
_TILE_BLOCKS = 4
# Address tables of past launches by their content, and the pinned memory they came from. Gradients
# come back at the same addresses, so that a step seldom has to upload one.
_TABLES: OrderedDict[Any, tuple[Tensor, ...]] = OrderedDict()
_MAX_TABLES = 64
# The tables that captured graphs read, which may be replayed as long as the process lives.
_CAPTURED: list[tuple[Tensor, ...]] = []
_FLOATS = (torch.float32, torch.float16, torch.bfloat16)


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
    """One launch. The kernel has code for each kind of parameter among them, and for no other."""
    kinds, places = [], []
    for i, p in enumerate(params):
        tensors = (p, grads[i], state1[i], state2[i], absmax1[i], absmax2[i])
        for t in tensors:
            if not t.is_contiguous():
                raise ValueError("nf4.adamw_step: every tensor must be contiguous")
        for name, dtype in (("parameters", p.dtype), ("gradients", grads[i].dtype)):
            if dtype not in _FLOATS:
                raise TypeError(
                    f"nf4.adamw_step: {name} must be float32, float16 or bfloat16, got {dtype}"
                )
        if p.numel() > 0:
            addresses = [t.data_ptr() for t in tensors]
            aligned = all(address % 16 == 0 for address in addresses)
            kinds.append((p.dtype, grads[i].dtype, state1[i].dtype is torch.uint8, aligned))
            places.append((*addresses, p.numel(), offsets[i]))
    if not places:
        return
    # In one order, whatever the parameters' is: each tuple of kinds is compiled.
    present = sorted(set(kinds), key=str)
    rows = [(*place, present.index(kind)) for place, kind in zip(places, kinds, strict=True)]
    device = hyper.device
    table, tiles = _tables(tuple(rows), device)
    signed, unsigned = formats.DYNAMIC8.id, formats.DYNAMIC8_UNSIGNED.id
    launch(
        kernel("optimizer", "adamw_kernel"),
        (tiles.shape[0],),
        {
            "table_ptr": table,
            "tiles_ptr": tiles,
            "hyper_ptr": hyper,
            "seed_ptr": seed,
            "skipped_ptr": skipped,
            "map1_ptr": value_table(signed, device),
            "map2_ptr": value_table(unsigned, device),
            "threshold1_ptr": threshold_table(signed, device),
            "threshold2_ptr": threshold_table(unsigned, device),
            "KINDS": tuple(
                (_triton_dtype(param), _triton_dtype(grad), *rest) for param, grad, *rest in present
            ),
            "BLOCKS": _TILE_BLOCKS,
        },
        device,
        num_warps=4,
        exact=True,
    )


def _triton_dtype(dtype: torch.dtype) -> Any:
    import triton.language as tl

    return {torch.float32: tl.float32, torch.float16: tl.float16}.get(dtype, tl.bfloat16)


def _tables(rows: tuple[tuple[int, ...], ...], device: torch.device) -> tuple[Tensor, ...]:
    """int64 [params, 9] addresses, sizes and kinds, int32 [programs, 2] parameter and tile."""
    key = (device, rows)
    if _capturing(device):
        # What is uploaded now has its content after a replay only, and is no later step's.
        _CAPTURED.append(_TABLES.get(key) or _upload(rows, device))
        return _CAPTURED[-1][:2]
    if key not in _TABLES:
        _TABLES[key] = _upload(rows, device)
        if len(_TABLES) > _MAX_TABLES:
            _TABLES.popitem(last=False)
    _TABLES.move_to_end(key)
    return _TABLES[key][:2]


def _capturing(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


def _upload(rows: tuple[tuple[int, ...], ...], device: torch.device) -> tuple[Tensor, ...]:
    """Both tables on the device, and the memory they are copied from."""
    table = torch.tensor(rows, dtype=torch.int64)
    counts = -(-table[:, 6] // (_BLOCK * _TILE_BLOCKS))
    owner = torch.repeat_interleave(counts)
    tile = torch.arange(owner.numel()) - (counts.cumsum(0) - counts)[owner]
    tiles = torch.stack([owner, tile], dim=1).to(torch.int32)
    if device.type == "cuda":
        table, tiles = table.pin_memory(), tiles.pin_memory()
    return (*(t.to(device, non_blocking=True) for t in (table, tiles)), table, tiles)
