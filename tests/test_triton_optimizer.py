"""The Triton AdamW step: one launch for parameters of all dtypes, and what it compiles to."""

from __future__ import annotations

import os
from itertools import product

import pytest
import torch
from cases import DTYPES, op
from test_adamw_step import Arguments, assert_same, hyper_tensor, random_arguments

from nf4.backends import reference, triton_optim

pytest.importorskip("triton")

interpreted = os.environ.get("TRITON_INTERPRET") == "1"
needs_compiler = pytest.mark.skipif(
    interpreted, reason="compiling Triton kernels needs a process without TRITON_INTERPRET=1"
)


def mixture() -> Arguments:
    """Every combination of parameter, gradient and state dtype, twice."""
    args = Arguments()
    for i, (param, grad, bits) in enumerate(2 * list(product(DTYPES, DTYPES, (8, 32)))):
        one = random_arguments((300 + i,), dtypes=(param,), bits=(bits,))
        one.grads[0], one.offsets[0] = one.grads[0].to(grad), 400 * i
        for name, items in vars(one).items():
            getattr(args, name).extend(items)
    return args


def test_one_launch_for_all_dtypes(
    backend: str, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    if backend != "triton":
        pytest.skip(f"backend {backend}: about the Triton launcher")
    kinds: list[tuple] = []
    original = triton_optim.launch

    def launch(kernel, grid, args, *rest, **options) -> None:
        kinds.append(args["KINDS"])
        original(kernel, grid, args, *rest, **options)

    monkeypatch.setattr(triton_optim, "launch", launch)
    args, hyper, seed = mixture(), hyper_tensor(5).to(device), torch.tensor([11])
    wanted = args.copy(torch.device("cpu"))
    zero = torch.zeros(1, dtype=torch.int64)
    wanted.call(reference.adamw_step, hyper.cpu(), seed, zero)
    for order in (1, -1):
        got = args.copy(device)
        for i in range(18):  # the first of each pair begins at no multiple of 16 bytes
            got.params[i] = torch.cat([got.params[i].new_zeros(1), got.params[i]])[1:]
        turned = Arguments(**{name: items[::order] for name, items in vars(got).items()})
        turned.call(op("adamw_step"), hyper, seed.to(device), zero.to(device))
        assert_same(got.tensors(), wanted.tensors())
    # What is compiled does not depend on the order of the parameters.
    first, second = kinds
    assert first == second and len(first) == 36


@needs_compiler
@pytest.mark.parametrize(
    ("arch", "dtype", "bits", "stochastic"),
    [
        (80, torch.float32, 8, False),
        (90, torch.float32, 8, False),
        (90, torch.bfloat16, 8, True),
        (90, torch.float32, 32, False),
        (120, torch.float32, 8, False),
    ],
)
def test_compiles(arch: int, dtype: torch.dtype, bits: int, stochastic: bool) -> None:
    from benchmarks.triton_static import allowed_spills, measure
    from benchmarks.triton_static_plan import SM_COUNT
    from nf4.backends import triton
    from nf4.backends.triton_launch import recording
    from nf4.backends.tuning import Target

    args = random_arguments((5000, 70_000), dtypes=(dtype,), bits=(bits,))
    seed = torch.tensor([3]) if stochastic else None
    with recording(Target(arch, SM_COUNT[arch])) as launches:
        args.call(triton.adamw_step, hyper_tensor(1), seed, torch.zeros(1, dtype=torch.int64))
    (launch,) = launches  # both parameters in one
    row = measure("adamw", launch, arch)
    assert row.spills <= allowed_spills(row)
    # Loads of parameter, gradient and moments, and stores of what is written, where 16 bytes a
    # thread are eight 16-bit or four 32-bit elements. Eight codes are eight bytes.
    assert row.wide_accesses >= (3 if dtype is torch.bfloat16 else 6)


@needs_compiler
@pytest.mark.check
@pytest.mark.parametrize("arch", (75, 80, 86, 89, 90, 100, 120))
def test_a_mixture_compiles_without_spills(arch: int) -> None:
    """Float32 norms beside bfloat16 weights: the kernel takes the registers of its largest kind."""
    from benchmarks.triton_static import allowed_spills, measure
    from benchmarks.triton_static_plan import SM_COUNT
    from nf4.backends import triton
    from nf4.backends.triton_launch import recording
    from nf4.backends.tuning import Target

    args = random_arguments((5000,) * 4, dtypes=(torch.float32, torch.bfloat16))
    zero = torch.zeros(1, dtype=torch.int64)
    with recording(Target(arch, SM_COUNT[arch])) as launches:
        args.call(triton.adamw_step, hyper_tensor(1), torch.tensor([3]), zero)
    (launch,) = launches
    assert len(launch.args["KINDS"]) == 4
    row = measure("adamw", launch, arch)
    assert row.spills <= allowed_spills(row) and row.registers <= 128


def test_captured_graphs_keep_their_tables(monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither do later steps push them out, nor does a step take one that no replay has filled."""
    monkeypatch.setattr(triton_optim, "_TABLES", type(triton_optim._TABLES)())
    monkeypatch.setattr(triton_optim, "_CAPTURED", [])
    capturing = [False]
    monkeypatch.setattr(triton_optim, "_capturing", lambda device: capturing[0])
    cpu = torch.device("cpu")

    def rows(first: int) -> tuple[tuple[int, ...], ...]:
        return ((first, 0, 0, 0, 0, 0, 3000, 0, 0),)

    warm, _ = triton_optim._tables(rows(1), cpu)
    capturing[0] = True
    assert triton_optim._tables(rows(1), cpu)[0] is warm
    fresh, _ = triton_optim._tables(rows(2), cpu)
    capturing[0] = False
    assert triton_optim._tables(rows(2), cpu)[0] is not fresh
    for i in range(3, 3 + 2 * triton_optim._MAX_TABLES):
        triton_optim._tables(rows(i), cpu)
    assert len(triton_optim._TABLES) == triton_optim._MAX_TABLES
    assert [tables[0] for tables in triton_optim._CAPTURED] == [warm, fresh]
