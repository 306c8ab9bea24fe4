"""Tile function that says which rows of stacked LoRA adapters a program works on."""

import triton
import triton.language as tl


@triton.jit
def stack_rows(table_ptr, tile, R, BLOCK_R: tl.constexpr):
    """(member, exists, row, column, rank) of a tile; all but member are [BLOCK_R].

    ``table_ptr``: int32 [tiles * BLOCK_R, 4], or None for one adapter of R rows. ``row`` counts
    among the stacked A (past R where nothing exists), ``column`` among the rank of its member,
    whose first row is their difference. A tile has one ``member`` where members have masks of
    their own.
    """
    r = tile * BLOCK_R + tl.arange(0, BLOCK_R)
    if table_ptr is None:
        member = 0
        exists = r < R
        row = r.to(tl.int64)
        column = row
        rank = row * 0 + R
    else:
        entry = table_ptr + r * 4
        row = tl.load(entry).to(tl.int64)
        column = tl.load(entry + 1).to(tl.int64)
        rank = tl.load(entry + 2).to(tl.int64)
        exists = rank > 0
        member = tl.load(table_ptr + tile * (BLOCK_R * 4) + 3)
    return member, exists, row, column, rank
