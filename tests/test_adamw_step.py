"""The fused AdamW step: every backend against NumPy and against the reference, bit for bit."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import pytest
import torch
from cases import DTYPES, dtype_id, emulated, op
from torch import Tensor

import nf4
from nf4 import formats
from nf4.backends import reference
from nf4.optim.launch import hyper_values

GROUP = {"lr": 3e-3, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.1, "maximize": False}
# Both sides of a block, of a vector of 64, and several blocks with a short tail.
SIZES = (0, 1, 3, 63, 64, 255, 256, 257, 4096, 5000, 70001)


@dataclass
class Arguments:
    """The tensor lists of one call, in the op's order."""

    params: list[Tensor] = field(default_factory=list)
    grads: list[Tensor] = field(default_factory=list)
    state1: list[Tensor] = field(default_factory=list)
    state2: list[Tensor] = field(default_factory=list)
    absmax1: list[Tensor] = field(default_factory=list)
    absmax2: list[Tensor] = field(default_factory=list)
    offsets: list[int] = field(default_factory=list)

    def tensors(self) -> list[Tensor]:
        return [
            *self.params, *self.grads, *self.state1, *self.state2, *self.absmax1, *self.absmax2
        ]  # fmt: skip

    def copy(self, device: torch.device) -> Arguments:
        lists = {
            name: [t.to(device, copy=True) if isinstance(t, Tensor) else t for t in items]
            for name, items in vars(self).items()
        }
        return Arguments(**lists)

    def call(self, step, hyper: Tensor, seed: Tensor | None, skipped: Tensor) -> None:
        step(
            self.params, self.grads, self.state1, self.state2, self.absmax1, self.absmax2,
            hyper, seed, self.offsets, skipped,
        )  # fmt: skip


def random_arguments(sizes: tuple[int, ...], dtypes=DTYPES, bits=(8, 32)) -> Arguments:
    """Random parameters of each size in turn over dtypes and precisions, with a wide range."""
    args = Arguments()
    offset = 0
    for index, n in enumerate(sizes):
        dtype = dtypes[index % len(dtypes)]
        blocks = -(-n // 256)
        # Gradients over eight decades, and exact zeros.
        grad = torch.randn(n) * 10.0 ** torch.randint(-8, 1, (n,)) * (torch.rand(n) > 0.1)
        args.params.append(torch.randn(n).to(dtype))
        args.grads.append(grad.to(dtypes[(index // 2) % len(dtypes)]))
        if bits[(index // len(dtypes)) % len(bits)] == 8:
            args.state1.append(torch.randint(0, 256, (n,), dtype=torch.uint8))
            args.state2.append(torch.randint(0, 256, (n,), dtype=torch.uint8))
            scales = torch.rand(2, blocks) * 10.0 ** torch.randint(-12, 2, (2, blocks))
            args.absmax1.append(scales[0] * (torch.rand(blocks) > 0.1))
            args.absmax2.append(scales[1].square())
        else:
            args.state1.append(torch.randn(n) * 1e-2)
            args.state2.append(torch.rand(n) * 1e-4)
            args.absmax1.append(torch.empty(0))
            args.absmax2.append(torch.empty(0))
        args.offsets.append(offset)
        offset += -(-n // 4) * 4
    return args


def hyper_tensor(step: int, **overrides) -> Tensor:
    return torch.tensor(hyper_values({**GROUP, **overrides}, step), dtype=torch.float32)


def assert_same(got: list[Tensor], wanted: list[Tensor]) -> None:
    for index, (g, w) in enumerate(zip(got, wanted, strict=True)):
        same = g.cpu().view(torch.uint8) == w.cpu().view(torch.uint8)
        if not bool(same.all()):
            at = int((~same).nonzero()[0]) // g.element_size()
            pytest.fail(
                f"tensor {index} ({g.dtype}, {g.numel()} elements): {int((~same).sum())} bytes "
                f"differ, first at {at}: got {g.view(-1)[at]}, wanted {w.view(-1)[at]}"
            )


def check_against_reference(
    backend: str, device: torch.device, args: Arguments, hyper: Tensor, seed: int | None = None
) -> None:
    wanted, got = args.copy(torch.device("cpu")), args.copy(device)
    keys = None if seed is None else torch.tensor([seed])
    skipped = torch.tensor([5]), torch.tensor([5], device=device)
    wanted.call(reference.adamw_step, hyper, keys, skipped[0])
    got.call(
        op("adamw_step"), hyper.to(device), None if keys is None else keys.to(device), skipped[1]
    )
    assert_same(got.tensors(), wanted.tensors())
    assert skipped[0].item() == skipped[1].item()


def numpy_step(p, g, codes1, codes2, absmax1, absmax2, hyper):
    """The docstring of nf4.optim.adamw in NumPy, for one float32 parameter; new values of all."""
    beta1, gain1, beta2, gain2, inverse_c2, eps, decay, step_size = hyper
    scale = [np.repeat(a, 256)[: p.size] for a in (absmax1, absmax2)]
    m = beta1 * (formats.DYNAMIC8.values[codes1] * scale[0]) + gain1 * g
    v = beta2 * (formats.DYNAMIC8_UNSIGNED.values[codes2] * scale[1]) + (gain2 * g) * g
    p = p * decay - step_size * (m / (np.sqrt(v) * inverse_c2 + eps))
    out = [p]
    for x, fmt in ((m, formats.DYNAMIC8), (v, formats.DYNAMIC8_UNSIGNED)):
        starts = np.arange(0, x.size, 256)
        absmax = np.maximum.reduceat(np.abs(x), starts)
        inverse = np.float32(1) / np.maximum(absmax, np.float32(formats.ABSMAX_FLOOR))
        scaled = x * np.repeat(inverse, 256)[: x.size]
        codes = (scaled[:, None] > fmt.thresholds[None, :]).sum(1)
        if fmt is formats.DYNAMIC8_UNSIGNED:
            codes = np.where(x > 0, np.maximum(codes, 1), codes)
        out += [codes.astype(np.uint8), absmax]
    return out


def test_reference_is_the_written_formula() -> None:
    args = random_arguments((3000,), dtypes=(torch.float32,), bits=(8,))
    hyper = hyper_tensor(7)
    wanted = numpy_step(*(t.numpy().copy() for t in args.tensors()), hyper.numpy())
    args.call(reference.adamw_step, hyper, None, torch.zeros(1, dtype=torch.int64))
    got = [args.params, args.state1, args.absmax1, args.state2, args.absmax2]
    assert_same([t for (t,) in got], [torch.from_numpy(w) for w in wanted])


@pytest.mark.parametrize("step", [1, 1000])
def test_bits(backend: str, device: torch.device, step: int) -> None:
    sizes = SIZES[:-1] if emulated(backend, device) else SIZES
    for shift in range(len(DTYPES)):
        order = sizes[shift:] + sizes[:shift]
        check_against_reference(backend, device, random_arguments(order * 2), hyper_tensor(step))


def test_many_parameters(backend: str, device: torch.device) -> None:
    """As many as a LoRA of a large model has; their addresses travel in several pieces."""
    sizes = tuple(int(n) for n in torch.randint(0, 600, (170,)))
    check_against_reference(backend, device, random_arguments(sizes), hyper_tensor(3))


def test_maximize(backend: str, device: torch.device) -> None:
    args = random_arguments((600, 300))
    check_against_reference(backend, device, args, hyper_tensor(2, maximize=True))


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
def test_stochastic_rounding(backend: str, device: torch.device, dtype: torch.dtype) -> None:
    # 2^18 further words reach the second counter word only beyond 2^34, so offsets start there.
    args = random_arguments((1000, 5, 4099), dtypes=(dtype,))
    args.offsets = [offset + 2**34 - 512 for offset in args.offsets]
    # Values on both sides of float16's smallest normal one, subnormals, and what rounds to them.
    exponents = torch.rand(500) * 14 - 26
    args.params[0][:500] = (torch.randn(500).sign() * 2.0**exponents).to(dtype)
    check_against_reference(backend, device, args, hyper_tensor(3), seed=-(2**40) + 12345)


def test_every_code_and_threshold(backend: str, device: torch.device) -> None:
    """With beta1 = 0 and gain1 = 1 the gradient itself is quantized: all ties, one ulp about."""
    near = []
    for fmt in (formats.DYNAMIC8, formats.DYNAMIC8_UNSIGNED):
        t = fmt.thresholds
        near += [np.nextafter(t, -np.inf), t, np.nextafter(t, np.inf), fmt.values]
    exact = torch.from_numpy(np.concatenate(near).astype(np.float32))
    blocks = exact[: exact.numel() // 255 * 255].view(-1, 255)
    # A one in each block makes its absmax one.
    grad = torch.nn.functional.pad(blocks, (1, 0), value=1.0).reshape(-1)
    n = grad.numel()
    codes = torch.arange(n, dtype=torch.int64).to(torch.uint8)
    scales = torch.rand(n // 256)
    # Of large moments the inverse of absmax is small: what is computed from it must not underflow.
    for g in (grad, -grad, grad.abs().sqrt(), grad * 2.0**50):
        args = Arguments(
            [torch.randn(n)], [g], [codes.clone()], [codes.clone()], [scales.clone()],
            [scales.clone()], [0],
        )  # fmt: skip
        hyper = torch.tensor([0.0, 1.0, 0.0, 1.0, 1.0, 1e-8, 1.0, 1e-3])
        check_against_reference(backend, device, args, hyper)
        # And decoding alone: with no gain the state is read, decayed by one and written again.
        hyper[:4] = torch.tensor([1.0, 0.0, 1.0, 0.0])
        check_against_reference(backend, device, args, hyper)


def test_dense_second_moments(backend: str, device: torch.device) -> None:
    """v' from every part of the map, about a million values where the backend is fast."""
    n = 4096 if emulated(backend, device) else 1 << 20
    grad = 10.0 ** (torch.rand(n) * 4.5 - 4.5)
    grad[::256] = 1.0
    zeros = torch.zeros(n, dtype=torch.uint8)
    scales = torch.zeros(n // 256)
    args = Arguments(
        [torch.randn(n)], [grad], [zeros], [zeros.clone()], [scales], [scales.clone()], [0]
    )
    check_against_reference(backend, device, args, torch.tensor([0.0, 1, 0, 1, 1, 1e-8, 1, 1e-3]))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf"), 3e38])
@pytest.mark.parametrize("bits", [8, 32])
def test_nonfinite_gradients_skip_their_block(
    backend: str, device: torch.device, value: float, bits: int
) -> None:
    args = random_arguments((256 * 5 + 10, 40), dtypes=(torch.float32,), bits=(bits,))
    args.grads[0][[300, 301, 256 * 5 + 9]] = value
    before, after = args.copy(device), args.copy(device)
    skipped = torch.zeros(1, dtype=torch.int64, device=device)
    after.call(op("adamw_step"), hyper_tensor(4).to(device), None, skipped)
    assert skipped.item() == 2
    held = torch.zeros(256 * 6, dtype=torch.bool)
    held[256:512] = held[256 * 5 :] = True
    held = held[: 256 * 5 + 10].to(device)
    for old, new in zip(before.tensors(), after.tensors(), strict=True):
        if new.numel() == held.numel():
            assert torch.equal(old[held], new[held]) or not bool(new[held].isfinite().all())
    assert bool((before.params[0] != after.params[0])[~held].any())
    assert all(bool(t.isfinite().all()) for t in [*after.params, *after.absmax1, *after.absmax2])
    check_against_reference(backend, device, args, hyper_tensor(4))


def test_positive_second_moment_never_becomes_zero(backend: str, device: torch.device) -> None:
    grad = torch.full((256,), 1e-5)
    grad[0], grad[1] = 1.0, 0.0
    zeros = torch.zeros(256, dtype=torch.uint8)
    scale = torch.zeros(1)
    args = Arguments(
        [zeros.float()], [grad], [zeros], [zeros.clone()], [scale], [scale.clone()], [0]
    )
    args = args.copy(device)
    skipped = torch.zeros(1, dtype=torch.int64, device=device)
    args.call(op("adamw_step"), hyper_tensor(1).to(device), None, skipped)
    codes = args.state2[0].cpu().tolist()
    assert codes[0] == 255 and codes[1] == 0 and set(codes[2:]) == {1}


def test_unaligned_views(backend: str, device: torch.device) -> None:
    """Parameters and states need not start at an aligned address."""
    args = random_arguments((777, 777), dtypes=(torch.bfloat16, torch.float32)).copy(device)
    shifted = args.copy(device)
    for name in ("params", "grads", "state1", "state2", "absmax1", "absmax2"):
        views = [torch.cat([t.new_zeros(1), t])[1:] for t in getattr(args, name)]
        setattr(shifted, name, views)
    hyper = hyper_tensor(9).to(device)
    skipped = torch.zeros(1, dtype=torch.int64, device=device)
    args.call(op("adamw_step"), hyper, None, skipped)
    shifted.call(op("adamw_step"), hyper, None, skipped)
    assert_same(shifted.tensors(), args.tensors())


def test_opcheck(backend: str, device: torch.device) -> None:
    args = random_arguments((300, 40)).copy(device)
    skipped = torch.zeros(1, dtype=torch.int64, device=device)
    inputs = (
        args.params, args.grads, args.state1, args.state2, args.absmax1, args.absmax2,
        hyper_tensor(1).to(device), None, args.offsets, skipped,
    )  # fmt: skip
    tests = ("test_schema", "test_faketensor")
    torch.library.opcheck(op("adamw_step"), inputs, test_utils=tests)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"grads": []}, "every list must have 1 entries, got 0"),
        ({"offsets": []}, "offsets must have 1 entries, got 0"),
        ({"offsets": [2]}, "offsets must be multiples of 4 and not negative, got 2"),
        ({"params": [torch.zeros(300).double()]}, "every parameter must be float32, float16 or"),
        ({"grads": [torch.zeros(299)]}, r"every gradient must have 300 elements, got \[299\]"),
        ({"grads": [torch.zeros(300, 2)[:, 0]]}, "every gradient must be contiguous"),
        ({"state2": [torch.zeros(300)]}, "state2 must be uint8, got float32"),
        ({"absmax1": [torch.zeros(1)]}, r"absmax1 must have 2 elements, got \[1\]"),
        ({"absmax2": [torch.zeros(2).half()]}, "absmax2 must be float32, got float16"),
    ],
)
def test_errors_of_the_native_op(change: dict, message: str) -> None:
    if not nf4.available_backends()["cpu"]:
        pytest.skip(f"backend cpu: {nf4.available_backends()['cpu'].reason}")
    args = random_arguments((300,), dtypes=(torch.float32,), bits=(8,))
    before = args.copy(torch.device("cpu"))
    wrong = Arguments(**{**vars(args), **change})
    skipped = torch.zeros(1, dtype=torch.int64)
    with pytest.raises(RuntimeError, match=r"nf4\.adamw_step: " + message):
        wrong.call(torch.ops.nf4_cpu.adamw_step, hyper_tensor(1), None, skipped)
    assert_same(args.tensors(), before.tensors())
