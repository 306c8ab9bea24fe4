"""``nf4 bench``: the benchmark sweep of a source checkout.

Rows go to ``nf4_bench.csv`` (``--csv FILE`` names another), the bars to the PNG beside it.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

# With one of these, the script shows rows that are there already, or measures no time.
_NO_BARS = {"-h", "--help", "--check", "--table", "--plot", "--memory"}


def main(arguments: list[str]) -> int:
    script = Path(__file__).resolve().parents[2] / "benchmarks" / "run.py"
    if not script.exists():
        raise FileNotFoundError(
            "the benchmarks are in the source checkout, not in the installed package; "
            "clone the repository, `pip install -e '.[bench]'` there, and run nf4 bench again"
        )
    command = [sys.executable, str(script)]
    options = {word.partition("=")[0] for word in arguments}
    if options & _NO_BARS:
        return subprocess.run([*command, *arguments], check=False).returncode
    if "--csv" not in options:
        arguments = [*arguments, "--csv", "nf4_bench.csv"]
    status = subprocess.run([*command, *arguments], check=False).returncode
    where = next(i for i, word in enumerate(arguments) if word.partition("=")[0] == "--csv")
    csv = arguments[where].partition("=")[2] or arguments[where + 1]
    if Path(csv).exists():
        print(f"rows: {csv}; bars: ", end="", flush=True)
        subprocess.run([*command, "--plot", csv], check=True)
    return status
