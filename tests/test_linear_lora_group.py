"""linear_lora_group on every backend: against separate calls, float64 autograd, torch.compile."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from cases import DTYPES, Lora, Matmul, dtype_id, op
from numerics import assert_accurate
from test_linear_lora import Bound, Inputs
from torch import Tensor

import nf4

BF16, F16, F32 = torch.bfloat16, torch.float16, torch.float32


@dataclass(frozen=True)
class Group:
    """Members that share x: (n, r, bias) of each."""

    lead: tuple[int, ...]
    k: int
    members: tuple[tuple[int, int, bool], ...]
    dtype: torch.dtype
    adapter_dtype: torch.dtype | None = None
    dropout_p: float = 0.0
    block_size: int = 64
    nested: bool = False
    format: str = "nf4"

    def __str__(self) -> str:
        sizes = "+".join(f"{n}r{r}{'b' if bias else ''}" for n, r, bias in self.members)
        lead = "x".join(map(str, self.lead))
        return f"{lead}-{sizes}-{self.k}-p{self.dropout_p}-{dtype_id(self.dtype)}"

    def inputs(self, device: torch.device) -> list[Inputs]:
        """One ``Inputs`` for each member, all with the same x."""
        members = []
        for index, (n, r, bias) in enumerate(self.members):
            base = Matmul(self.lead, n, self.k, self.block_size, self.format, self.nested, bias)
            scaling = 0.5 * (index + 1)
            lora = Lora(base, self.dtype, r, self.adapter_dtype, self.dropout_p, scaling)
            members.append(Inputs.random(lora, device))
            members[-1].x = members[0].x
        return members


QKV = ((48, 8, True), (16, 8, True), (16, 8, True))
GROUPS = [
    Group((1,), 128, ((64, 16, False), (32, 16, False), (32, 16, False)), BF16, F32, nested=True),
    Group((2, 3), 64, QKV, F16, F32, 0.25),
    Group((5,), 70, QKV, F32, None, 0.5, nested=True),
    Group((7,), 192, ((40, 4, False), (136, 4, True)), BF16, None, 0.05, block_size=32),
    Group((40,), 128, ((96, 16, False), (96, 16, False)), BF16, F32, 0.05, nested=True),
    Group((17,), 64, ((24, 3, False), (8, 19, False), (130, 1, True)), F16, F16, 0.1),
    Group((9,), 64, ((33, 8, False), (7, 8, False)), BF16, None, format="fp4"),
    Group((4,), 97, ((16, 4, True),), F32, BF16, 0.5, format="dynamic8"),
    Group((0,), 64, ((16, 4, True), (8, 4, False)), BF16, F32, 0.1),
    # Few tokens and k % 256 == 0 (csrc/cuda/linear_few.cu).
    Group((2,), 512, ((136, 8, True), (40, 40, False), (33, 4, True)), BF16, F32, 0.1, nested=True),
    Group((11,), 256, ((24, 16, False),) * 5, F16, None),
    # More members than one CUDA launch takes, and tiles of two members in one CTA's run.
    Group((3,), 576, ((136, 8, True), (264, 8, False), (33, 4, True)), BF16, F32, 0.1, nested=True),
    Group((5,), 64, ((8, 2, True),) * 5, F16, F32, 0.25),
    Group((66,), 128, ((136, 8, False), (264, 8, False)), BF16, F32, 0.1, nested=True),
]
groups = pytest.mark.parametrize("group", GROUPS, ids=str)


def columns(members: list[Inputs]) -> list[list[Any]]:
    """packed, absmax, nested_absmax and offset of every member."""
    return [list(parts) for parts in zip(*(i.weight for i in members), strict=True)]


def shared(members: list[Inputs]) -> tuple[Any, ...]:
    """The LoRA arguments in the order in which the ops take them."""
    seeds = [i.seed for i in members if i.seed is not None]
    return (
        [i.a for i in members],
        [i.b for i in members],
        [i.case.scaling for i in members],
        members[0].case.dropout_p,
        torch.cat(seeds) if seeds else None,
        *members[0].layout,
    )


def forward(members: list[Inputs]) -> tuple[list[Tensor], list[Tensor]]:
    bias = [i.bias for i in members]
    return op("linear_lora_group")(members[0].x, *columns(members), bias, *shared(members))


def backward(
    members: list[Inputs], ss: list[Tensor], needs_dx: bool = True, needs_dab: bool = True
) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    grads, x = [i.grad_y for i in members], members[0].x
    weights = columns(members)
    return op("linear_lora_group_backward")(
        grads, x, ss, *weights, *shared(members), needs_dx, needs_dab
    )


@groups
def test_accuracy(group: Group, backend: str, device: torch.device) -> None:
    members = group.inputs(device)
    bounds = [Bound(i) for i in members]
    ys, ss = forward(members)
    dx, das, dbs = backward(members, [b.exact.s.float() for b in bounds])
    for i, bound, y, s, da, db in zip(members, bounds, ys, ss, das, dbs, strict=True):
        m, n, k, r = i.case.base.m, i.case.base.n, i.case.base.k, i.case.r
        bound.check("s", s, samples=r * min(m, k), terms=k)
        bound.check("y", y, samples=min(m * r, n * min(m, k)), terms=k)
        bound.check("da", da, samples=r * min(m, k), terms=max(m, n))
        bound.check("db", db, samples=r * min(m, n), terms=max(m, k))
    assert dx.dtype is group.dtype
    first = bounds[0]
    baseline = torch.stack([b.baseline.dx.double() for b in bounds]).sum(0).to(group.dtype)
    assert_accurate(
        "dx",
        dx,
        baseline=baseline,
        exact=sum((b.exact.dx for b in bounds[1:]), first.exact.dx),
        energy=sum((b.energy.dx for b in bounds[1:]), first.energy.dx),
        # The baseline rounds each member's part once, and so do separate calls.
        dtype=group.dtype,
        terms=sum(n for n, _, _ in group.members),
        samples=min(min(i.case.r, i.case.base.n) for i in members),
    )


@groups
def test_equals_separate_calls(group: Group, backend: str, device: torch.device) -> None:
    """Through the public functions, with all gradients; bit for bit without a GPU kernel."""
    members = group.inputs(device)
    results = []
    for grouped in (True, False):
        x = members[0].x.detach().clone().requires_grad_()
        leaves = [[t.detach().clone().requires_grad_() for t in (i.a, i.b)] for i in members]
        biases = [None if i.bias is None else i.bias.clone().requires_grad_() for i in members]
        qs = [quantized(i) for i in members]
        lora_as, lora_bs = [a for a, _ in leaves], [b for _, b in leaves]
        scalings = [i.case.scaling for i in members]
        if grouped:
            ys = nf4.linear_lora_group(
                x, qs, lora_as, lora_bs, scalings, biases, group.dropout_p, seeds=shared(members)[4]
            )
        else:
            ys = [
                nf4.linear_lora(x, q, a, b, s, bias, group.dropout_p, seed=i.seed)
                for i, q, a, b, s, bias in zip(
                    members, qs, lora_as, lora_bs, scalings, biases, strict=True
                )
            ]
        wanted = [x, *lora_as, *lora_bs, *(b for b in biases if b is not None)]
        grads = torch.autograd.grad(ys, wanted, [i.grad_y for i in members])
        results.append([*ys, *grads])
    exact = backend in ("cpu", "reference")
    tolerance = {F32: 1e-4, F16: 2e-2, BF16: 1e-1}[group.dtype]
    for ours, theirs in zip(*results, strict=True):
        if exact:
            assert torch.equal(ours, theirs)
        elif ours.numel():
            scale = theirs.float().abs().max().item()
            torch.testing.assert_close(ours, theirs, rtol=0, atol=tolerance * max(scale, 1e-6))


def quantized(i: Inputs) -> nf4.QuantizedTensor:
    base = i.case.base
    shape = torch.Size((base.n, base.k))
    return nf4.QuantizedTensor(*i.weight, shape, i.case.dtype, base.block_size, base.format)


@pytest.mark.parametrize("needs", [(True, False), (False, True), (False, False)], ids=str)
def test_backward_leaves_out_what_is_not_needed(
    needs: tuple[bool, bool], backend: str, device: torch.device
) -> None:
    members = GROUPS[1].inputs(device)
    ss = forward(members)[1]
    full, part = backward(members, ss), backward(members, ss, *needs)
    assert part[0].shape == (full[0].shape if needs[0] else (0,))
    if needs[0]:
        assert torch.equal(part[0], full[0])
    for got, all_of in zip((*part[1], *part[2]), (*full[1], *full[2]), strict=True):
        assert torch.equal(got, all_of) if needs[1] else got.shape == (0,)


@pytest.mark.parametrize("group", GROUPS[1:6:2], ids=str)
def test_two_runs_are_equal(group: Group, backend: str, device: torch.device) -> None:
    members = group.inputs(device)
    (ys, ss), (again, _) = forward(members), forward(members)
    first, second = backward(members, ss), backward(members, ss)
    pairs = zip((*ys, *first[1], *first[2]), (*again, *second[1], *second[2]), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs) and torch.equal(first[0], second[0])


@pytest.mark.parametrize("which", range(2))
def test_only_some_outputs_are_used(which: int, backend: str, device: torch.device) -> None:
    """A member without a gradient of its own adds nothing."""
    members = GROUPS[4].inputs(device)
    x = members[0].x.clone().requires_grad_()
    leaves = [(i.a.clone().requires_grad_(), i.b.clone().requires_grad_()) for i in members]
    qs = [quantized(i) for i in members]
    ys = nf4.linear_lora_group(x, qs, *map(list, zip(*leaves, strict=True)), [0.5, 1.0])
    ys[which].backward(members[which].grad_y)
    for index, (a, b) in enumerate(leaves):
        assert (a.grad.abs().sum() > 0).item() is (index == which)
        assert (b.grad.abs().sum() > 0).item() is (index == which)
    assert x.grad is not None and x.grad.abs().sum() > 0


@pytest.mark.parametrize("compiler", ["eager", "aot_eager"])
def test_compile(compiler: str, backend: str, device: torch.device) -> None:
    torch.compiler.reset()  # or the variants of other backends count towards its limit
    members = GROUPS[1].inputs(device)
    qs = [quantized(i) for i in members]
    loras = [[i.a for i in members], [i.b for i in members], [i.case.scaling for i in members]]
    biases = [i.bias for i in members]
    seeds = shared(members)[4]

    def run(x: Tensor) -> Tensor:
        ys = nf4.linear_lora_group(x, qs, *loras, biases, 0.25, seeds=seeds)
        return torch.cat([y * 2 for y in ys], dim=-1)

    results = []
    for function in (run, torch.compile(run, fullgraph=True, backend=compiler)):
        x = members[0].x.clone().requires_grad_()
        y = function(x)
        y.sum().backward()
        results.append((y.detach(), x.grad))
        with torch.no_grad():
            assert torch.equal(function(x), y)
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs)


def test_dropout_draws_a_mask_for_each_member(backend: str, device: torch.device) -> None:
    """Equal members, no seed given: different masks; none at all in evaluation."""
    i = GROUPS[4].inputs(device)[0]
    q, many = quantized(i), 3
    loras = ([i.a] * many, [i.b] * many, [1.0] * many)
    trained = nf4.linear_lora_group(i.x, [q] * many, *loras, dropout_p=0.5)
    assert not torch.equal(trained[0], trained[1]) and not torch.equal(trained[1], trained[2])
    still = nf4.linear_lora_group(i.x, [q] * many, *loras, dropout_p=0.5, training=False)
    assert torch.equal(still[0], still[1])
    for y in still:
        torch.testing.assert_close(y, nf4.linear_lora(i.x, q, i.a, i.b, 1.0))


def test_autocast_casts_x(backend: str, device: torch.device) -> None:
    members = GROUPS[2].inputs(device)
    qs = [quantized(i) for i in members]
    loras = [[i.a for i in members], [i.b for i in members], [1.0] * len(members)]
    with torch.autocast(device.type, dtype=torch.bfloat16):
        ys = nf4.linear_lora_group(members[0].x, qs, *loras)
    assert all(y.dtype is torch.bfloat16 for y in ys)


class TestErrors:
    """Each error names the op, the member, the rule and the value."""

    def arguments(self) -> dict[str, Any]:
        qs = [nf4.quantize(torch.randn(n, 64)) for n in (16, 8)]
        return {
            "x": torch.randn(3, 64),
            "qs": qs,
            "lora_as": [torch.randn(4, 64) for _ in qs],
            "lora_bs": [torch.randn(q.shape[0], 4) for q in qs],
            "scalings": [1.0, 2.0],
        }

    @pytest.mark.parametrize(
        "change, kind, message",
        [
            ({"scalings": [1.0]}, ValueError, r"one length of at least 1, got 2, 2, 2, 1 and 2"),
            ({"qs": []}, ValueError, r"one length of at least 1, got 0"),
            ({"biases": [None]}, ValueError, r"got 2, 2, 2, 2 and 1"),
            ({"dropout_p": 1.0}, ValueError, r"dropout_p must be in \[0, 1\), got 1.0"),
            ({"x": torch.randn(3, 65)}, ValueError, r"member 0: x must have 64 features"),
            (
                {"biases": [None, torch.zeros(9)]},
                ValueError,
                r"member 1: bias must have shape \[8\]",
            ),
            (
                {"dropout_p": 0.5, "seeds": torch.zeros(1, dtype=torch.int64)},
                ValueError,
                r"seeds must be int64 \[2\] on cpu, got torch.int64 \[1\]",
            ),
        ],
    )
    def test_wrong(self, change: dict, kind: type[Exception], message: str) -> None:
        with pytest.raises(kind, match=rf"^nf4\.linear_lora_group: .*{message}"):
            nf4.linear_lora_group(**{**self.arguments(), **change})

    def test_members_must_agree(self) -> None:
        given = self.arguments()
        other = [given["qs"][0], nf4.quantize(torch.randn(8, 64), block_size=128)]
        message = r"member 1 must have block size 64 and format 'nf4' .*, got 128 and 'nf4'"
        with pytest.raises(ValueError, match=message):
            nf4.linear_lora_group(**{**given, "qs": other})
        given["lora_as"][1], given["lora_bs"][1] = (
            given["lora_as"][1].to(torch.bfloat16),
            given["lora_bs"][1].to(torch.bfloat16),
        )
        with pytest.raises(TypeError, match=r"member 1 must have adapters of torch.float32"):
            nf4.linear_lora_group(**given)

    def test_adapters_do_not_fit(self) -> None:
        given = self.arguments()
        given["lora_bs"][1] = torch.randn(8, 5)
        with pytest.raises(ValueError, match=r"member 1: lora_b must have shape \[8, 4\]"):
            nf4.linear_lora_group(**given)


def test_dtypes_cover_all() -> None:
    assert {g.dtype for g in GROUPS} == set(DTYPES)
