"""``nf4 bench``: the benchmark sweep of a source checkout."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path


def main(arguments: list[str]) -> int:
    script = Path(__file__).resolve().parents[2] / "benchmarks" / "run.py"
    if not script.exists():
        raise FileNotFoundError(
            "the benchmarks are in the source checkout, not in the installed package; "
            "clone the repository, `pip install -e '.[bench]'` there, and run nf4 bench again"
        )
    return subprocess.run([sys.executable, str(script), *arguments], check=False).returncode
