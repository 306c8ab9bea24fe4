"""CUDA streams on a CPU that check their order: what ``nf4.optim.pager.CudaMemory`` is tested with.

Operations happen at once, but each is held against a vector clock: two that touch the same bytes,
one of them writing, must be ordered by the waits and events between their streams (and the host),
or ``Race`` is raised. Watched are registered host buffers and the buffers that ``record_stream``
was called on; a side stream may touch no other memory.
"""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class Race(AssertionError):
    pass


@dataclass
class Access:
    first: int
    last: int
    who: Stream
    tick: int
    writes: bool
    what: str


class Stream:
    """A queue of work; ``clock`` counts the operations of every stream that it is behind."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.clock: Counter[str] = Counter()

    def join(self, clock: Counter[str]) -> None:
        self.clock |= clock


class SideStream(Stream):
    def __init__(self, device: torch.device, cuda: FakeCuda) -> None:
        super().__init__(f"side {len(cuda.sides)}")
        cuda.sides.append(self)
        self._cuda = cuda

    def wait_stream(self, other: Stream) -> None:
        self.join(other.clock)

    def record_event(self) -> Counter[str]:
        return self.clock.copy()

    def synchronize(self) -> None:
        self._cuda.host.join(self.clock)


class Compute(Stream):
    def wait_event(self, event: Counter[str]) -> None:
        self.join(event)


class FakeCuda(TorchDispatchMode):
    """Stands in for torch.cuda while the mode is on; ``room`` bytes of device memory are free."""

    def __init__(self, room: int) -> None:
        super().__init__()
        self.room = room
        self.host, self.compute = Stream("host"), Compute("compute")
        self.sides: list[SideStream] = []
        self.current: Stream = self.compute
        self.accesses: list[Access] = []
        self.pinned: dict[int, int] = {}
        # Kept, so that no address comes twice; with the streams that may use it.
        self.device: list[tuple[Tensor, set[str]]] = []
        self.copies: Counter[str] = Counter()
        self.freed_early: list[str] = []

    def patch(self, monkeypatch: pytest.MonkeyPatch) -> None:
        @contextlib.contextmanager
        def stream(chosen: Stream) -> Iterator[None]:
            before, self.current = self.current, chosen
            try:
                yield
            finally:
                self.current = before

        def register(address: int, nbytes: int, flags: int) -> int:
            assert nbytes > 0
            self.pinned[address] = address + nbytes
            return 0

        def unregister(address: int) -> int:
            last = self.pinned.pop(address)
            try:
                self._touch(self.host, address, last, True, "unregister")
            except Race as race:  # a finalizer's exception would only be printed
                self.freed_early.append(str(race))
            return 0

        def record(buffer: Tensor, stream: Stream) -> None:
            for known, users in self.device:
                if known is buffer:
                    users.add(stream.name)
                    return
            self.device.append((buffer, {stream.name}))

        runtime = SimpleNamespace(cudaHostRegister=register, cudaHostUnregister=unregister)
        for name, value in {
            "Stream": lambda device: SideStream(device, self),
            "stream": stream,
            "current_stream": lambda device: self.current,
            "cudart": lambda: runtime,
            "check_error": lambda code: None,
            "mem_get_info": lambda device: (self.room, self.room),
            "get_per_process_memory_fraction": lambda device: 1.0,
            "max_memory_allocated": lambda device: 0,
            "memory_reserved": lambda device: 0,
        }.items():
            monkeypatch.setattr(torch.cuda, name, value)
        monkeypatch.setattr(Tensor, "record_stream", record)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        schema = func._schema
        is_view = any(r.alias_info and not r.alias_info.is_write for r in schema.returns)
        if not is_view:
            for argument, value in zip(schema.arguments, args, strict=False):
                writes = argument.alias_info is not None and argument.alias_info.is_write
                for t in tree_leaves(value):
                    if isinstance(t, Tensor) and t.numel():
                        self._use(t, writes, str(func))
        out = func(*args, **(kwargs or {}))
        if func is torch.ops.aten.empty.memory_format and out.dtype is torch.uint8:
            out.fill_(0xEE)
        return out

    def _use(self, t: Tensor, writes: bool, what: str) -> None:
        first = t.data_ptr()
        last = first + t.nbytes  # watched memory is only used in contiguous pieces
        pinned = any(a <= first and last <= b for a, b in self.pinned.items())
        users = next(
            (
                users
                for buffer, users in self.device
                if buffer.data_ptr() <= first and last <= buffer.data_ptr() + buffer.nbytes
            ),
            None,
        )
        aside = self.current is not self.compute
        if aside and not pinned and (users is None or self.current.name not in users):
            raise Race(f"{what}: {self.current.name} uses memory not recorded for it")
        if pinned:
            self._touch(self.current if aside else self.host, first, last, writes, what)
            if aside:
                self.copies["out" if writes else "in"] += 1
        elif users is not None:
            self._touch(self.current, first, last, writes, what)

    def _touch(self, who: Stream, first: int, last: int, writes: bool, what: str) -> None:
        who.join(self.host.clock)  # what is queued is behind all that the host has done
        for old in self.accesses:
            overlap = old.first < last and first < old.last
            if overlap and (writes or old.writes) and who.clock[old.who.name] < old.tick:
                raise Race(f"{what} on {who.name} is not behind {old.what} on {old.who.name}")
        who.clock[who.name] += 1
        self.accesses = [
            old for old in self.accesses if not (writes and first <= old.first and old.last <= last)
        ]
        tick = who.clock[who.name]
        self.accesses.append(Access(first, last, who, tick, writes, what))
