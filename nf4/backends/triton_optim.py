"""Launcher of the optimizer kernel: one launch for all parameters of equal dtypes."""

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
# Address tables of past launches by their content. Gradients come back at the same addresses, so
# that a step seldom has to upload one, and none under CUDA-graph capture after a warm-up step.
_TABLES: OrderedDict[Any, tuple[Tensor, Tensor, Tensor, Tensor]] = OrderedDict()
_MAX_TABLES = 64
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
    """One launch for each combination of parameter, gradient and state dtype."""
    groups: dict[tuple[torch.dtype, ...], list[tuple[int, ...]]] = {}
    for i, p in enumerate(params):
        tensors = (p, grads[i], state1[i], state2[i], absmax1[i], absmax2[i])
        for t in tensors:
            if not t.is_contiguous():
                raise ValueError("nf4.adamw_step: every tensor must be contiguous")
        if p.dtype not in _FLOATS:
            raise TypeError(
                f"nf4.adamw_step: parameters must be float32, float16 or bfloat16, got {p.dtype}"
            )
        if p.numel() > 0:
            row = (*(t.data_ptr() for t in tensors), p.numel(), offsets[i])
            groups.setdefault((p.dtype, grads[i].dtype, state1[i].dtype), []).append(row)
    device = hyper.device
    signed, unsigned = formats.DYNAMIC8.id, formats.DYNAMIC8_UNSIGNED.id
    for (param, grad, state), rows in groups.items():
        table, tiles = _tables(tuple(rows), device)
        launch(
            kernel("optimizer", "adamw_kernel"),
            (tiles.shape[0],),
            {
                "table_ptr": table,
                "tiles_ptr": tiles,
                "hyper_ptr": hyper,
                "seed_ptr": None if param is torch.float32 else seed,
                "skipped_ptr": skipped,
                "map1_ptr": value_table(signed, device),
                "map2_ptr": value_table(unsigned, device),
                "threshold1_ptr": threshold_table(signed, device),
                "threshold2_ptr": threshold_table(unsigned, device),
                "PARAM": _triton_dtype(param),
                "GRAD": _triton_dtype(grad),
                "QUANTIZED": state is torch.uint8,
                "ALIGNED": all(a % 16 == 0 for row in rows for a in row[:6]),
                "BLOCKS": _TILE_BLOCKS,
            },
            device,
            num_warps=4,
            exact=True,
        )


def _triton_dtype(dtype: torch.dtype) -> Any:
    import triton.language as tl

    return {torch.float32: tl.float32, torch.float16: tl.float16}.get(dtype, tl.bfloat16)


def _tables(rows: tuple[tuple[int, ...], ...], device: torch.device) -> tuple[Tensor, Tensor]:
    """int64 [params, 8] addresses and sizes, int32 [programs, 2] parameter and tile."""
    key = (device, rows)
    if key not in _TABLES:
        table = torch.tensor(rows, dtype=torch.int64)
        counts = -(-table[:, 6] // (_BLOCK * _TILE_BLOCKS))
        owner = torch.repeat_interleave(counts)
        tile = torch.arange(owner.numel()) - (counts.cumsum(0) - counts)[owner]
        tiles = torch.stack([owner, tile], dim=1).to(torch.int32)
        if device.type == "cuda":
            table, tiles = table.pin_memory(), tiles.pin_memory()
        # The pinned originals stay: a captured graph copies from them at every replay.
        on_device = [t.to(device, non_blocking=True) for t in (table, tiles)]
        _TABLES[key] = (on_device[0], on_device[1], table, tiles)
        if len(_TABLES) > _MAX_TABLES:
            _TABLES.popitem(last=False)
    _TABLES.move_to_end(key)
    return _TABLES[key][:2]
