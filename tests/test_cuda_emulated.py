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

OPS = (
    "quantize",
    "dequantize",
    "double_quantize",
    "linear",
    "linear_lora",
    "linear_lora_group",
    "cuda_tiles",
)
REASON = build.missing()
needs_emulation = pytest.mark.skipif(REASON is not None, reason=str(REASON))


def run_pytest(
    mode: str, library: Path, *args: str, device: str | None = None
) -> subprocess.CompletedProcess[str]:
    """pytest in a new process whose backend "cuda" is the emulated ``library``.

    ``device`` is "<multiprocessors>:<compute capability>".
    """
    env = os.environ | build.environment(mode)
    if device is not None:
        env["NF4_EMULATED_DEVICE"] = device
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


@needs_emulation
@pytest.mark.parametrize("device", ["3:80", "3:90:no tensor maps"])
def test_many_tokens_without_wgmma(device: str) -> None:
    """What sm_90a sends to wgmma goes through mma.sync elsewhere, and under an old driver."""
    cases = "131x or 270x or 140x or 150x or 130x or 257x or 260x"
    result = run_pytest(
        "asan", build.build("asan"), "-k", cases, str(HERE / "test_cuda_tiles.py"), device=device
    )
    assert result.returncode == 0, (result.stdout + result.stderr)[-8000:]


def kernel_sources() -> list[Path]:
    return sorted((ROOT / "csrc" / "cuda").glob("*.cu*"))


@pytest.mark.parametrize("path", kernel_sources(), ids=lambda path: path.name)
def test_kernels_keep_to_the_helpers(path: Path) -> None:
    """Only then is what the emulation runs what the GPU runs."""
    text = re.sub(r"//.*", "", path.read_text())
    allowed = {
        "ptx.cuh": (r"\basm\b", r"\bvolatile\b"),
        "hopper.cuh": (r"\basm\b", r"\bvolatile\b"),
        "mbarrier.cuh": (r"\basm\b", r"\bvolatile\b"),
        "launch.cuh": (r"\bcuda[A-Z]\w+\(",),
        "tensor_map.cuh": (r"\bcuda[A-Z]\w+\(",),
        "shared.cuh": (r"__shared__",),
    }.get(path.name, ())
    rules = {
        r"\basm\b": "inline assembly belongs in ptx.cuh, hopper.cuh and mbarrier.cuh",
        r"<<<": "launches go through launch.cuh",
        r"__shared__": "shared memory comes from shared.cuh",
        r"\bcuda[A-Z]\w+\(": "calls of the CUDA runtime belong in launch.cuh",
        r"torch|ATen": "kernels see no torch header",
        r"\bvolatile\b": "no implicit ordering",
    }
    for pattern, rule in rules.items():
        if pattern in allowed:
            continue
        assert not re.search(pattern, text), f"{path.name}: {rule}"


WGMMA_WAIT = r"a wgmma still reads|a copy is still writing|race: |y: \d+ of"
MBARRIER_WAIT = (
    r"use-after-poison|still writing|nobody wrote|race: |y: \d+ of|y: \d+ not finite|deadlock"
)
LOCAL_RELEASE = r"race: |still writing|still reads|use-after-poison|y: \d+ of|dx: \d+ of|deadlock"
# A plant, the op whose test meets it, and what the named build has to say about it.
PLANTS = [
    ("MISSING_BARRIER", "race", "linear", r"race|reads bytes that"),
    ("MISSING_WAIT", "race", "linear", r"an asynchronous copy is still writing"),
    ("MISSING_WAIT", "asan", "linear", r"use-after-poison"),
    ("OUT_OF_BOUNDS", "asan", "quantize", r"heap-buffer-overflow"),
    ("OUT_OF_BOUNDS", "race", "quantize", r"out of bounds"),
    # The sums of a run that the last warp reads before they are handed in.
    ("MISSING_SUM_WAIT", "race", "few", r"race|nobody wrote"),
    # The wait between two products: their operands are given back too early, and a later step's
    # fragments overwrite those of a product under way.
    ("MISSING_WGMMA_WAIT", "asan", "hopper", WGMMA_WAIT),
    ("MISSING_WGMMA_WAIT", "race", "hopper", WGMMA_WAIT),
    ("MISSING_WGMMA_WAIT", "asan", "dense", WGMMA_WAIT),
    # Who does not wait for a copy finds it under way, or not even started.
    ("MISSING_MBARRIER_WAIT", "asan", "hopper", MBARRIER_WAIT),
    ("MISSING_MBARRIER_WAIT", "race", "hopper", MBARRIER_WAIT),
    ("MISSING_MBARRIER_WAIT", "asan", "dense", MBARRIER_WAIT),
    ("WRONG_PHASE", "asan", "hopper", MBARRIER_WAIT),
    ("WRONG_PHASE", "race", "hopper", MBARRIER_WAIT),
    ("WRONG_PHASE", "race", "dense", MBARRIER_WAIT),
    # dx: W read as if the reduction ran along its rows, and the same waits.
    # It reads past its stage: into the next one, perhaps while a copy writes there, or past all.
    (
        "WRONG_TRANSPOSE",
        "asan",
        "dx values",
        r"out of bounds of a shared array|a copy is still writing|dx: \d+ of",
    ),
    ("MISSING_WGMMA_WAIT", "asan", "dx", WGMMA_WAIT),
    ("MISSING_MBARRIER_WAIT", "race", "dx", MBARRIER_WAIT),
    # A stage given back to the own CTA alone, while the other one of the cluster copies to it.
    # The other one then waits for ever, or finds what is left of an earlier phase.
    ("LOCAL_RELEASE", "race", "hopper", LOCAL_RELEASE),
    ("LOCAL_RELEASE", "asan", "dx", LOCAL_RELEASE),
    # Shared memory written again while TMA stores from it.
    ("MISSING_STORE_WAIT", "race", "boxes", r"race: "),
    # Who reads s without waiting for the CTAs that compute it.
    ("MISSING_TASK_WAIT", "race", "lora", r"global memory: race"),
    # The barrier between landing and reading in the pass over grad_y and x.
    ("MISSING_PASS_BARRIER", "race", "pass", r"race|reads bytes that"),
    ("MISSING_PASS_WAIT", "asan", "pass", r"use-after-poison"),
    ("MISSING_PASS_WAIT", "race", "pass", r"an asynchronous copy is still writing"),
]
# The test that meets a plant: its file and how to select it.
PLANTED_TESTS = {
    "quantize": ("quantize", "cuda"),
    "linear": ("linear", "test_two_runs_are_equal and cuda and bfloat16 and 1088"),
    "few": ("cuda_tiles", "3x33x4608 and bfloat16"),
    "hopper": ("cuda_tiles", "140x33x640 and bfloat16"),
    "boxes": ("cuda_tiles", "270x392x128 and bfloat16"),
    "dense": ("cuda_tiles", "90x150x520 and bfloat16"),
    "dx values": ("cuda_tiles", "70x200x328 and bfloat16"),
    "dx": ("cuda_tiles", "dx_of_a_shared_tile"),
    "lora": ("cuda_tiles", "test_cuda_linear_lora and 3x136x320"),
    "pass": ("cuda_tiles", "test_cuda_linear_lora and 40x264x192"),
}


@needs_emulation
@pytest.mark.check
@pytest.mark.parametrize("plant, mode, test, report", PLANTS, ids=str)
def test_planted_defects_are_caught(plant: str, mode: str, test: str, report: str) -> None:
    name, select = PLANTED_TESTS[test]
    library = build.build(mode, plant)
    result = run_pytest(mode, library, "-k", select, str(HERE / f"test_{name}.py"))
    assert result.returncode != 0, f"NF4_PLANT_{plant} went unnoticed"
    assert re.search(report, result.stdout + result.stderr), (result.stdout + result.stderr)[-4000:]
