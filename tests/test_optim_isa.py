"""The native optimizer step at every instruction set: the shared tests, each in a new process.

``NF4_CPU_ISA`` is read once a process.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys

import pytest
from test_isa import HERE, LEVELS, needs_library

# The kernel's whole arithmetic; what the binding does is the same at every level.
CHOSEN = "cpu and (bits or threshold or rounding or nonfinite or dense)"
RUN = """
import sys, pytest
from nf4.backends import cpu
print("level", cpu.isa())
sys.exit(pytest.main(sys.argv[1:]))
"""


@needs_library
@pytest.mark.check
@pytest.mark.parametrize("level", LEVELS)
def test_steps_are_the_reference_bit_for_bit(level: str) -> None:
    env = os.environ | {
        "NF4_CPU_ISA": level,
        "PYTHONPATH": str(HERE.parent),
        "OMP_NUM_THREADS": "1",
    }
    env.pop("ATEN_CPU_CAPABILITY", None)
    chosen = ["-q", "-p", "no:cacheprovider", "-k", CHOSEN, str(HERE / "test_adamw_step.py")]
    done = subprocess.run(
        [sys.executable, "-c", RUN, *chosen],
        env=env,
        capture_output=True,
        text=True,
        cwd=HERE.parent,
    )
    if f"level {level}\n" not in done.stdout:
        pytest.skip(f"this CPU has no {level}")
    assert done.returncode == 0, (done.stdout + done.stderr)[-4000:]
    assert re.search(r"\b[1-9]\d* passed", done.stdout), done.stdout[-2000:]
