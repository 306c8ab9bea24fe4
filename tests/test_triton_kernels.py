"""What only the Triton backend has: its launches, interpreter repairs, its plan for each device."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator

import pytest
import torch
from cases import DTYPES, Matmul, dtype_id

from nf4 import formats
from nf4.backends import reference, triton_launch, tuning
from nf4.backends import triton as backend_module

pytest.importorskip("triton")

interpreted = pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") != "1", reason="needs TRITON_INTERPRET=1"
)


def test_launches_of_one_kind_compile_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Further launches pass addresses to what the first compiled, and only where that fits."""
    from types import SimpleNamespace

    compiled, launched = [], []

    class Compiled:
        def __getitem__(self, grid):
            return lambda *values: launched.append((grid, values))

    class Kernel:
        def __init__(self) -> None:
            names = ("x_ptr", "none_ptr", "m", "scaling", "BLOCK")
            self.params = [SimpleNamespace(name=n, is_constexpr=n.isupper()) for n in names]

        def __getitem__(self, grid):
            def first(**arguments):
                compiled.append(arguments)
                return Compiled()

            return first

    monkeypatch.setattr(triton_launch, "_compiled", {})
    monkeypatch.setattr(triton_launch, "_parameters", {})
    kernel, x = Kernel(), torch.zeros(64)

    def launch(grid=(3,), x=x, m=32, scaling=1.0, block=64, **options) -> None:
        arguments = {"BLOCK": block, "x_ptr": x, "none_ptr": None, "m": m, "scaling": scaling}
        plan = {"num_warps": 4, "num_stages": 2, "exact": False} | options
        triton_launch.launch_compiled(kernel, grid, arguments, torch.device("cpu"), **plan)

    launch()
    launch(m=48, scaling=2.0)
    assert len(compiled) == 1
    assert launched == [((3, 1, 1), (x.data_ptr(), None, 48, 2.0, 64))]
    for other in (
        {"x": x[1:]},
        {"x": x.double()},
        {"m": 1},
        {"m": 33},
        {"m": 2**33},
        {"block": 128},
        {"num_warps": 8},
        {"exact": True},
    ):
        before = len(compiled)
        launch(**other)
        launch(**other)
        assert len(compiled) == before + 1, other


_PROBE = """
import torch, triton, triton.language as tl
from nf4.backends.triton_launch import repair_interpreter
if {repair}:
    repair_interpreter()

@triton.jit
def kernel(x_ptr, y_ptr, out_ptr):
    i = tl.arange(0, 16)
    x = tl.load(x_ptr + i[:, None] * 16 + i[None, :])
    wide = x.to(tl.float32)
    tl.store(y_ptr + i[:, None] * 16 + i[None, :], (wide * 1.01171875).to(tl.bfloat16))
    tl.store(out_ptr + i[:, None] * 16 + i[None, :], tl.dot(x, x))

x = torch.randn(16, 16).bfloat16()
y, out = torch.empty_like(x), torch.empty(16, 16)
kernel[(1,)](x, y, out)
tiny = torch.full((16, 16), 1e-40, dtype=torch.bfloat16)
tiny_y = torch.empty_like(x)
kernel[(1,)](tiny, tiny_y, torch.empty(16, 16))
scaled = lambda t: (t.float() * 1.01171875).bfloat16()
print(int(torch.equal(y, scaled(x))), int(torch.equal(tiny_y, scaled(tiny))),
      int(torch.allclose(out, x.float() @ x.float(), rtol=1e-5, atol=1e-5)))
"""


def _probe(repair: bool, tmp_path) -> list[str]:
    """Whether casts, casts of denormals and dot are right in the interpreter, as '1' or '0'."""
    script = tmp_path / "probe.py"
    script.write_text(_PROBE.format(repair=repair))
    env = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(
        [sys.executable, str(script)], env=env, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.split()


def test_interpreter_repairs_work(tmp_path) -> None:
    assert _probe(True, tmp_path) == ["1", "1", "1"]


def test_interpreter_repairs_are_still_needed(tmp_path) -> None:
    """Fails once Triton has fixed its interpreter: then drop that part of repair_interpreter."""
    assert _probe(False, tmp_path) == ["0", "0", "0"]


@pytest.fixture(params=[75, 80, 90, 100])
def capability(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[int]:
    """The interpreter plans as for each kind of device."""
    monkeypatch.setattr(triton_launch, "_INTERPRETED", (request.param, 16))
    yield request.param


@interpreted
@pytest.mark.parametrize("m", [1, 9, 40, 100, 257])
@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
def test_plans_agree(m: int, dtype: torch.dtype, capability: int) -> None:
    """Whatever the plan of a device is, the products are the same to rounding."""
    if m >= 100 and dtype is not torch.bfloat16:
        pytest.skip("the interpreter takes seconds for 100 rows: one dtype is enough")
    case = Matmul((m,), 40, 640, nested=True)
    weight, dense = case.weight(torch.device("cpu"))
    layout = (case.block_size, case.format_id)
    x, grad_y = torch.randn(m, case.k, dtype=dtype), torch.randn(m, case.n, dtype=dtype)
    a, b = torch.randn(4, case.k) * 0.05, torch.randn(case.n, 4)
    seed = torch.randint(2**62, (1,))
    lora = (a, b, 0.5, 0.25, seed)
    wide = dense.double()
    mask = reference.dropout_mask(x.shape, 0.25, seed).double()

    y = backend_module.linear(x, *weight, None, case.n, *layout)
    dx = backend_module.linear_backward(grad_y, *weight, case.k, *layout)
    y_lora, s = backend_module.linear_lora(x, *weight, None, *lora, case.n, *layout)
    grads = backend_module.linear_lora_backward(grad_y, x, s, *weight, *lora, *layout, True, True)

    exact_s = (x.double() * mask) @ a.double().t()
    ds = 0.5 * grad_y.double() @ b.double()
    expected = {
        "y": (y, x.double() @ wide.t()),
        "dx": (dx, grad_y.double() @ wide),
        "y with LoRA": (y_lora, x.double() @ wide.t() + 0.5 * exact_s @ b.double().t()),
        "s": (s, exact_s),
        "dx with LoRA": (grads[0], grad_y.double() @ wide + (ds @ a.double()) * mask),
        "da": (grads[1], ds.t() @ (x.double() * mask)),
        "db": (grads[2], 0.5 * grad_y.double().t() @ exact_s),
    }
    # The shared tests hold the bound; this one finds a wrong tile of one device's plan.
    tolerance = {torch.float32: 1e-5, torch.float16: 3e-3, torch.bfloat16: 2e-2}[dtype]
    for name, (got, exact) in expected.items():
        error = (got.double() - exact).norm() / exact.norm()
        assert error < tolerance, f"{name}: relative error {error:.2e}"


@interpreted
@pytest.mark.parametrize("k, block_size", [(64, 64), (1024, 64), (2112, 64), (4096, 4096)])
@pytest.mark.parametrize("offset", [0, 1], ids=["aligned", "odd address"])
def test_a_single_row(
    k: int, block_size: int, offset: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Tiles that end in the last row's middle, blocks longer than a tile, a bias and LoRA."""
    asked = []
    kernel = triton_launch.kernel
    monkeypatch.setattr(
        "nf4.backends.triton_matmul.kernel",
        lambda stem, name: asked.append(stem) or kernel(stem, name),
    )
    case = Matmul((1,), 21, k, nested=True, block_size=block_size)
    weight, dense = case.weight(torch.device("cpu"))
    layout = (case.block_size, case.format_id)
    x = torch.randn(k + offset, dtype=torch.bfloat16)[offset:].view(1, k)
    bias, a, b = torch.randn(21).bfloat16(), torch.randn(40, k) * k**-0.5, torch.randn(21, 40)

    y, _ = backend_module.linear_lora(x, *weight, bias, a, b, 0.5, 0.0, None, case.n, *layout)

    exact = x.double() @ dense.double().t() + bias.double()
    exact += 0.5 * (x.double() @ a.double().t()) @ b.double().t()
    assert (y.double() - exact).norm() / exact.norm() < 1e-2
    assert ("linear_row" in asked) == (offset == 0)


@interpreted
@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
def test_split_backward(dtype: torch.dtype, capability: int) -> None:
    """A long reduction over N in parts: the LoRA term is added, and masked, in one of them."""
    case = Matmul((5,), 640, 64, nested=True)
    weight, dense = case.weight(torch.device("cpu"))
    shape = tuning.Shape(5, case.n, case.k, case.block_size, True, dtype.itemsize)
    plan = tuning.linear_backward(shape, tuning.Target(capability, 16))
    assert plan is not None and plan.split > 1
    layout = (case.block_size, case.format_id)
    grad_y, x = torch.randn(5, case.n, dtype=dtype), torch.randn(5, case.k, dtype=dtype)
    a, b = torch.randn(4, case.k), torch.randn(case.n, 4) * 0.05
    seed = torch.randint(2**62, (1,))

    dx, _, _ = backend_module.linear_lora_backward(
        grad_y, x, torch.zeros(5, 4), *weight, a, b, 0.5, 0.25, seed, *layout, True, False
    )

    mask = reference.dropout_mask(x.shape, 0.25, seed).double()
    term = (0.5 * grad_y.double() @ b.double() @ a.double()) * mask
    exact = grad_y.double() @ dense.double() + term
    tolerance = {torch.float32: 1e-5, torch.float16: 3e-3, torch.bfloat16: 2e-2}[dtype]
    assert (dx.double() - exact).norm() / exact.norm() < tolerance


def test_plans_cover_every_path(capability: int) -> None:
    """The shapes above reach fused, split and workspace plans where a device has them."""
    target = tuning.Target(capability, 16)
    plans = {
        (m, itemsize): tuning.linear(
            tuning.Shape(m, 40, 640, 64, aligned=True, itemsize=itemsize), target
        )
        for m in (1, 9, 40, 100, 257)
        for itemsize in (2, 4)
    }
    assert plans[257, 2] is None and plans[9, 4] is None
    assert plans[1, 2] is not None and plans[1, 2].split > 1
    assert (plans[9, 2] is not None) == (capability >= 80)
    if capability >= 80:
        assert plans[9, 2].permute == (capability == 90)
        halves = {m: tuning.twice(plans[m, 2], 2, target) for m in (1, 9, 40)}
        assert halves == {1: False, 9: False, 40: capability == 80}
        tiles = {m: plan.block_m for (m, itemsize), plan in plans.items() if m == 100 and plan}
        assert tiles == {80: {100: 64}, 90: {}, 100: {100: 128}}[capability]


def test_splits_fill_the_device() -> None:
    """The busiest SM gets few more steps of the reduction than the mean."""
    for sms, bound in ((108, 1.25), (132, 1.05), (148, 1.2), (170, 1.35)):
        target = tuning.Target(90, sms)
        for n, k in ((4096, 4096), (14336, 4096), (8192, 8192), (28672, 8192), (4096, 14336)):
            plan = tuning.linear(tuning.Shape(1, n, k, 64, True, 2), target)
            steps = k // plan.block_k
            programs = -(-n // plan.block_n) * plan.split
            busiest = -(-programs // sms) * -(-steps // plan.split)
            assert busiest / (-(-n // plan.block_n) * steps / sms) < bound, (sms, n, k, plan)
            assert steps // plan.split >= 4


def test_wide_tiles_of_grad_y() -> None:
    """As measured where they were, and elsewhere as for every device."""
    hopper, ampere = tuning.Target(90, 132), tuning.Target(80, 108)
    plan = tuning.lora_grad_y(2048, 14336, 16, 2, hopper)
    assert (plan.block_m, plan.block_n, plan.num_warps, plan.split) == (64, 512, 8, 8)
    for arguments in (
        (2048, 1024, 16, 2, hopper),
        (512, 14336, 16, 2, hopper),
        (2048, 14336, 64, 2, hopper),
        (2048, 14336, 16, 4, hopper),
        (2048, 14336, 16, 2, ampere),
    ):
        m, n, r, itemsize, target = arguments
        same = tuning.lora_grad(m, n, r, False, itemsize, target)
        assert tuning.lora_grad_y(*arguments) == same


@pytest.mark.parametrize("block_size", formats.BLOCK_SIZES)
def test_plans_are_valid(block_size: int) -> None:
    """What kernels rely on: tiles divide blocks, and every part of a split has work."""
    for capability in (75, 80, 86, 89, 90, 100, 120):
        target = tuning.Target(capability, 100)
        for m in (1, 2, 8, 9, 17, 33, 64, 65, 256, 257, 5000):
            for n, k in ((1, block_size), (4096, 4096), (1000, 3 * block_size), (32000, 8192)):
                for itemsize in (2, 4):
                    shape = tuning.Shape(m, n, k, block_size, True, itemsize)
                    for plan in (
                        tuning.linear(shape, target),
                        tuning.linear_backward(shape, target),
                    ):
                        if plan is None:
                            continue
                        assert block_size % plan.block_k == 0
                        assert plan.split >= 1 and plan.split & (plan.split - 1) == 0
        blocked = tuning.Shape(1, 64, 100, block_size, False, 2)
        assert tuning.linear(blocked, target) is None


def test_quantize_loads_pairs_where_it_may() -> None:
    """Two elements in one load: only where there are whole pairs, at addresses of whole pairs."""
    for dtype in DTYPES:
        whole = torch.zeros(1030, dtype=dtype)
        with triton_launch.recording(tuning.Target(90, 132)) as launches:
            for x in (whole, whole[2:], whole[1:1029], whole[:1029]):
                backend_module.quantize(x, 64, formats.NF4.id)
        assert [launch.args["PAIRS"] for launch in launches] == [True, True, False, False]


@pytest.mark.parametrize("p", [0.0, 0.5])
def test_a_group_reads_x_once(p: float) -> None:
    """One down-projection and one dA for all members, whatever their masks."""
    layout, ranks = (64, formats.NF4.id), (16, 16, 8)
    with triton_launch.recording(tuning.Target(90, 132)) as launches:
        dense = torch.empty(128, 256, device="meta")
        packed, absmax = backend_module.quantize(dense, *layout)
        x = torch.empty(512, 256, dtype=torch.bfloat16, device="meta")
        seeds = torch.empty(3, dtype=torch.int64, device="meta")
        lora = (
            [torch.empty(r, 256, device="meta") for r in ranks],
            [torch.empty(128, r, device="meta") for r in ranks],
            [1.0] * 3,
            p,
            seeds,
        )
        weights = ([packed] * 3, [absmax] * 3, [None] * 3, [None] * 3)
        ys, ss = backend_module.linear_lora_group(x, *weights, [None] * 3, *lora, *layout)
        backend_module.linear_lora_group_backward(
            ys, x, ss, *weights, *lora, *layout, needs_dx=True, needs_dab=True
        )
    names = [launch.kernel.fn.__name__ for launch in launches]
    assert names.count("lora_down_kernel") == names.count("lora_grad_a_kernel") == 1
    # Results of an op must not share memory: torch refuses them under compilation.
    assert len({id(s.untyped_storage()) for s in ss}) == 3


@interpreted
@pytest.mark.parametrize("p", [0.0, 0.5])
def test_stack_of_many_ranks(p: float) -> None:
    """Tiles that hold parts of several members, a member in several tiles, and short ones."""
    from nf4.backends.triton_lora import Stack, lora_down, lora_grad_a
    from nf4.backends.triton_matmul import Dropout

    ranks, m, k = (40, 1, 70, 9), 21, 72
    seeds = torch.randint(2**62, (4,))
    stack = Stack(ranks, Dropout.of(p, seeds))
    x, stacked = torch.randn(m, k), torch.randn(sum(ranks), k)
    ss = lora_down(x, stacked, stack)
    ds = torch.randn(m * sum(ranks))
    das = lora_grad_a(x, ds, stack, torch.float32)
    for i, (s, da) in enumerate(zip(ss, das, strict=True)):
        first = sum(ranks[:i])
        mask = reference.dropout_mask(x.shape, p, seeds[i : i + 1]) if p else torch.ones_like(x)
        dropped = x.double() * mask.double()
        member_ds = ds[m * first : m * (first + ranks[i])].view(m, ranks[i]).double()
        expected = dropped @ stacked[first : first + ranks[i]].double().t()
        torch.testing.assert_close(s.double(), expected, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(da.double(), member_ds.t() @ dropped, rtol=1e-4, atol=1e-4)
