"""`nf4 demo` through real processes: killed once, interrupted once, then finished."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from nf4 import cli

for package in ("transformers", "rich", "matplotlib"):
    pytest.importorskip(package)

ROOT = Path(__file__).resolve().parent.parent


def stop(command: list[str], output: Path, stage: str, by: signal.Signals) -> str:
    """Run the demo until ``stage`` has a checkpoint, stop it; what it printed."""
    process = subprocess.Popen(
        command,
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        # A shell's background jobs, and so perhaps these tests, ignore what Ctrl-C sends.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    limit = time.monotonic() + 200
    while not list(output.glob(f"{stage}/checkpoint-*/trainer_state.json")):
        assert time.monotonic() < limit and process.poll() is None
        time.sleep(0.05)
    process.send_signal(by)
    printed, _ = process.communicate()
    assert process.returncode == (130 if by is signal.SIGINT else -by)
    return printed


@pytest.mark.timeout(600)  # three runs of it
def test_a_stopped_demo_resumes_and_finishes(tmp_path: Path) -> None:
    output = tmp_path / "demo"
    steps = ("--pretrain-steps", "8", "--finetune-steps", "64")
    command = [sys.executable, "-m", "nf4.cli", "demo", "--output", str(output), *steps]
    stop(command, output, "pretrain", signal.SIGKILL)
    assert not (output / "base").exists()
    printed = stop(command, output, "finetune", signal.SIGINT)
    assert f"Resuming from {output / 'pretrain'}" in printed
    assert not (output / "adapter").exists()

    environment = {**os.environ, "COLUMNS": "120"}
    done = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=280, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert "base is there already" in done.stdout
    assert f"Resuming from {output / 'finetune'}" in done.stdout and "一年有几个月" in done.stdout
    assert "\r" not in done.stdout + done.stderr  # no bars where there is no terminal
    results = json.loads((output / "results.json").read_text())
    linear = results["linear layers"]
    assert linear["NF4 bytes"] < 0.26 * linear["16-bit bytes"]
    stages = results["stages"]
    loss = {name: stage["loss"] for name, stage in stages.items()}
    adapted = loss["NF4 + adapter, reloaded"]
    assert abs(loss["16-bit base"] - loss["NF4 base"]) < 0.2
    assert adapted < loss["NF4 base"] - 1
    assert abs(loss["merged into 16 bits"] - adapted) < 0.05
    assert abs(loss["merged into NF4, from the 16-bit base"] - adapted) < 0.2
    assert stages["NF4 base"]["bytes"] < 0.5 * stages["16-bit base"]["bytes"]
    assert results["fine-tuning tokens/s"] > 0 and results["generation tokens/s"] > 0
    assert len(results["answers"]) == 10
    assert (output / "loss.png").read_bytes()[1:4] == b"PNG"


@pytest.mark.parametrize("package", ["rich", "matplotlib"])
def test_a_missing_package_is_missed_at_once(
    package: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    assert cli.main(["demo", "--output", str(tmp_path / "demo")]) == 1
    assert "pip install 'nf4[cli]'" in capsys.readouterr().err
    assert not (tmp_path / "demo").exists()
