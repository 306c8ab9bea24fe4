"""Optimizer states in host memory: how they are packed into pages, and in what order pages move.

The states of all paged parameters lie one after another in pinned host buffers. A page is a run of
them of about ``PAGE_BYTES``: many small parameters, or a part of a large one (blocks of 256 step on
their own). A step takes the pages in turn: each is copied into one of ``SLOTS`` buffers on the
device while earlier ones are computed, is stepped there in one launch per parameter group, and is
copied back once its buffer is needed. The next step goes through the pages in the opposite order,
so that it begins with those that are still on the device and waits for no copy.

Nothing here touches CUDA: ``nf4.optim.pager`` moves the bytes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor

from nf4.optim.state import BLOCK_SIZE, layout

PAGE_BYTES = 32 << 20
SLOTS = 3
_ALIGNMENT = 256


@dataclass(frozen=True)
class Piece:
    """Elements [first, last) of one state tensor, at a byte offset of the host buffer."""

    name: str
    dtype: torch.dtype
    first: int
    last: int
    host: int

    @property
    def nbytes(self) -> int:
        return (self.last - self.first) * self.dtype.itemsize


@dataclass(frozen=True)
class Segment:
    """Elements [first, last) of a parameter and the pieces of state that belong to them."""

    key: Any  # names the parameter
    first: int
    last: int
    pieces: tuple[Piece, ...]


@dataclass(frozen=True)
class Copy:
    """One transfer between the host buffer and a slot."""

    host: int
    slot: int
    nbytes: int


@dataclass
class Page:
    """Segments that travel together; ``slots[i][j]`` is the place of piece j of segment i."""

    buffer: int
    segments: list[Segment] = field(default_factory=list)
    slots: list[tuple[int, ...]] = field(default_factory=list)
    nbytes: int = 0

    def append(self, segment: Segment) -> None:
        """Place a segment behind the others, as far apart from them as on the host."""
        places = []
        for piece in segment.pieces:
            places.append(self.nbytes)
            self.nbytes += _aligned(piece.nbytes)
        self.segments.append(segment)
        self.slots.append(tuple(places))

    def views(self, index: int, buffer: Tensor) -> dict[str, Tensor]:
        """The state tensors of segment ``index`` in the uint8 ``buffer`` of a slot."""
        pieces = zip(self.segments[index].pieces, self.slots[index], strict=True)
        return {
            piece.name: buffer[place : place + piece.nbytes].view(piece.dtype)
            for piece, place in pieces
        }

    def copies(self) -> list[Copy]:
        """The fewest transfers that move the page: whole parameters lie as on the host."""
        merged: list[Copy] = []
        for segment, places in zip(self.segments, self.slots, strict=True):
            for piece, place in zip(segment.pieces, places, strict=True):
                nbytes = _aligned(piece.nbytes)
                last = merged[-1] if merged else None
                if (
                    last is not None
                    and last.host + last.nbytes == piece.host
                    and last.slot + last.nbytes == place
                ):
                    merged[-1] = Copy(last.host, last.slot, last.nbytes + nbytes)
                else:
                    merged.append(Copy(piece.host, place, nbytes))
        return merged


@dataclass(frozen=True)
class Plan:
    """Where every state tensor lies on the host, and the pages they are cut into."""

    tensors: dict[Any, tuple[Piece, ...]]
    pages: list[Page]
    nbytes: int


def _aligned(nbytes: int) -> int:
    return -(-nbytes // _ALIGNMENT) * _ALIGNMENT


def plan(params: Sequence[tuple[Any, int, int]], buffer: int, page_bytes: int = PAGE_BYTES) -> Plan:
    """Pack the states of ``(key, numel, bits)`` in order; ``buffer`` numbers the host buffer."""
    tensors: dict[Any, tuple[Piece, ...]] = {}
    pages: list[Page] = []
    offset = 0
    for key, numel, bits in params:
        whole = []
        for name, (count, dtype) in layout(numel, bits).items():
            whole.append(Piece(name, dtype, 0, count, offset))
            offset += _aligned(whole[-1].nbytes)
        tensors[key] = tuple(whole)
        for segment in _segments(key, numel, whole, page_bytes):
            size = sum(_aligned(piece.nbytes) for piece in segment.pieces)
            if not pages or pages[-1].nbytes + size > page_bytes:
                pages.append(Page(buffer))
            pages[-1].append(segment)
    return Plan(tensors, pages, offset)


def _segments(key: Any, numel: int, whole: list[Piece], page_bytes: int) -> list[Segment]:
    """The parameter in one segment, or in several of at most a page."""
    if sum(_aligned(piece.nbytes) for piece in whole) <= page_bytes:
        return [Segment(key, 0, numel, tuple(whole))]
    per_block = sum(
        piece.dtype.itemsize * (1 if piece.name.startswith("absmax") else BLOCK_SIZE)
        for piece in whole
    )
    # Scales are 4 bytes a block: 64 blocks make their pieces begin at aligned bytes too.
    unit = 64 if len(whole) == 4 else 1
    blocks = max(unit, (page_bytes - len(whole) * _ALIGNMENT) // per_block // unit * unit)
    segments = []
    for first in range(0, numel, blocks * BLOCK_SIZE):
        last = min(numel, first + blocks * BLOCK_SIZE)
        pieces = []
        for piece in whole:
            low, high = first, last
            if piece.name.startswith("absmax"):
                low, high = first // BLOCK_SIZE, -(-last // BLOCK_SIZE)
            host = piece.host + low * piece.dtype.itemsize
            pieces.append(Piece(piece.name, piece.dtype, low, high, host))
        segments.append(Segment(key, first, last, tuple(pieces)))
    return segments


def resident_prefix(sizes: Sequence[int], budget: int) -> int:
    """How many of the first parameters keep their states on the device within ``budget`` bytes."""
    for count, size in enumerate(sizes):
        budget -= size
        if budget < 0:
            return count
    return len(sizes)


class Mover(Protocol):
    """What moves pages. Calls may only queue the work."""

    def load(self, page: Page, slot: int) -> None:
        """Copy the page into the slot, after all that was queued for the slot before."""

    def store(self, page: Page, slot: int) -> None:
        """Copy the slot back to the page, after the computations queued so far."""

    def wait(self, slot: int) -> None:
        """Let computations queued from now on wait for the slot's copies."""


def stream(
    pages: Sequence[Page],
    wanted: Sequence[int],
    held: dict[int, int],
    slots: int,
    mover: Mover,
    compute: Callable[[Page, int], None],
) -> None:
    """Compute the ``wanted`` pages in that order, loading ahead as far as ``slots`` allow.

    ``held`` maps the pages on the device to their slots, and is kept up to date: the pages
    computed last stay, changed and not yet stored. ``compute(page, slot)`` queues the work.
    """
    rank = {page: position for position, page in enumerate(wanted)}
    to_load = [page for page in wanted if page not in held]

    def evict(page: int) -> int:
        slot = held.pop(page)
        mover.store(pages[page], slot)
        return slot

    free = [slot for slot in range(slots) if slot not in held.values()]
    for page in [page for page in held if page not in rank]:
        if len(free) < len(to_load):
            free.append(evict(page))
    for page in wanted:
        if page not in held and not free:
            # Only where the order is not the last one's opposite: give up what is needed last.
            victim = max(held, key=lambda other: rank.get(other, len(wanted)))
            free.append(evict(victim))
            if victim in rank:
                to_load.append(victim)
                to_load.sort(key=lambda other: rank[other])
        while free and to_load:
            held[to_load[0]] = free.pop()
            mover.load(pages[to_load[0]], held[to_load.pop(0)])
        slot = held[page]
        mover.wait(slot)
        compute(pages[page], slot)
        if to_load:
            free.append(evict(page))
