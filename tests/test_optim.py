"""The optimizer classes: trajectories against float64 AdamW, torch.optim's behaviours, errors."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
from cases import DTYPES, dtype_id, skip_if_emulated
from torch import Tensor, nn

from nf4.optim import (
    AdamW,
    AdamW8bit,
    AdamW32bit,
    PagedAdamW,
    PagedAdamW8bit,
    PagedAdamW32bit,
)
from nf4.optim.launch import Launch

EIGHT_BIT = (AdamW8bit, PagedAdamW8bit)
CLASSES = (AdamW, AdamW8bit, AdamW32bit, PagedAdamW, PagedAdamW8bit, PagedAdamW32bit)
SHAPES = ((96, 64), (50, 101), (33,), (1,))


def parameters(device: torch.device, dtype: torch.dtype = torch.float32) -> list[nn.Parameter]:
    return [nn.Parameter(torch.randn(shape, device=device).to(dtype)) for shape in SHAPES]


def copies(params: list[nn.Parameter], dtype: torch.dtype | None = None) -> list[nn.Parameter]:
    return [nn.Parameter(p.detach().clone().to(dtype or p.dtype)) for p in params]


def run(optimizer, params: list[nn.Parameter], gradients: list[list[Tensor]]) -> None:
    for step in gradients:
        for p, g in zip(params, step, strict=True):
            p.grad = g.to(p)
        optimizer.step()


def random_gradients(params: list[nn.Parameter], steps: int) -> list[list[Tensor]]:
    return [[torch.randn_like(p, dtype=torch.float32) for p in params] for _ in range(steps)]


def equal(a: list[nn.Parameter], b: list[nn.Parameter]) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize("cls", (AdamW32bit, PagedAdamW32bit))
def test_32bit_is_adamw(backend: str, device: torch.device, cls: type[AdamW]) -> None:
    params = parameters(device)
    exact = copies(params, torch.float64)
    gradients = random_gradients(params, 10)
    settings = {"lr": 1e-2, "betas": (0.8, 0.95), "eps": 1e-6, "weight_decay": 0.3}
    run(cls(params, **settings), params, gradients)
    run(torch.optim.AdamW(exact, **settings), exact, gradients)
    for p, e in zip(params, exact, strict=True):
        torch.testing.assert_close(p.double(), e, rtol=0, atol=5e-6)


def distance(make, density: float, device: torch.device) -> tuple[float, float]:
    """Minimize a noisy, badly scaled quadratic for 200 steps, each entry having a gradient in a
    ``density`` of them. Returns the RMS distance to float64 AdamW's end, and that to the start."""
    generator = torch.Generator().manual_seed(7)
    shape = (64, 128)
    scale = 10.0 ** (torch.rand(shape, generator=generator) * 2 - 2)
    start = torch.randn(shape, generator=generator).to(device)
    settings = {"lr": 1e-2, "betas": (0.9, 0.999), "weight_decay": 1e-2}
    p, exact = nn.Parameter(start.clone()), nn.Parameter(start.double())
    ours, oracle = make([p], **settings), torch.optim.AdamW([exact], **settings)
    for _ in range(200):
        noise = torch.randn(shape, generator=generator) * 0.1
        share = scale * (torch.rand(shape, generator=generator) < density)
        noise, share = noise.to(device), share.to(device)
        for x, optimizer in ((p, ours), (exact, oracle)):
            x.grad = (share * (x.detach() + noise)).to(x.dtype)
            optimizer.step()
    end = exact.detach()
    rms = [float((end - other).square().mean().sqrt()) for other in (p.detach(), start)]
    return rms[0], rms[1]


@pytest.mark.parametrize("density", [1.0, 0.1])
def test_8bit_follows_float64_as_closely_as_bitsandbytes(
    backend: str, device: torch.device, density: float
) -> None:
    # Emulated kernels step as the reference bit for bit: test_adamw_step.
    skip_if_emulated(backend, device)
    bitsandbytes = pytest.importorskip("bitsandbytes")
    ours, moved = distance(AdamW8bit, density, device)
    theirs, _ = distance(bitsandbytes.optim.AdamW8bit, density, device)
    # Once on a GPU theirs was NaN, where fresh memory is filled with it.
    assert not theirs < ours
    assert ours < 0.06 * moved


@pytest.mark.parametrize("cls", EIGHT_BIT)
def test_state_bytes(cls: type[AdamW]) -> None:
    for numel in (4096, 100_000, 1_000_003):
        p = nn.Parameter(torch.randn(numel))
        optimizer = cls([p])
        p.grad = torch.randn(numel)
        optimizer.step()
        state = [t for t in optimizer.state[p].values() if isinstance(t, Tensor)]
        assert sum(t.nbytes for t in state) <= 2.04 * numel


def test_small_tensors_keep_32_bits() -> None:
    small, large = nn.Parameter(torch.randn(4095)), nn.Parameter(torch.randn(4096))
    optimizer = AdamW8bit([small, large])
    small.grad, large.grad = torch.randn(4095), torch.randn(4096)
    optimizer.step()
    assert optimizer.state[small]["state1"].dtype is torch.float32
    assert optimizer.state[large]["state1"].dtype is torch.uint8


def test_groups_override_arguments(backend: str, device: torch.device) -> None:
    a, b = parameters(device), parameters(device)
    separate_a, separate_b = copies(a), copies(b)
    gradients = random_gradients(a + b, 3)
    groups = [{"params": a, "lr": 1e-2, "optim_bits": 32}, {"params": b, "weight_decay": 0.0}]
    run(AdamW8bit(groups, lr=1e-3, weight_decay=0.5), a + b, gradients)
    half = len(a)
    one = AdamW32bit(separate_a, lr=1e-2, weight_decay=0.5)
    two = AdamW8bit(separate_b, lr=1e-3, weight_decay=0.0)
    run(one, separate_a, [step[:half] for step in gradients])
    run(two, separate_b, [step[half:] for step in gradients])
    assert equal(a + b, separate_a + separate_b)


def test_one_call_for_all_parameters_of_a_group(
    backend: str, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """8-bit and 32-bit moments, and parameters of every dtype, go into the same call."""
    params = [p for dtype in DTYPES for p in parameters(device, dtype)]
    optimizer = AdamW8bit([{"params": params[:7]}, {"params": params[7:]}])
    sizes: list[int] = []
    original = Launch._call

    def call(self: Launch, lists) -> None:
        sizes.append(len(lists.params))
        original(self, lists)

    monkeypatch.setattr(Launch, "_call", call)
    run(optimizer, params, random_gradients(params, 2))
    assert sizes == [7, len(params) - 7] * 2


def test_parameters_step_on_their_own(backend: str, device: torch.device) -> None:
    """A parameter without a gradient is not touched, and counts its own steps."""
    params = parameters(device)
    alone = copies(params[:1])
    first, second, third = random_gradients(params, 3)
    optimizer, single = AdamW8bit(params), AdamW8bit(alone)
    before = params[0].detach().clone()
    params[1].grad = first[1]
    optimizer.step()
    assert torch.equal(params[0], before)
    run(optimizer, params, [second, third])
    run(single, alone, [second[:1], third[:1]])
    assert torch.equal(params[0], alone[0])
    assert (optimizer.state[params[0]]["step"], optimizer.state[params[1]]["step"]) == (2, 3)


def test_maximize(backend: str, device: torch.device) -> None:
    up = parameters(device)
    down = copies(up)
    gradients = random_gradients(up, 4)
    run(AdamW8bit(up, maximize=True), up, gradients)
    run(AdamW8bit(down), down, [[-g for g in step] for step in gradients])
    assert equal(up, down)


@pytest.mark.parametrize("dtype", DTYPES[1:], ids=dtype_id)
def test_stochastic_rounding_moves_16bit_parameters(
    backend: str, device: torch.device, dtype: torch.dtype
) -> None:
    """Steps far below the spacing of the parameters still add up, on the mean."""
    start, lr, steps = 1.5, 5e-5, 10
    nearest = nn.Parameter(torch.full((64, 128), start, dtype=dtype, device=device))
    rounded = copies([nearest])[0]
    gradients = [[torch.ones(64, 128)]] * steps
    run(AdamW8bit([nearest], lr=lr, weight_decay=0.0), [nearest], gradients)
    optimizer = AdamW8bit([rounded], lr=lr, weight_decay=0.0, stochastic_rounding=True)
    run(optimizer, [rounded], gradients)
    assert bool((nearest == start).all())
    # Each of 8192 entries is off by at most one spacing; five standard errors of their mean.
    spacing = 2.0**-7 if dtype is torch.bfloat16 else 2.0**-10
    moved = start - rounded.double().mean().item()
    assert abs(moved - lr * steps) < 5 * (spacing * lr * steps / 8192) ** 0.5


def test_stochastic_rounding_depends_on_seed_and_step_only(
    backend: str, device: torch.device
) -> None:
    first = parameters(device, torch.bfloat16)
    again, other = copies(first), copies(first)
    gradients = random_gradients(first, 3)
    for params, seed in ((first, 1), (again, 1), (other, 2)):
        optimizer = AdamW8bit(params, lr=1e-4, stochastic_rounding=True, seed=seed)
        torch.randn(seed)  # the global generator takes no part
        run(optimizer, params, gradients)
    assert equal(first, again)
    assert not equal(first, other)


def test_strided_parameters_and_gradients(backend: str, device: torch.device) -> None:
    dense = [nn.Parameter(torch.randn(80, 70, device=device))]
    strided = [nn.Parameter(dense[0].detach().t().contiguous().t())]
    assert not strided[0].is_contiguous()
    gradients = random_gradients(dense, 3)
    run(AdamW8bit(dense), dense, gradients)
    run(AdamW8bit(strided), strided, [[g.t().contiguous().t() for g in s] for s in gradients])
    assert equal(dense, strided)


def test_gradient_clipping(backend: str, device: torch.device) -> None:
    params = parameters(device)
    clipped = copies(params)
    (gradients,) = random_gradients(params, 1)
    norm = torch.stack([g.norm() for g in gradients]).norm()
    run(AdamW8bit(params), params, [[g * (1.0 / (norm + 1e-6)) for g in gradients]])
    for p, g in zip(clipped, gradients, strict=True):
        p.grad = g.clone()
    nn.utils.clip_grad_norm_(clipped, 1.0)
    AdamW8bit(clipped).step()
    for p, c in zip(params, clipped, strict=True):
        torch.testing.assert_close(p, c)


def test_grad_scaler(backend: str, device: torch.device) -> None:
    params = parameters(device)
    plain = copies(params)
    good, bad = random_gradients(params, 2)
    bad[1][0, 0] = float("inf")
    run(AdamW8bit(plain), plain, [good])
    optimizer = AdamW8bit(params)
    scaler = torch.amp.GradScaler(device.type, init_scale=1024.0)
    scaler.scale(torch.ones((), device=device))
    for gradients in (bad, good):
        for p, g in zip(params, gradients, strict=True):
            p.grad = g * 1024.0 if gradients is bad else g * scaler.get_scale()
        scaler.step(optimizer)
        scaler.update()
    assert equal(params, plain)
    assert scaler.get_scale() == 512.0 and optimizer.skipped_blocks == 0


def test_nonfinite_gradients_are_reported_once(backend: str, device: torch.device) -> None:
    params = parameters(device)
    optimizer = AdamW8bit(params)
    before = copies(params)
    gradients = [[torch.full_like(p, float("nan")) for p in params]]
    with pytest.warns(UserWarning, match="NaN or Inf gradients; 46 blocks"):
        run(optimizer, params, gradients)
        optimizer.state_dict()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        run(optimizer, params, gradients)
    assert equal(params, before)
    assert optimizer.skipped_blocks == 2 * 46


def test_closure_scheduler_and_deepcopy() -> None:
    p = nn.Parameter(torch.randn(100, 50))
    optimizer = AdamW8bit([p], lr=1.0)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.5**step)

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = p.square().sum()
        loss.backward()
        return loss

    # The value is the closure's own, of the parameters before the step.
    for _ in range(2):
        before = p.detach().square().sum().item()
        assert optimizer.step(closure).item() == before
        assert p.detach().square().sum().item() != before
    scheduler.step()
    assert optimizer.param_groups[0]["lr"] == 0.5
    twin = copy.deepcopy(optimizer)
    (q,) = twin.param_groups[0]["params"]
    p.grad = torch.randn_like(p)
    q.grad = p.grad.clone()
    optimizer.step()
    twin.step()
    assert torch.equal(p, q)


def test_empty_parameter() -> None:
    params = [nn.Parameter(torch.empty(0, 5)), nn.Parameter(torch.randn(3))]
    for p in params:
        p.grad = torch.ones_like(p)
    AdamW8bit(params, min_8bit_size=0).step()


def test_paged_classes_are_quiet_on_cpu() -> None:
    for cls in (PagedAdamW, PagedAdamW8bit, PagedAdamW32bit):
        p = nn.Parameter(torch.randn(5000))
        p.grad = torch.randn(5000)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            cls([p]).step()


def test_trainer_arguments() -> None:
    """What transformers' Trainer passes for adamw_8bit and the paged names."""
    p = nn.Parameter(torch.randn(5000))
    for bits, paged in ((8, False), (8, True), (32, True)):
        optimizer = AdamW(
            [p], lr=1e-4, betas=(0.9, 0.999), eps=1e-8, optim_bits=bits, is_paged=paged
        )
        assert optimizer.param_groups[0]["optim_bits"] == bits and optimizer.is_paged is paged
    assert not any("bitsandbytes" in str(cls) for cls in CLASSES)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"lr": -1.0}, "nf4.AdamW8bit: lr must be finite and not negative, got -1.0"),
        ({"lr": float("nan")}, "lr must be finite and not negative, got nan"),
        ({"lr": "fast"}, "lr must be finite and not negative, got fast"),
        ({"eps": -1e-8}, "eps must be finite and not negative"),
        ({"eps": float("inf")}, "eps must be finite and not negative, got inf"),
        ({"weight_decay": -0.1}, "weight_decay must be finite and not negative"),
        ({"betas": (float("nan"), 0.9)}, r"betas must be in \[0, 1\), got"),
        ({"seed": 2**31}, "seed must be a 32-bit integer, got 2147483648"),
        ({"seed": 0.5}, "seed must be a 32-bit integer, got 0.5"),
        ({"betas": (0.9, 1.0)}, r"betas must be in \[0, 1\), got"),
        ({"betas": (0.9,)}, "betas must be two numbers"),
        ({"amsgrad": True}, "amsgrad must be False"),
        ({"optim_bits": 4}, "optim_bits"),
        ({"percentile_clipping": 5}, "percentile_clipping must be 100"),
        ({"block_wise": False}, "block_wise must be True"),
        ({"is_paged": True, "capturable": True}, "capturable needs is_paged=False"),
    ],
)
def test_argument_errors(arguments: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        AdamW8bit([nn.Parameter(torch.randn(3))], **arguments)


def test_parameter_errors() -> None:
    with pytest.raises(TypeError, match=r"float32, float16 or bfloat16, got torch\.float64"):
        AdamW8bit([nn.Parameter(torch.randn(3).double())])
    with pytest.raises(TypeError, match=r"got torch\.complex64"):
        AdamW8bit([nn.Parameter(torch.randn(3, dtype=torch.complex64))])
    # A group that is refused leaves the optimizer as it was.
    kept = AdamW8bit([nn.Parameter(torch.randn(3))])
    for group in ({"lr": -1.0}, {"params": [nn.Parameter(torch.randn(3).double())]}):
        with pytest.raises((TypeError, ValueError)):
            kept.add_param_group({"params": [nn.Parameter(torch.randn(3))], **group})
        assert len(kept.param_groups) == 1
    embedding = nn.Embedding(10, 3, sparse=True)
    optimizer = AdamW8bit(embedding.parameters())
    embedding(torch.tensor([1])).sum().backward()
    with pytest.raises(RuntimeError, match="gradients must be dense, got sparse"):
        optimizer.step()
