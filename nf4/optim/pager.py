"""Keeps the optimizer states of one device in host memory where device memory is short.

``Pager`` decides which states stay, and runs a step over the pages of the others; ``CudaMemory``
holds the bytes and moves them: pinned host buffers, a few page slots on the device, and one side
stream for each direction. The CUDA part has run on no GPU yet; tests drive ``Pager`` with a memory
of their own, and ``CudaMemory`` with streams that check its order, on the CPU.
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from nf4.optim import paging
from nf4.optim.launch import Launch, local_tensor
from nf4.optim.paging import PAGE_BYTES, SLOTS, Mover, Page
from nf4.optim.state import layout

# Device memory left free for what a later step needs beyond the largest so far.
_MARGIN = 256 << 20


class Memory(Mover, Protocol):
    """The host buffers and device slots of one device."""

    def host_buffer(self, nbytes: int) -> Tensor:
        """A further host buffer of zeros, uint8 [nbytes]; pages name it by its number."""

    def slot(self, slot: int) -> Tensor:
        """The uint8 buffer on the device of a slot that something was loaded into."""

    def finish(self) -> None:
        """Wait until every copy is done."""

    def budget(self) -> int:
        """Bytes of state that may be added to the device now."""


class Pager:
    """The paged states of one device."""

    def __init__(self, memory: Memory, page_bytes: int = PAGE_BYTES, slots: int = SLOTS) -> None:
        self._memory = memory
        self._page_bytes = page_bytes
        self._slots = slots
        self._buffers = 0
        self._pages: list[Page] = []
        self._held: dict[int, int] = {}
        self._forward = True
        self._params: set[Tensor] = set()

    def __contains__(self, p: Tensor) -> bool:
        return p in self._params

    def place(self, params: Sequence[tuple[Tensor, int]]) -> dict[Tensor, dict[str, Tensor]]:
        """Zero states in host memory for those of ``(parameter, bits)`` that do not fit the device.

        The first ones fit. The others' states are views of a pinned buffer; what a step changes is
        in them after ``flush``.
        """
        local = [(p, local_tensor(p), bits) for p, bits in params]
        sizes = [
            sum(n * dtype.itemsize for n, dtype in layout(t.numel(), bits).values())
            for _, t, bits in local
        ]
        rest = local[paging.resident_prefix(sizes, self._memory.budget()) :]
        paged = [(p, t, bits) for p, t, bits in rest if t.numel() > 0]
        if not paged:
            return {}
        plan = paging.plan(
            [(p, t.numel(), bits) for p, t, bits in paged], self._buffers, self._page_bytes
        )
        buffer = self._memory.host_buffer(plan.nbytes)
        self._buffers += 1
        self._pages += plan.pages
        placed = {}
        for p, t, _ in paged:
            self._params.add(p)
            tensors = {
                piece.name: buffer[piece.host : piece.host + piece.nbytes].view(piece.dtype)
                for piece in plan.tensors[p]
            }
            placed[p] = {
                name: tensor.view(t.shape) if name.startswith("state") else tensor
                for name, tensor in tensors.items()
            }
        return placed

    def run(self, launches: Sequence[Launch]) -> None:
        """Step the paged parameters of ``launches``, page by page."""
        taking = {p for launch in launches for p in launch.paged}
        wanted = [
            index
            for index, page in enumerate(self._pages)
            if any(segment.key in taking for segment in page.segments)
        ]
        if not self._forward:
            wanted.reverse()
        self._forward = not self._forward

        def compute(page: Page, slot: int) -> None:
            for launch in launches:
                launch.call_page(page, self._memory.slot(slot))

        paging.stream(self._pages, wanted, self._held, self._slots, self._memory, compute)

    def flush(self) -> None:
        """Bring the host buffers up to date."""
        for index, slot in self._held.items():
            self._memory.store(self._pages[index], slot)
        self._held.clear()
        self._memory.finish()


def memory_of(device: torch.device) -> Memory | None:
    """What pages the states of ``device``; None where they always stay."""
    return CudaMemory(device) if device.type == "cuda" else None


class CudaMemory:
    """Pinned host buffers and device slots; copies on two side streams, ordered by events."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._host: list[Tensor] = []
        self._slot: dict[int, Tensor] = {}
        self._slot_bytes = 0
        self._in = torch.cuda.Stream(device)
        self._out = torch.cuda.Stream(device)
        self._loaded: dict[int, torch.cuda.Event] = {}

    def host_buffer(self, nbytes: int) -> Tensor:
        # Registered rather than allocated pinned: PyTorch's pinned allocator rounds up to a power
        # of two and keeps what is freed.
        buffer = torch.zeros(nbytes, dtype=torch.uint8)
        runtime = torch.cuda.cudart()
        torch.cuda.check_error(int(runtime.cudaHostRegister(buffer.data_ptr(), nbytes, 0)))
        weakref.finalize(self, _unregister, buffer, (self._in, self._out))
        self._host.append(buffer)
        self._slot_bytes = max(self._slot_bytes, min(PAGE_BYTES, nbytes))
        return buffer

    def slot(self, slot: int) -> Tensor:
        return self._slot[slot]

    def load(self, page: Page, slot: int) -> None:
        # Behind every store so far: the slot's last one, and the page's own.
        self._in.wait_stream(self._out)
        nbytes = max(self._slot_bytes, page.nbytes)
        # Only here may a slot move: what it held is stored, and nothing is in it yet.
        if slot not in self._slot or self._slot[slot].numel() < nbytes:
            self._slot[slot] = self._device_buffer(nbytes)
        self._copy(page, self._slot[slot], self._in, to_device=True)
        self._loaded[slot] = self._in.record_event()

    def _device_buffer(self, nbytes: int) -> Tensor:
        buffer = torch.empty(nbytes, dtype=torch.uint8, device=self._device)
        for stream in (self._in, self._out):
            buffer.record_stream(stream)
            # The allocator may hand out memory that the current stream still works on.
            stream.wait_stream(torch.cuda.current_stream(self._device))
        return buffer

    def store(self, page: Page, slot: int) -> None:
        self._out.wait_stream(torch.cuda.current_stream(self._device))
        self._copy(page, self._slot[slot], self._out, to_device=False)

    def wait(self, slot: int) -> None:
        if slot in self._loaded:
            torch.cuda.current_stream(self._device).wait_event(self._loaded[slot])

    def finish(self) -> None:
        self._out.synchronize()

    def budget(self) -> int:
        free, total = torch.cuda.mem_get_info(self._device)
        fraction = torch.cuda.get_per_process_memory_fraction(self._device)
        # What the process had at its largest, activations included, has to fit again.
        peak = torch.cuda.max_memory_allocated(self._device)
        reachable = min(total * fraction, free + torch.cuda.memory_reserved(self._device))
        return int(reachable) - peak - _MARGIN - SLOTS * PAGE_BYTES

    def _copy(
        self, page: Page, buffer: Tensor, stream: torch.cuda.Stream, *, to_device: bool
    ) -> None:
        host = self._host[page.buffer]
        with torch.cuda.stream(stream):
            for copy in page.copies():
                ours = host[copy.host : copy.host + copy.nbytes]
                theirs = buffer[copy.slot : copy.slot + copy.nbytes]
                if to_device:
                    theirs.copy_(ours, non_blocking=True)
                else:
                    ours.copy_(theirs, non_blocking=True)


def _unregister(buffer: Tensor, streams: Sequence[torch.cuda.Stream]) -> None:
    """Unpin a host buffer once the copies from and to it are done."""
    for stream in streams:
        stream.synchronize()
    torch.cuda.cudart().cudaHostUnregister(buffer.data_ptr())
