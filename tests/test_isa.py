"""Every instruction-set level of the CPU kernels, in processes of their own.

``NF4_CPU_ISA`` is read once a process. Each probe checks quantization against the reference bit for
bit and matmuls against float64, and prints a digest of every result: digests must not depend on the
number of threads, whatever team the pool really gets. The whole op tests at every level are marked
``check``.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

import nf4
from nf4 import formats
from nf4.backends import cpu, reference

LEVELS = ("portable", "avx2", "avx512", "avx512_bf16")
HERE = Path(__file__).resolve().parent
# m, n, k, block_size, format: one row, streaming, panels, blocks across rows, odd k, 8 bits.
SHAPES = (
    (1, 300, 512, 64, "nf4"),
    (5, 290, 448, 64, "fp4"),
    (17, 160, 320, 32, "nf4"),
    (70, 200, 384, 128, "nf4"),
    (9, 70, 300, 64, "nf4"),
    (3, 33, 65, 64, "nf4"),
    (600, 140, 256, 64, "nf4"),
    (6, 48, 97, 64, "dynamic8"),
)
# Relative error that a result may have; float32 at these depths is off by less than 1e-6.
LIMIT = {torch.float32: 2e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}

needs_library = pytest.mark.skipif(
    cpu.LOAD_ERROR is not None, reason=f"backend cpu: {cpu.LOAD_ERROR}"
)


def _error(got: Tensor, exact: Tensor) -> float:
    return ((got.double() - exact).norm() / exact.norm()).item()


def _results(m: int, n: int, k: int, block_size: int, format: str, dtype: torch.dtype):
    """Name and value of every op's results at one shape; asserts that they are right."""
    ops, id = torch.ops.nf4_cpu, formats.FORMATS[format].id
    dense = torch.randn(n, k) * k**-0.5
    for x in (dense.to(dtype), torch.randn(n * k + 1).to(dtype)[1:]):
        for name, got, expected in zip(
            ("packed", "absmax"),
            ops.quantize(x, block_size, id),
            reference.quantize(x, block_size, id),
            strict=True,
        ):
            assert torch.equal(got, expected), f"{name} of {list(x.shape)} {dtype}"
    packed, absmax = reference.quantize(dense, block_size, id)
    nested = ops.double_quantize(absmax)
    for got, expected in zip(nested, reference.double_quantize(absmax), strict=True):
        assert torch.equal(got, expected), "double_quantize"
    weight = (packed, *nested)
    w = ops.dequantize(*weight, [n, k], block_size, id, dtype)
    assert torch.equal(w, reference.dequantize(*weight, [n, k], block_size, id, dtype)), (
        "dequantize"
    )

    exact = reference.dequantize(*weight, [n, k], block_size, id, torch.float32).double()
    x, g = torch.randn(m, k).to(dtype), torch.randn(m, n).to(dtype)
    bias, seed = torch.randn(n).to(dtype), torch.tensor([7])
    a, b = torch.randn(8, k) * k**-0.5, torch.randn(n, 8)
    lora = (a, b, 0.5, 0.1, seed)
    layout = (block_size, id)
    mask = reference.dropout_mask(x.shape, 0.1, seed).double()
    s = (x.double() * mask) @ a.double().t()
    ds = 0.5 * (g.double() @ b.double())
    base, back = x.double() @ exact.t() + bias.double(), g.double() @ exact
    y, got_s = ops.linear_lora(x, *weight, bias, *lora, n, *layout)
    grads = ops.linear_lora_backward(g, x, got_s, *weight, *lora, *layout, True, True)
    values = {
        "linear": (ops.linear(x, *weight, bias, n, *layout), base),
        "linear_backward": (ops.linear_backward(g, *weight, k, *layout), back),
        "lora y": (y, base + 0.5 * (s @ b.double().t())),
        "lora s": (got_s, s),
        "lora dx": (grads[0], back + mask * (ds @ a.double())),
        "lora da": (grads[1], ds.t() @ (x.double() * mask)),
        "lora db": (grads[2], 0.5 * (g.double().t() @ s)),
    }
    for name, (got, expected) in values.items():
        error = _error(got, expected)
        limit = LIMIT[torch.float32 if got.dtype is torch.float32 else dtype]
        assert error < limit, f"{name}, {m}x{n}x{k} {format} {dtype}: error {error:.2e}"
        yield name, got


def probe(seed: int, teams: list[int]) -> dict[str, dict[str, str]]:
    """Digest of every result, by thread count."""
    digests: dict[str, dict[str, str]] = {}
    for threads in teams:
        torch.set_num_threads(threads)
        torch.manual_seed(seed)
        digests[str(threads)] = {
            f"{name} {shape} {dtype}": hashlib.sha256(
                value.contiguous().view(torch.uint8).numpy().tobytes()
            ).hexdigest()
            for shape in SHAPES
            for dtype in LIMIT
            for name, value in _results(*shape, dtype)
        }
    return digests


def _run(level: str, arguments: list[str], **extra: str) -> subprocess.CompletedProcess[str]:
    paths = [str(HERE.parent), os.environ.get("PYTHONPATH", "")]
    env = os.environ | {"NF4_CPU_ISA": level, "PYTHONPATH": os.pathsep.join(paths)} | extra
    env.pop("ATEN_CPU_CAPABILITY", None)
    return subprocess.run(
        [sys.executable, *arguments], env=env, capture_output=True, text=True, cwd=HERE.parent
    )


def _need(level: str) -> None:
    shown = _run(level, ["-c", "from nf4.backends import cpu; print(cpu.isa())"])
    if shown.stdout.strip() != level:
        pytest.skip(f"this machine has no {level}, it runs {shown.stdout.strip()}")


@needs_library
@pytest.mark.parametrize("level", LEVELS)
def test_level_for_every_team(level: str) -> None:
    _need(level)
    seed = str(torch.randint(2**31, ()).item())
    free = _run(level, [__file__, seed, "1", "2", "3"])
    assert free.returncode == 0, free.stderr
    by_team = json.loads(free.stdout)
    for threads in ("2", "3"):
        assert by_team[threads] == by_team["1"], f"results depend on threads (seed {seed})"
    # The pool asks for three threads and gets one.
    limited = _run(level, [__file__, seed, "3"], OMP_THREAD_LIMIT="1", OMP_NUM_THREADS="3")
    assert limited.returncode == 0, limited.stderr
    assert json.loads(limited.stdout)["3"] == by_team["1"], f"OMP_THREAD_LIMIT=1 (seed {seed})"


@needs_library
def test_torch_cap_holds() -> None:
    env = os.environ | {"ATEN_CPU_CAPABILITY": "default"}
    env.pop("NF4_CPU_ISA", None)
    code = "from nf4.backends import cpu; print(cpu.isa())"
    shown = subprocess.run(
        [sys.executable, "-c", code], env=env, capture_output=True, text=True, cwd=HERE.parent
    )
    assert shown.stdout.strip() == "portable", shown.stderr


@needs_library
@pytest.mark.check
@pytest.mark.parametrize("level", LEVELS)
def test_ops_at_level(level: str) -> None:
    _need(level)
    names = ("quantize", "dequantize", "double_quantize", "linear", "linear_lora")
    files = [str(HERE / f"test_{name}.py") for name in names]
    run = _run(level, ["-m", "pytest", "-q", "-x", "-k", "cpu", *files])
    assert run.returncode == 0, run.stdout[-4000:]


@needs_library
@pytest.mark.check
@pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++ and its sanitizers")
def test_sanitizers() -> None:
    script = subprocess.run(
        ["sh", str(HERE / "sanitize.sh")],
        env=os.environ | {"PYTHON": sys.executable},
        capture_output=True,
        text=True,
    )
    assert script.returncode == 0, (script.stdout + script.stderr)[-4000:]


@pytest.mark.check
@pytest.mark.skipif(
    shutil.which("aarch64-linux-gnu-g++") is None, reason="needs a cross compiler for aarch64"
)
@pytest.mark.parametrize("source", ["isa_portable.cpp", "dispatch.cpp"])
def test_portable_level_compiles_for_aarch64(source: str, tmp_path: Path) -> None:
    """Compiled, not run: with the flags of setup.py, and warnings as errors."""
    root = HERE.parent
    flags = ["-std=c++17", "-O3", "-fPIC", "-Wall", "-Wextra", "-Werror", "-ffp-contract=off"]
    target = tmp_path / "object.o"
    command = ["aarch64-linux-gnu-g++", *flags, f"-I{root / 'csrc/include'}", "-c"]
    subprocess.run([*command, str(root / "csrc/cpu" / source), "-o", str(target)], check=True)
    assert target.read_bytes()[18:20] == b"\xb7\x00"  # ELF's e_machine: AArch64


def _advised(address: int) -> bool:
    """Whether the mapping that holds ``address`` has been asked to use huge pages."""
    inside = False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        bounds = line.split(" ", 1)[0].split("-")
        if len(bounds) == 2:
            inside = int(bounds[0], 16) <= address < int(bounds[1], 16)
        elif inside and line.startswith("VmFlags:"):
            return "hg" in line.split()
    return False


@needs_library
@pytest.mark.skipif(
    not Path("/sys/kernel/mm/transparent_hugepage/enabled").exists(),
    reason="needs Linux with transparent huge pages",
)
def test_large_results_ask_for_huge_pages() -> None:
    huge = 2 << 20
    dense = torch.randn(4096, 2048)
    packed, absmax = torch.ops.nf4_cpu.quantize(dense, 64, 0)
    w = torch.ops.nf4_cpu.dequantize(packed, absmax, None, None, [4096, 2048], 64, 0, dense.dtype)
    for result in (packed, w):
        whole_page = (result.data_ptr() + huge - 1) // huge * huge
        assert whole_page + huge <= result.data_ptr() + result.nbytes
        assert _advised(whole_page)


@needs_library
@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux's /proc")
@pytest.mark.parametrize("op", ("linear", "linear_backward"))
def test_scratch_is_bounded(op: str) -> None:
    """The issue's limit: 16 MiB beside the result at 14336x4096 and 512 rows."""
    code = f"""
import torch, nf4
n, k, m = 14336, 4096, 512
blocks = n * k // 64
weight = (torch.randint(256, (n * k // 2, 1), dtype=torch.uint8),
          torch.randint(256, (blocks,), dtype=torch.uint8), torch.rand(blocks // 256),
          torch.tensor(0.5))
def high_water():
    lines = open("/proc/self/status").read().splitlines()
    return next(int(s.split()[1]) for s in lines if s.startswith("VmHWM")) * 1024
for dtype in (torch.float32, torch.bfloat16, torch.float16):
    forward = "{op}" == "linear"
    x = torch.randn(m, k if forward else n).to(dtype)
    open("/proc/self/clear_refs", "w").write("5")
    before = high_water()
    if forward:
        y = torch.ops.nf4_cpu.linear(x, *weight, None, n, 64, 0)
    else:
        y = torch.ops.nf4_cpu.linear_backward(x, *weight, k, 64, 0)
    extra = high_water() - before - y.numel() * y.element_size()
    assert extra <= 16 * 2**20, (dtype, extra)
    del y
"""
    run = _run(cpu.isa() or "", ["-c", code])
    assert run.returncode == 0, run.stderr


if __name__ == "__main__":
    assert nf4.available_backends()["cpu"]
    print(json.dumps(probe(int(sys.argv[1]), [int(t) for t in sys.argv[2:]])))
