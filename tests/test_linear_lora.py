"""linear_lora and linear_lora_backward on every backend, against float64 autograd."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from cases import (
    LORA_SMALL,
    Lora,
    Matmul,
    Weight,
    is_large,
    lora_params,
    op,
    skip_if_emulated,
)
from numerics import assert_accurate
from torch import Tensor

from nf4.backends import reference
from nf4.backends.philox import random_words

loras = pytest.mark.parametrize("case", lora_params())
BF16, F16, F32 = torch.bfloat16, torch.float16, torch.float32


@dataclass
class Inputs:
    """Random inputs of one LoRA case."""

    case: Lora
    weight: Weight
    dense: Tensor
    x: Tensor
    bias: Tensor | None
    a: Tensor
    b: Tensor
    seed: Tensor | None
    grad_y: Tensor

    @classmethod
    def random(cls, case: Lora, device: torch.device) -> Inputs:
        base = case.base
        weight, dense = base.weight(device)
        factory = {"dtype": case.dtype, "device": device}
        adapters = {"dtype": case.lora_dtype, "device": device}
        return cls(
            case,
            weight,
            dense,
            x=torch.randn(*base.lead, base.k, **factory),
            bias=torch.randn(base.n, **factory) if base.bias else None,
            a=torch.randn(case.r, base.k, **adapters) * base.k**-0.5,
            b=torch.randn(base.n, case.r, **adapters) * case.r**-0.5,
            seed=torch.randint(-(2**63), 2**63 - 1, (1,), device=device)
            if case.dropout_p
            else None,
            grad_y=torch.randn(*base.lead, base.n, **factory),
        )

    @property
    def lora(self) -> tuple:
        """The LoRA arguments in the order in which ops take them."""
        return (self.a, self.b, self.case.scaling, self.case.dropout_p, self.seed)

    @property
    def layout(self) -> tuple[int, int]:
        return (self.case.base.block_size, self.case.base.format_id)

    def mask(self) -> Tensor:
        """The float32 multiplier of each element of x."""
        if self.seed is None:
            return torch.ones(self.x.shape, device=self.x.device)
        return reference.dropout_mask(self.x.shape, self.case.dropout_p, self.seed)

    def forward(self) -> tuple[Tensor, Tensor]:
        return op("linear_lora")(
            self.x, *self.weight, self.bias, *self.lora, self.case.base.n, *self.layout
        )

    def backward(self, s: Tensor, needs_dx: bool = True, needs_dab: bool = True) -> tuple:
        return op("linear_lora_backward")(
            self.grad_y, self.x, s, *self.weight, *self.lora, *self.layout, needs_dx, needs_dab
        )


@dataclass
class Expected:
    """The outputs and gradients of one formula, evaluated in one dtype."""

    y: Tensor
    s: Tensor
    dx: Tensor
    da: Tensor
    db: Tensor

    @classmethod
    def of(cls, i: Inputs, dtype: torch.dtype, squared: bool = False) -> Expected:
        """The formula by torch autograd in ``dtype``; with every input squared, the energy."""

        def cast(t: Tensor) -> Tensor:
            return t.to(dtype).square() if squared else t.to(dtype)

        x, a, b = (cast(t).detach().requires_grad_() for t in (i.x, i.a, i.b))
        bias = None if i.bias is None else cast(i.bias)
        scaling = i.case.scaling**2 if squared else i.case.scaling
        s = F.linear(x * cast(i.mask()), a)
        y = F.linear(x, cast(i.dense), bias) + scaling * F.linear(s, b)
        dx, da, db = torch.autograd.grad(y, (x, a, b), cast(i.grad_y))
        return cls(y.detach(), s.detach(), dx, da, db)


class Bound:
    """Holds outputs of one case against the bound of ``numerics``.

    The baseline does everything in x's dtype, adapters cast to it, as autocast does.
    """

    def __init__(self, i: Inputs) -> None:
        self.case = i.case
        self.baseline = Expected.of(i, i.case.dtype)
        self.exact = Expected.of(i, torch.float64)
        self.energy = Expected.of(i, torch.float64, squared=True)

    def check(self, name: str, got: Tensor, samples: int, terms: int) -> None:
        case = self.case
        gradient = name in ("da", "db")
        stored = {"s": F32, "da": case.lora_dtype, "db": case.lora_dtype}.get(name, case.dtype)
        assert got.dtype is stored, f"{name}: {got.dtype}, not {stored}"
        baseline = getattr(self.baseline, name)
        assert_accurate(
            name,
            got,
            baseline=baseline.to(stored) if gradient else baseline,
            exact=getattr(self.exact, name),
            energy=getattr(self.energy, name),
            dtype=max(case.dtype, stored, key=lambda dtype: torch.finfo(dtype).eps),
            terms=terms,
            samples=samples,
        )


def _exact_s(i: Inputs) -> Tensor:
    """What the forward saves, without any backend's error."""
    return Expected.of(i, torch.float64).s.float()


@loras
def test_forward(case: Lora, backend: str, device: torch.device) -> None:
    if is_large(case):
        skip_if_emulated(backend, device)
    i = Inputs.random(case, device)
    m, n, k = case.base.m, case.base.n, case.base.k

    bound = Bound(i)

    y, s = i.forward()

    assert y.is_contiguous() and s.is_contiguous()
    bound.check("s", s, samples=case.r * min(m, k), terms=k)
    bound.check("y", y, samples=min(m * case.r, n * min(m, k)), terms=k)


@loras
def test_backward(case: Lora, backend: str, device: torch.device) -> None:
    if is_large(case):
        skip_if_emulated(backend, device)
    i = Inputs.random(case, device)
    m, n, k, r = case.base.m, case.base.n, case.base.k, case.r
    bound = Bound(i)

    dx, da, db = i.backward(bound.exact.s.float())

    assert dx.is_contiguous() and da.is_contiguous() and db.is_contiguous()
    bound.check("dx", dx, samples=min(m * r, k * min(m, n)), terms=n)
    bound.check("da", da, samples=r * min(m, k), terms=max(m, n))
    bound.check("db", db, samples=r * min(m, n), terms=max(m, k))


@pytest.mark.parametrize("case", LORA_SMALL[::3], ids=str)
def test_needs(case: Lora, backend: str, device: torch.device) -> None:
    """What is not asked for has no elements, and what is asked for does not change."""
    i = Inputs.random(case, device)
    s = _exact_s(i)
    dx, da, db = i.backward(s)

    only_dx = i.backward(s, needs_dab=False)
    only_dab = i.backward(s, needs_dx=False)
    nothing = i.backward(s, needs_dx=False, needs_dab=False)

    assert torch.equal(only_dx[0], dx)
    assert torch.equal(only_dab[1], da) and torch.equal(only_dab[2], db)
    for empty in (*only_dx[1:], only_dab[0], *nothing):
        assert empty.shape == (0,)
    for outputs in (only_dx, only_dab, nothing):
        assert [t.dtype for t in outputs] == [case.dtype, case.lora_dtype, case.lora_dtype]


@pytest.mark.parametrize("m", [1, 8, 70])
@pytest.mark.parametrize("dtype", [F32, BF16], ids=["float32", "bfloat16"])
def test_two_runs_are_equal(m: int, dtype: torch.dtype, backend: str, device: torch.device) -> None:
    case = Lora(Matmul((m,), 48, 576, nested=True), dtype, 16, F32, 0.05)
    i = Inputs.random(case, device)
    s = _exact_s(i)

    for first, second in zip(i.forward(), i.forward(), strict=True):
        assert torch.equal(first, second)
    for first, second in zip(i.backward(s), i.backward(s), strict=True):
        assert torch.equal(first, second)


def test_strided_inputs(backend: str, device: torch.device) -> None:
    case = Lora(Matmul((6,), 40, 72, nested=True, bias=True), F32, 4, None, 0.5)
    i = Inputs.random(case, device)
    i.grad_y = torch.randn(1, 1, device=device).expand(6, 40)
    s = _exact_s(i)
    expected = (*i.forward(), *i.backward(s))

    i.x = i.x.t().contiguous().t()
    i.a = i.a.t().contiguous().t()
    i.b = i.b.t().contiguous().t()
    strided = (*i.forward(), *i.backward(s.t().contiguous().t()))

    for got, plain in zip(strided, expected, strict=True):
        torch.testing.assert_close(got, plain, rtol=1e-4, atol=1e-4)


def test_inputs_are_left_alone(backend: str, device: torch.device) -> None:
    i = Inputs.random(Lora(Matmul((5,), 40, 72, nested=True, bias=True), F32, 4, None, 0.5), device)
    s = _exact_s(i)
    tensors = (i.x, i.bias, i.a, i.b, i.seed, i.grad_y, s, *i.weight)
    before = [t.clone() for t in tensors]

    i.forward()
    i.backward(s)

    for old, new in zip(before, tensors, strict=True):
        assert torch.equal(old, new)


def test_zero_b_is_the_base_layer(backend: str, device: torch.device) -> None:
    """A fresh adapter (B = 0) adds nothing, not even a rounding."""
    i = Inputs.random(Lora(Matmul((9,), 40, 72, nested=True), BF16, 8, F32, 0.5), device)
    i.b = torch.zeros_like(i.b)

    y, _ = i.forward()
    base = op("linear")(i.x, *i.weight, None, 40, *i.layout)

    torch.testing.assert_close(y.float(), base.float(), rtol=2**-7, atol=1e-6)


def _inputs_of_ones(shape: tuple[int, int], p: float, device: torch.device) -> Inputs:
    """Inputs for which s and dx are the dropout mask itself: A is the identity, or all ones."""
    m, k = shape
    i = Inputs.random(Lora(Matmul((m,), 1, k), F32, k, None, p, scaling=1.0), device)
    i.x, i.a, i.b = torch.ones_like(i.x), torch.eye(k, device=device), torch.ones_like(i.b)
    i.grad_y = torch.ones_like(i.grad_y)
    absmax = torch.zeros_like(i.weight.absmax)
    i.weight = Weight(i.weight.packed, absmax, None, None)
    return i


MASKS = [
    *((shape, 0.5, None) for shape in ((1, 1), (3, 7), (64, 64))),
    *(((37, 61), p, None) for p in (0.05, 0.5, 0.9, 2.0**-32, 1 - 2.0**-32, 1 - 2.0**-40)),
    *(((5, 13), 0.5, seed) for seed in (0, 1, -1, 2**32, 2**63 - 1, -(2**63))),
]


@pytest.mark.parametrize("shape, p, seed", MASKS, ids=str)
def test_dropout_mask(
    shape: tuple[int, int], p: float, seed: int | None, backend: str, device: torch.device
) -> None:
    """Forward and backward drop exactly the elements that the rule in nf4.ops names."""
    i = _inputs_of_ones(shape, p, device)
    if seed is not None:
        i.seed = torch.tensor([seed], device=device)
    mask = i.mask()

    _, s = i.forward()
    dx, _, _ = i.backward(s)
    x_dropped = i.backward(torch.ones_like(s))[1]  # ds is all ones: column sums of the mask

    torch.testing.assert_close(s, mask, rtol=1e-6, atol=0)
    torch.testing.assert_close(dx, mask, rtol=1e-6, atol=0)
    sums = mask.sum(dim=0).expand(shape[1], shape[1])
    torch.testing.assert_close(x_dropped, sums, rtol=1e-5, atol=0)


def test_dropout_threshold(backend: str, device: torch.device) -> None:
    """A word equal to the threshold keeps its element, one below it drops it."""
    for element in (0, 5, 90):
        seed = torch.randint(-(2**63), 2**63 - 1, (1,), device=device)
        word = random_words(7 * 13, seed)[element].item()
        for threshold, kept in ((word, True), (word + 1, False)):
            i = _inputs_of_ones((7, 13), threshold / 2**32, device)
            i.seed = seed
            _, s = i.forward()
            dx, _, _ = i.backward(s)
            assert (s.view(-1)[element] != 0).item() is kept
            assert (dx.view(-1)[element] != 0).item() is kept


@pytest.mark.parametrize("dtype", [F32, BF16, F16], ids=str)
def test_a_call_leaves_nothing_behind(
    dtype: torch.dtype, backend: str, device: torch.device
) -> None:
    """Workspaces are reused: NaN of one call must not reach the next through padding."""
    case = Lora(Matmul((5,), 33, 65, nested=True, bias=True), dtype, 3)
    i = Inputs.random(case, device)
    bad = Inputs.random(Lora(Matmul((70,), 130, 131, bias=True), dtype, 17), device)
    s = _exact_s(i)
    expected = (*i.forward(), *i.backward(s))
    for t in (bad.x, bad.a, bad.b, bad.grad_y, bad.weight.absmax):
        t.fill_(torch.nan)
    assert all(t.isnan().all() for t in (*bad.forward(), *bad.backward(_exact_s(bad))))
    for got, first in zip((*i.forward(), *i.backward(s)), expected, strict=True):
        assert torch.equal(got, first)
