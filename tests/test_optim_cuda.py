"""The optimizer on a GPU: paging under a capped memory, and steps in a CUDA graph."""

from __future__ import annotations

import gc
from collections.abc import Iterator

import pytest
import torch
from test_optim import copies, equal, parameters, random_gradients, run
from test_optim_checkpoint import through_a_file
from torch import nn

from nf4.optim import AdamW, AdamW8bit, AdamW32bit, PagedAdamW8bit, PagedAdamW32bit, pager

needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
NUMEL, COUNT = 8 << 20, 24


def make(seed: int) -> list[nn.Parameter]:
    torch.manual_seed(seed)
    return [nn.Parameter(torch.randn(NUMEL, device="cuda")) for _ in range(COUNT)]


def losses(optimizer: AdamW, params: list[nn.Parameter], steps: int) -> list[float]:
    """Minimize the mean squares; a backward pass holds every gradient and one parameter's more."""
    out = []
    for _ in range(steps):
        optimizer.zero_grad()
        total = 0.0
        for p in params:
            loss = p.square().mean()
            loss.backward()
            total += loss.item()
        optimizer.step()
        out.append(total)
    return out


@pytest.fixture
def capped() -> Iterator[None]:
    """Room for parameters, gradients, the pager's own and an eighth of 32-bit states."""
    gc.collect()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    _, total = torch.cuda.mem_get_info()
    own = pager._MARGIN + pager.SLOTS * pager.PAGE_BYTES
    room = torch.cuda.memory_allocated() + (2 * COUNT + COUNT // 4 + 4) * NUMEL * 4 + own
    torch.cuda.set_per_process_memory_fraction(room / total)
    yield
    torch.cuda.set_per_process_memory_fraction(1.0)
    gc.collect()
    torch.cuda.empty_cache()


@needs_cuda
@pytest.mark.parametrize(
    ("paged", "resident"), [(PagedAdamW8bit, AdamW8bit), (PagedAdamW32bit, AdamW32bit)]
)
def test_a_capped_run_has_the_same_losses(request: pytest.FixtureRequest, paged, resident) -> None:
    params = make(1)
    wanted = losses(resident(params, lr=1e-2), params, 6)
    del params
    request.getfixturevalue("capped")
    before = torch.cuda.memory_allocated()
    if resident is AdamW32bit:
        params = make(1)
        with pytest.raises(torch.cuda.OutOfMemoryError):
            losses(resident(params, lr=1e-2), params, 1)
        del params
        gc.collect()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    params = make(1)
    optimizer = paged(params, lr=1e-2)
    got = losses(optimizer, params, 3)
    assert resident is AdamW8bit or any(p is not None and p._pages for p in _pagers(optimizer))
    # A resumed run pages again.
    saved = through_a_file(optimizer.state_dict())
    del optimizer
    optimizer = paged(params)
    optimizer.load_state_dict(saved)
    got += losses(optimizer, params, 3)
    assert resident is AdamW8bit or any(p is not None and p._pages for p in _pagers(optimizer))
    assert got == wanted
    optimizer.zero_grad()
    del optimizer, params, saved
    gc.collect()
    torch.cuda.synchronize()
    assert torch.cuda.memory_allocated() <= before


def _pagers(optimizer: AdamW) -> list[pager.Pager | None]:
    return list(optimizer._pagers.values())


@needs_cuda
def test_states_that_fit_stay_on_the_device() -> None:
    params = make(2)[:2]
    optimizer = PagedAdamW8bit(params)
    losses(optimizer, params, 2)
    assert all(optimizer.state[p]["state1"].is_cuda for p in params)
    assert not any(p is not None and p._pages for p in _pagers(optimizer))


@pytest.mark.parametrize("stochastic", [False, True])
def test_a_captured_step_replays(backend: str, device: torch.device, stochastic: bool) -> None:
    """After one step outside the graph; the count, the random words and lr come from the device."""
    if device.type != "cuda":
        pytest.skip(f"backend {backend}: CUDA graphs need a CUDA device")
    plain = parameters(device, torch.bfloat16)
    captured = copies(plain)
    gradients = random_gradients(plain, 5)
    settings = {"lr": 1e-2, "stochastic_rounding": stochastic, "seed": 4}
    run(AdamW8bit(plain, **settings), plain, gradients)
    lr = torch.tensor(1e-2, dtype=torch.float64, device=device)
    optimizer = AdamW8bit(captured, **{**settings, "lr": lr}, capturable=True)
    for p, g in zip(captured, gradients[0], strict=True):
        p.grad = g.to(p)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        optimizer.step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        optimizer.step()
    for step in gradients[1:]:
        for p, g in zip(captured, step, strict=True):
            p.grad.copy_(g)
        graph.replay()
    torch.cuda.synchronize()
    assert equal(plain, captured)
    assert int(optimizer.state[captured[0]]["step"]) == 5
