"""The CUDA kernels on a CPU: the shared op tests over tests/cuda_on_cpu, and planted defects.

The op tests run in a process of their own with the backend "cuda" replaced by the emulation, in an
AddressSanitizer build and in a race build. A planted defect is a line of a kernel that a macro
NF4_PLANT_<name> removes or breaks; the emulation has to report it.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
sys.path.insert(0, str(HERE))

from cuda_on_cpu import build  # noqa: E402

OPS = ("quantize", "dequantize", "double_quantize", "linear", "linear_lora", "cuda_tiles")
REASON = build.missing()
needs_emulation = pytest.mark.skipif(REASON is not None, reason=str(REASON))


def run_pytest(mode: str, library: Path, *args: str) -> subprocess.CompletedProcess[str]:
    """pytest in a new process whose backend "cuda" is the emulated ``library``."""
    env = os.environ | build.environment(mode)
    env["NF4_EMULATED"] = f"{mode}:{library}"
    env["PYTHONPATH"] = os.pathsep.join((str(ROOT), str(HERE)))
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "cuda_on_cpu.emulated"]
    command += ["-p", "no:faulthandler", "-s", *args]  # ASan writes to the real stderr
    return subprocess.run(command, env=env, cwd=ROOT, capture_output=True, text=True)


@needs_emulation
@pytest.mark.parametrize("mode", build.MODES)
def test_ops_pass_the_shared_tests(mode: str) -> None:
    files = [str(HERE / f"test_{op}.py") for op in OPS]
    result = run_pytest(mode, build.build(mode), "-k", "cuda", *files)
    assert result.returncode == 0, (result.stdout + result.stderr)[-8000:]


def kernel_sources() -> list[Path]:
    return sorted((ROOT / "csrc" / "cuda").glob("*.cu*"))


@pytest.mark.parametrize("path", kernel_sources(), ids=lambda path: path.name)
def test_kernels_keep_to_the_helpers(path: Path) -> None:
    """Only then is what the emulation runs what the GPU runs."""
    text = re.sub(r"//.*", "", path.read_text())
    allowed = {
        "ptx.cuh": (r"\basm\b",),
        "launch.cuh": (r"\bcuda[A-Z]\w+\(",),
        "shared.cuh": (r"__shared__",),
    }.get(path.name, ())
    rules = {
        r"\basm\b": "inline assembly belongs in ptx.cuh",
        r"<<<": "launches go through launch.cuh",
        r"__shared__": "shared memory comes from shared.cuh",
        r"\bcuda[A-Z]\w+\(": "calls of the CUDA runtime belong in launch.cuh",
        r"torch|ATen": "kernels see no torch header",
        r"\bvolatile\b": "no implicit ordering",
    }
    for pattern, rule in rules.items():
        if pattern in allowed or (path.name == "ptx.cuh" and pattern == r"\bvolatile\b"):
            continue
        assert not re.search(pattern, text), f"{path.name}: {rule}"


# A plant, the op whose test meets it, and what the named build has to say about it.
PLANTS = [
    ("MISSING_BARRIER", "race", "linear", r"race|reads bytes that"),
    ("MISSING_WAIT", "race", "linear", r"a cp\.async is still writing"),
    ("MISSING_WAIT", "asan", "linear", r"use-after-poison"),
    ("OUT_OF_BOUNDS", "asan", "quantize", r"heap-buffer-overflow"),
    ("OUT_OF_BOUNDS", "race", "quantize", r"out of bounds"),
]


@needs_emulation
@pytest.mark.check
@pytest.mark.parametrize("plant, mode, op, report", PLANTS, ids=str)
def test_planted_defects_are_caught(plant: str, mode: str, op: str, report: str) -> None:
    tests = {"linear": "test_two_runs_are_equal and cuda and bfloat16", "quantize": "cuda"}
    library = build.build(mode, plant)
    result = run_pytest(mode, library, "-k", tests[op], str(HERE / f"test_{op}.py"))
    assert result.returncode != 0, f"NF4_PLANT_{plant} went unnoticed"
    assert re.search(report, result.stdout + result.stderr), (result.stdout + result.stderr)[-4000:]
