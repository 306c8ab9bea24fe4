"""`nf4 demo` through a real process that is killed once."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

for package in ("transformers", "rich", "matplotlib"):
    pytest.importorskip(package)

ROOT = Path(__file__).resolve().parent.parent


def test_a_killed_demo_resumes_and_finishes(tmp_path: Path) -> None:
    output = tmp_path / "demo"
    steps = ("--pretrain-steps", "8", "--finetune-steps", "8")
    command = [sys.executable, "-m", "nf4.cli", "demo", "--output", str(output), *steps]
    process = subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    limit = time.monotonic() + 200
    while not list(output.glob("pretrain/checkpoint-*/trainer_state.json")):
        assert time.monotonic() < limit and process.poll() is None
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (output / "base").exists()

    environment = {**os.environ, "COLUMNS": "120"}
    done = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=280, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert "Resuming from" in done.stdout and "一年有几个月" in done.stdout
    results = json.loads((output / "results.json").read_text())
    assert results["linear bytes NF4"] < 0.26 * results["linear bytes 16-bit"]
    after = results["pairs loss after (NF4 + adapter, reloaded)"]
    assert after < results["pairs loss before"]
    assert abs(results["pairs loss merged into 16 bits"] - after) < 0.05
    assert len(results["answers"]) == 10
    assert (output / "loss.png").read_bytes()[1:4] == b"PNG"

    again = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert "is there already" in again.stdout and "Resuming" not in again.stdout
