"""Paging of optimizer states, on the CPU: the packing, the order of copies, and whole steps.

``LateMemory`` stands in for a GPU: copies are queued and happen only when something waits for them,
and slots hold garbage before, so that a missing wait, load or store changes the result.
"""

from __future__ import annotations

import gc
import random
import weakref
from collections import deque
from collections.abc import Callable
from itertools import pairwise

import pytest
import torch
from test_optim import copies, equal, random_gradients, run
from test_optim_checkpoint import assert_same_state, through_a_file
from torch import Tensor, nn

from nf4.optim import AdamW8bit, AdamW32bit, PagedAdamW8bit, PagedAdamW32bit, adamw, pager, paging
from nf4.optim.paging import Page
from nf4.optim.state import layout

PAGE_BYTES = 1 << 16


class LateMemory:
    """Host buffers and slots in CPU memory, with copies that happen as late as they may."""

    def __init__(self, budget: int = 0) -> None:
        self.host: list[Tensor] = []
        self.slots: dict[int, Tensor] = {}
        self.queue: deque[Callable[[], None]] = deque()
        self.last: dict[int, Callable[[], None]] = {}
        self.room = budget
        self.loads = self.stores = 0

    def host_buffer(self, nbytes: int) -> Tensor:
        self.host.append(torch.zeros(nbytes, dtype=torch.uint8))
        return self.host[-1]

    def slot(self, slot: int) -> Tensor:
        return self.slots[slot]

    def load(self, page: Page, slot: int) -> None:
        buffer = torch.full((page.nbytes,), 0xEE, dtype=torch.uint8)
        self.slots[slot] = buffer
        self._push(slot, lambda: self._copy(page, self.host[page.buffer], buffer, "host", "slot"))
        self.loads += 1

    def store(self, page: Page, slot: int) -> None:
        buffer = self.slots[slot]
        self._push(slot, lambda: self._copy(page, buffer, self.host[page.buffer], "slot", "host"))
        self.stores += 1

    def wait(self, slot: int) -> None:
        while slot in self.last:
            self._step()

    def finish(self) -> None:
        while self.queue:
            self._step()

    def budget(self) -> int:
        return self.room

    def _push(self, slot: int, action: Callable[[], None]) -> None:
        self.queue.append(action)
        self.last[slot] = action

    def _step(self) -> None:
        action = self.queue.popleft()
        action()
        self.last = {slot: last for slot, last in self.last.items() if last is not action}

    @staticmethod
    def _copy(page: Page, source: Tensor, target: Tensor, a: str, b: str) -> None:
        for copy in page.copies():
            first, second = getattr(copy, a), getattr(copy, b)
            target[second : second + copy.nbytes] = source[first : first + copy.nbytes]


@pytest.fixture
def memories(monkeypatch: pytest.MonkeyPatch) -> list[LateMemory]:
    """Pages the states of CPU parameters; the memories made, whose room is 100 kB."""
    made: list[LateMemory] = []

    def memory_of(device: torch.device) -> LateMemory:
        made.append(LateMemory(budget=100_000))
        return made[-1]

    monkeypatch.setattr(adamw, "memory_of", memory_of)
    small = pager.Pager.__init__.__defaults__
    monkeypatch.setattr(pager.Pager.__init__, "__defaults__", (PAGE_BYTES, small[1]))
    return made


# LoRA's sizes, one tensor over several pages, and one too small for 8 bits.
SHAPES = ((16, 512), (512, 16), (300, 500), (77,), (64, 64), (16, 512), (1000, 101))


def parameters() -> list[nn.Parameter]:
    return [nn.Parameter(torch.randn(shape)) for shape in SHAPES]


@pytest.mark.parametrize("bits", [8, 32])
def test_plan_covers_everything_once(bits: int) -> None:
    sizes = [random.Random(bits).randrange(1, 60_000) for _ in range(40)] + [1_000_000, 255]
    plan = paging.plan([(i, n, bits) for i, n in enumerate(sizes)], 0, PAGE_BYTES)
    owner = torch.zeros(plan.nbytes, dtype=torch.int32)
    for key, n in enumerate(sizes):
        segments = [s for page in plan.pages for s in page.segments if s.key == key]
        assert segments[0].first == 0 and segments[-1].last == n
        for before, after in pairwise(segments):
            assert before.last == after.first and after.first % 256 == 0
        for segment in segments:
            wanted = layout(segment.last - segment.first, bits)
            assert {p.name: (p.last - p.first, p.dtype) for p in segment.pieces} == wanted
            for piece in segment.pieces:
                owner[piece.host : piece.host + piece.nbytes] += 1
    assert int(owner.max()) == 1
    for page in plan.pages:
        assert page.nbytes <= PAGE_BYTES
        spans = sorted((c.slot, c.nbytes) for c in page.copies())
        assert all(a + n <= b for (a, n), (b, _) in pairwise(spans))
        assert sum(n for _, n in spans) == page.nbytes


def test_small_tensors_travel_in_one_copy() -> None:
    """LoRA adapters of rank 16 at width 4096: bitsandbytes pages none under 100,000 elements."""
    plan = paging.plan([(i, 16 * 4096, 8) for i in range(448)], 0)
    assert len(plan.pages) == 2
    assert all(len(page.copies()) == 1 for page in plan.pages)


class Counter:
    """Adds one to the codes of every page that it is given, and checks that none was missed."""

    def __init__(self, pages: int) -> None:
        self.plan = paging.plan([(i, 20_000, 8) for i in range(pages)], 0, 50_000)
        assert len(self.plan.pages) == pages
        self.memory = LateMemory()
        self.host = self.memory.host_buffer(self.plan.nbytes)
        self.steps = [0] * pages

    def __call__(self, page: Page, slot: int) -> None:
        (segment,) = page.segments
        codes = page.views(0, self.memory.slots[slot])["state1"]
        assert int(codes[0]) == self.steps[segment.key] == int(codes[-1])
        codes += 1
        self.steps[segment.key] += 1


def test_stream_computes_each_page_once_and_loses_nothing() -> None:
    generator = random.Random(3)
    for _ in range(100):
        count, slots = generator.randrange(1, 9), generator.randrange(1, 5)
        counter = Counter(count)
        plan, memory = counter.plan, counter.memory
        held: dict[int, int] = {}
        wanted_steps = [0] * count
        for _ in range(5):
            wanted = generator.sample(range(count), generator.randrange(count + 1))
            paging.stream(plan.pages, wanted, held, slots, memory, counter)
            assert len(set(held.values())) == len(held) <= slots
            wanted_steps = [n + (page in wanted) for page, n in enumerate(wanted_steps)]
        assert counter.steps == wanted_steps
        for index, slot in held.items():
            memory.store(plan.pages[index], slot)
        memory.finish()
        for pieces, step in zip(plan.tensors.values(), counter.steps, strict=True):
            codes = counter.host[pieces[0].host : pieces[0].host + pieces[0].nbytes]
            assert bool((codes == step).all())


@pytest.mark.parametrize(
    ("paged", "resident"), [(PagedAdamW8bit, AdamW8bit), (PagedAdamW32bit, AdamW32bit)]
)
def test_paged_steps_are_the_same_steps(memories: list[LateMemory], paged, resident) -> None:
    params = parameters()
    plain = copies(params)
    gradients = random_gradients(params, 6)
    gradients[2][4] = None
    half = len(params) // 2

    def groups(p: list[nn.Parameter]) -> list[dict]:
        return [{"params": p[:half]}, {"params": p[half:], "lr": 1e-2, "weight_decay": 0.0}]

    ours, theirs = paged(groups(params)), resident(groups(plain))
    for step in gradients:
        for optimizer, targets in ((ours, params), (theirs, plain)):
            for p, g in zip(targets, step, strict=True):
                p.grad = None if g is None else g.clone()
            optimizer.step()
    (memory,) = memories
    assert memory.loads > 0
    # The first parameters fit, the others lie in the host buffer.
    host = memory.host[0]
    inside = [
        host.data_ptr() <= ours.state[p]["state1"].data_ptr() < host.data_ptr() + host.numel()
        for p in params
    ]
    assert inside == sorted(inside) and inside[-1] and not inside[0]
    assert equal(params, plain)
    assert_same_state(ours.state_dict(), theirs.state_dict())


def test_steps_begin_where_the_last_one_ended(memories: list[LateMemory]) -> None:
    params = parameters()
    optimizer = PagedAdamW32bit(params)
    gradients = random_gradients(params, 3)
    run(optimizer, params, gradients[:1])
    (memory,) = memories
    pages = memory.loads
    run(optimizer, params, gradients[1:2])
    assert memory.loads - pages == pages - paging.SLOTS
    assert memory.stores == 2 * (pages - paging.SLOTS)


def test_paging_survives_a_checkpoint(memories: list[LateMemory]) -> None:
    params = parameters()
    gradients = random_gradients(params, 4)
    optimizer = PagedAdamW8bit(params, stochastic_rounding=True)
    run(optimizer, params, gradients[:2])
    again = copies(params)
    resumed = PagedAdamW8bit(again)
    resumed.load_state_dict(through_a_file(optimizer.state_dict()))
    run(optimizer, params, gradients[2:])
    run(resumed, again, gradients[2:])
    assert equal(params, again)
    assert memories[-1].loads > 0
    assert_same_state(optimizer.state_dict(), resumed.state_dict())


def test_host_memory_goes_with_the_optimizer(memories: list[LateMemory]) -> None:
    params = parameters()
    optimizer = PagedAdamW8bit(params)
    run(optimizer, params, random_gradients(params, 2))
    buffer = weakref.ref(memories.pop().host[0])
    assert buffer() is not None
    del optimizer
    gc.collect()
    assert buffer() is None


def test_resident_prefix() -> None:
    assert paging.resident_prefix([10, 20, 30], 30) == 2
    assert paging.resident_prefix([10, 20, 30], 60) == 3
    assert paging.resident_prefix([10, 20, 30], -5) == 0
    assert paging.resident_prefix([], 0) == 0


def test_states_that_fit_stay(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where memory suffices a step queues no copy and waits for none."""
    memory = LateMemory(budget=1 << 30)
    monkeypatch.setattr(adamw, "memory_of", lambda device: memory)
    params = parameters()
    plain = copies(params)
    gradients = random_gradients(params, 3)
    run(PagedAdamW8bit(params), params, gradients)
    run(AdamW8bit(plain), plain, gradients)
    assert equal(params, plain)
    assert not memory.host and not memory.slots and memory.loads == memory.stores == 0
