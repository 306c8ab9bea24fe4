"""The optimizers and recorded work: CUDA graphs over a step, autograd graphs from before one."""

from __future__ import annotations

import pytest
import torch
from test_optim import copies, equal, parameters, random_gradients, run
from torch import nn

from nf4.optim import AdamW, AdamW8bit, adamw


def test_capturable(backend: str, device: torch.device) -> None:
    plain = parameters(device)
    captured = copies(plain)
    gradients = random_gradients(plain, 5)
    run(AdamW8bit(plain, lr=1e-2), plain, gradients)
    lr = torch.tensor(1e-2, dtype=torch.float64, device=device)
    optimizer = AdamW8bit(captured, lr=lr, capturable=True)
    run(optimizer, captured, gradients)
    assert equal(plain, captured)
    steps = [optimizer.state[p]["step"] for p in captured]
    assert all(s is steps[0] for s in steps) and int(steps[0]) == 5


def test_capturable_groups_count_their_own_steps(backend: str, device: torch.device) -> None:
    plain = parameters(device)
    captured = copies(plain)
    gradients = random_gradients(plain, 3)
    for params, capturable in ((plain, False), (captured, True)):
        groups = [{"params": params[:2]}, {"params": params[2:], "lr": 1e-2}]
        optimizer = AdamW8bit(groups, capturable=capturable)
        run(optimizer, params, gradients)
    assert equal(plain, captured)
    assert [int(optimizer.state[p]["step"]) for p in captured] == [3] * len(captured)


def test_capturable_parameters_step_on_their_own(backend: str, device: torch.device) -> None:
    """Parameters that share a counter on the device part where one has no gradient."""
    plain = parameters(device)
    captured = copies(plain)
    gradients = random_gradients(plain, 3)
    for params, capturable in ((plain, False), (captured, True)):
        optimizer = AdamW8bit(params, capturable=capturable)
        for i, step in enumerate(gradients):
            for p, g in zip(params, step, strict=True):
                p.grad = g.clone()
            if i == 1:
                params[1].grad = None
            optimizer.step()
    assert equal(plain, captured)
    assert [int(optimizer.state[p]["step"]) for p in captured] == [3, 2, 3, 3]


def test_a_graph_records_no_beginning(monkeypatch: pytest.MonkeyPatch) -> None:
    """Replays would make the moments, or the count, anew."""
    params = parameters(torch.device("cpu"))
    (gradients,) = random_gradients(params, 1)
    capturing = [False]
    monkeypatch.setattr(adamw, "capturing", lambda: capturing[0])

    def step(optimizer: AdamW, captured: bool) -> None:
        capturing[0] = captured
        run(optimizer, params, [gradients])

    with pytest.raises(RuntimeError, match="needs capturable=True and a step before its capture"):
        step(AdamW8bit(params, capturable=True), True)
    optimizer = AdamW8bit(params)
    step(optimizer, False)
    with pytest.raises(RuntimeError, match=r"needs capturable=True .* got a step count of 1"):
        step(optimizer, True)
    optimizer = AdamW8bit(params, capturable=True)
    step(optimizer, False)
    step(optimizer, True)
    before = copies(params)
    params[1].grad = None
    with pytest.raises(RuntimeError, match="must be those of the step before, got some without"):
        optimizer.step()
    assert equal(params, before)


def test_a_graph_from_before_the_step_is_refused(backend: str, device: torch.device) -> None:
    """As after torch.optim: its backward would silently use the new values."""
    params = parameters(device)
    params.append(nn.Parameter(torch.randn(80, 70, device=device).t()))
    losses = [p.square().sum() for p in params]
    run(AdamW8bit(params), params, random_gradients(params, 1))
    for loss in losses:
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            loss.backward()
