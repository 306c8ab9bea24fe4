"""``CudaMemory`` on the CPU: every copy and step in order, by streams that check it."""

from __future__ import annotations

import gc
from collections.abc import Iterator

import pytest
import torch
from fake_streams import FakeCuda, Race
from test_optim import copies, equal, random_gradients, run
from test_optim_checkpoint import assert_same_state, through_a_file
from test_optim_paging import PAGE_BYTES, parameters
from torch import nn

from nf4.optim import AdamW8bit, AdamW32bit, PagedAdamW8bit, PagedAdamW32bit, adamw, pager


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeCuda]:
    """A device with room for 100 kB of states, of pages of 64 KiB."""
    monkeypatch.setattr(pager, "PAGE_BYTES", PAGE_BYTES)
    slots = pager.Pager.__init__.__defaults__[1]
    monkeypatch.setattr(pager.Pager.__init__, "__defaults__", (PAGE_BYTES, slots))
    monkeypatch.setattr(adamw, "memory_of", pager.CudaMemory)
    fake = FakeCuda(100_000 + pager._MARGIN + slots * PAGE_BYTES)
    fake.patch(monkeypatch)
    with fake:
        yield fake
        gc.collect()  # finalizers run under the fake too
    assert not fake.freed_early


@pytest.mark.parametrize(
    ("paged", "resident"), [(PagedAdamW8bit, AdamW8bit), (PagedAdamW32bit, AdamW32bit)]
)
def test_steps_are_ordered_and_the_same(cuda: FakeCuda, paged, resident) -> None:
    params = parameters()
    plain = copies(params)
    gradients = random_gradients(params, 5)
    ours, theirs = paged(params), resident(plain)
    run(ours, params, gradients[:3])
    run(theirs, plain, gradients[:3])
    assert cuda.copies["in"] > 0 and cuda.copies["out"] > 0
    assert_same_state(ours.state_dict(), theirs.state_dict())
    run(ours, params, gradients[3:])
    run(theirs, plain, gradients[3:])
    assert equal(params, plain)
    assert_same_state(ours.state_dict(), theirs.state_dict())


def test_slots_grow_with_later_parameters(cuda: FakeCuda) -> None:
    """Small pages first; larger ones, of parameters that begin later, find their slots grown."""
    cuda.room -= 100_000
    params = [nn.Parameter(torch.randn(n)) for n in (300, 90_000, 5000, 0)]
    plain = copies(params)
    gradients = random_gradients(params, 6)
    for optimizer, targets in ((PagedAdamW32bit(params), params), (AdamW32bit(plain), plain)):
        run(optimizer, targets[:1], [step[:1] for step in gradients[:2]])
        run(optimizer, targets, gradients[2:])
    assert equal(params, plain)
    assert len({buffer.numel() for buffer, _ in cuda.device}) == 2


def test_resuming_is_ordered_and_the_same(cuda: FakeCuda) -> None:
    params = parameters()
    gradients = random_gradients(params, 4)
    optimizer = PagedAdamW8bit(params)
    run(optimizer, params, gradients[:2])
    again = copies(params)
    resumed = PagedAdamW8bit(again)
    saved = through_a_file(optimizer.state_dict())
    resumed.load_state_dict(saved)
    assert_same_state(resumed.state_dict(), saved)  # before the states have their places
    before = cuda.copies["in"]
    run(resumed, again, gradients[2:])
    assert cuda.copies["in"] > before
    # In place, over pages that are still on the device.
    run(optimizer, params, gradients[2:])
    optimizer.load_state_dict(resumed.state_dict())
    assert equal(params, again)
    assert_same_state(optimizer.state_dict(), resumed.state_dict())


def test_a_loaded_state_finds_its_place_at_the_next_step(
    cuda: FakeCuda, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not before: the memory that a backward pass takes was never used when a run resumes."""
    params = parameters()
    gradients = random_gradients(params, 2)
    resident = AdamW8bit(params)
    run(resident, params, gradients[:1])
    optimizer = PagedAdamW8bit(params)
    optimizer.load_state_dict(through_a_file(resident.state_dict()))
    assert not cuda.pinned
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: 100_000)
    run(optimizer, params, gradients[1:])
    (nbytes,) = (last - first for first, last in cuda.pinned.items())
    assert nbytes >= 2 * sum(p.numel() for p in params)  # all of them
    assert not optimizer._unplaced


def test_host_memory_is_freed_behind_its_copies(cuda: FakeCuda) -> None:
    params = parameters()
    optimizer = PagedAdamW8bit(params)
    run(optimizer, params, random_gradients(params, 2))
    assert len(cuda.pinned) == 1
    del optimizer
    gc.collect()
    assert not cuda.pinned


def test_a_failed_registration_loses_nothing(
    cuda: FakeCuda, monkeypatch: pytest.MonkeyPatch
) -> None:
    params = parameters()
    plain = copies(params)
    gradients = random_gradients(params, 2)
    optimizer = PagedAdamW8bit(params)
    with monkeypatch.context() as patch:

        def refuse(code: int) -> None:
            raise RuntimeError("out of memory")

        patch.setattr(torch.cuda, "check_error", refuse)
        with pytest.raises(RuntimeError, match="out of memory"):
            run(optimizer, params, gradients[:1])
    assert equal(params, plain)
    run(optimizer, params, gradients)
    run(AdamW8bit(plain), plain, gradients)
    assert equal(params, plain)


@pytest.mark.parametrize("missing", ["load waits", "store waits", "compute waits", "host waits"])
def test_the_streams_see_a_missing_wait(
    cuda: FakeCuda, monkeypatch: pytest.MonkeyPatch, missing: str
) -> None:
    memory, stream = pager.CudaMemory, type(pager.CudaMemory(torch.device("cpu"))._in)
    if missing == "compute waits":
        monkeypatch.setattr(memory, "wait", lambda self, slot: None)
    elif missing == "host waits":
        monkeypatch.setattr(stream, "synchronize", lambda self: None)
    else:
        waits = stream.wait_stream

        def wait_stream(self, other) -> None:
            if isinstance(other, stream) != (missing == "load waits"):
                waits(self, other)

        monkeypatch.setattr(stream, "wait_stream", wait_stream)
    params = parameters()
    optimizer = PagedAdamW8bit(params)
    with pytest.raises(Race):
        run(optimizer, params, random_gradients(params, 3))
        optimizer.state_dict()
    del optimizer
    gc.collect()
    cuda.freed_early.clear()  # as it may well have been
