"""The CUDA optimizer kernel on a CPU: its op tests and those of the classes, over the emulation."""

from __future__ import annotations

import re

import pytest
from test_cuda_emulated import HERE, build, needs_emulation, run_pytest

# What the classes do to the op's arguments beyond what test_adamw_step passes by itself.
CLASSES = "maximize or capturable or groups or seed or strided or scaler or nonfinite or resume"


@needs_emulation
@pytest.mark.parametrize("mode", build.MODES)
def test_optimizer_passes_the_shared_tests(mode: str) -> None:
    library = build.build(mode)
    files = [str(HERE / f"test_{name}.py") for name in ("optim", "optim_checkpoint")]
    for chosen in (
        ["-k", "cuda", str(HERE / "test_adamw_step.py")],
        ["-k", f"cuda and ({CLASSES})", *files],
    ):
        result = run_pytest(mode, library, *chosen)
        assert result.returncode == 0, (result.stdout + result.stderr)[-8000:]
        assert re.search(r"\b[1-9]\d* passed", result.stdout), result.stdout[-2000:]


# A defect, and what the named build has to say about it.
PLANTS = [
    ("MISSING_BARRIER", "race", r"race|reads bytes that"),
    ("OUT_OF_BOUNDS", "asan", r"heap-buffer-overflow"),
    ("OUT_OF_BOUNDS", "race", r"out of bounds"),
]


@needs_emulation
@pytest.mark.check
@pytest.mark.parametrize("plant, mode, report", PLANTS, ids=str)
def test_planted_defects_are_caught(plant: str, mode: str, report: str) -> None:
    chosen = ["-k", "test_bits and cuda", str(HERE / "test_adamw_step.py")]
    result = run_pytest(mode, build.build(mode, plant), *chosen)
    assert result.returncode != 0, f"NF4_PLANT_{plant} went unnoticed"
    assert re.search(report, result.stdout + result.stderr), (result.stdout + result.stderr)[-4000:]
