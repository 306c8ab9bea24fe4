"""The search for Triton configurations, and the command `nf4 tune` that runs it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from nf4.backends import tuning, tuning_table
from nf4.backends.tuning import Shape
from nf4.backends.tuning_table import Entry, MatmulConfig

pytest.importorskip("triton")
pytestmark = pytest.mark.usefixtures("tuning_file")
ROOT = Path(__file__).resolve().parent.parent
GPU = "Some GPU"
interpreted = pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") != "1", reason="needs TRITON_INTERPRET=1"
)


@interpreted
@pytest.mark.parametrize("op", tuning_table.OPS)
def test_search_finds_the_fastest(op: str) -> None:
    """Real launches in the interpreter under a clock that likes one configuration best."""
    from nf4.backends import tune

    problem = tune.Problem(op, 5, 32, 128, torch.bfloat16, dropout=op == "dense_backward")
    device = torch.device("cpu")
    start = tune.builtin_config(problem, device)
    assert start is not None
    goal = replace(start, block_n=start.block_n // 2, num_stages=start.num_stages + 2)
    packed = op in ("linear", "linear_backward")
    if packed:
        goal = replace(goal, split=2 * start.split)
    timed = []

    def clock(calls: Sequence[Callable[[], torch.Tensor]]) -> float:
        """More seconds for each size that is off, by how far: what the search descends."""
        assert len(calls) == 1
        current = planned()
        timed.append(current)
        if current is None:
            return 100.0
        return 1.0 + sum(
            abs(getattr(current, f) - getattr(goal, f)) for f in goal.__dataclass_fields__
        )

    def planned() -> MatmulConfig | None:
        table = tuning_table._in_use
        assert table is not None
        found, config = table.find(problem.key, problem.m)
        assert found
        return config

    result = tune.search(problem, device, clock, rotated_bytes=0)
    assert result.config == goal
    assert result.seconds == 1.0 < result.builtin_seconds
    assert result.tried == len(timed) == len(set(timed))  # none twice
    assert not result.dropped
    assert (None in timed) == packed  # the workspace is a candidate where there is one
    assert result.entry == Entry(problem.key, 5, goal)


@interpreted
def test_search_drops_what_is_wrong_or_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    """The fastest candidates are no use if their result differs or they do not compile."""
    from triton.runtime.errors import OutOfResources

    from nf4.backends import triton_matmul, tune

    problem = tune.Problem("linear", 5, 32, 128, torch.float32)
    builtin = tune.builtin_config(problem, torch.device("cpu"))
    assert builtin is not None
    fused = triton_matmul.fused_linear

    def broken(x: Any, w: Any, config: MatmulConfig, *rest: Any) -> torch.Tensor:
        if config.block_n < builtin.block_n:
            return fused(x, w, config, *rest) * 1.001
        if config.num_warps > builtin.num_warps:
            raise OutOfResources(300_000, 232_448, "shared memory")
        if config.num_stages > builtin.num_stages:
            raise RuntimeError("PassManager::run failed")
        return fused(x, w, config, *rest)

    monkeypatch.setattr("nf4.backends.triton_linear.fused_linear", broken)
    calls = 0

    def clock(_: Sequence[Callable[[], torch.Tensor]]) -> float:
        nonlocal calls
        calls += 1
        return 1.0 if calls == 1 else 2.0

    result = tune.search(problem, torch.device("cpu"), clock, rotated_bytes=0)
    assert result.config == builtin and result.seconds == 1.0
    reasons = "\n".join(result.dropped)
    for reason in ("the result differs by 1.0e-03", "shared memory", "PassManager"):
        assert reason in reasons
    assert result.tried == calls

    def dead(*_: Any) -> torch.Tensor:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr("nf4.backends.triton_linear.fused_linear", dead)
    with pytest.raises(RuntimeError, match="illegal memory access"):
        tune.search(problem, torch.device("cpu"), clock, rotated_bytes=0)


@interpreted
def test_command(
    tuning_file: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """From the words of the command to launches that the written table plans."""
    from nf4.backends import tune
    from nf4.backends.triton_launch import target_of
    from nf4.cli import tune as command

    device = torch.device("cpu")
    monkeypatch.setattr(command, "DEVICE", device)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: GPU)
    monkeypatch.setattr(tune, "_ROTATED_BYTES", 0)
    seconds = iter(1.0 / i for i in range(1, 10_000))  # the last one timed always wins
    monkeypatch.setattr(tune, "gpu_clock", lambda calls: next(seconds))
    monkeypatch.setattr(tune, "_FIELDS", ("num_stages",))
    words = ["--shapes", "32x64", "16x64", "--tokens", "3", "--json"]
    assert command.main(words) == 0
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert len(rows) == 4  # two shapes, forward and backward
    assert all(row["ms"] < row["builtin_ms"] for row in rows)
    entries = tuning_table.read(tuning_file)[GPU].entries
    assert len(entries) == 4
    target = replace(target_of(device), name=GPU)
    for entry in entries:
        ask = tuning.linear if entry.key.op == "linear" else tuning.linear_backward
        shape = Shape(entry.m, entry.key.n, entry.key.k, 64, True, 2)
        assert ask(shape, target) == entry.config != ask(shape, replace(target, name=""))

    assert command.main(["--shapes", "16x64", "--tokens", "1"]) == 0
    shown = capsys.readouterr().out
    # The forward of a single row has a kernel with one configuration.
    assert "16x64 M=1" in shown and f"{tuning_file}: 1 entries for {GPU}" in shown


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is here: the command would run")
def test_command_without_a_gpu(tmp_path: Path) -> None:
    """One clear line and a failure, before anything is loaded or written."""
    output = tmp_path / "table.json"
    done = subprocess.run(
        [sys.executable, "-m", "nf4.cli", "tune", "--shapes", "64x64", "--output", str(output)],
        cwd=ROOT,
        env={k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 1
    (line,) = done.stderr.splitlines()
    assert line.startswith("nf4 tune: needs a GPU that Triton runs on: no CUDA device is available")
    assert not done.stdout and not output.exists()


def test_shapes(tmp_path: Path) -> None:
    """Of words, and of a model's layers but for its head."""
    pytest.importorskip("transformers")
    import argparse

    from nf4.cli import tune as command

    assert command.shape("14336x4096") == (14336, 4096)
    for wrong in ("", "4096", "4096x", "x4096", "0x4096", "-1x4", "axb", "1x2x3"):
        with pytest.raises(argparse.ArgumentTypeError, match="a shape is NxK"):
            command.shape(wrong)
    config = {
        "model_type": "llama",
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": 160,
    }
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert set(command.layer_shapes(str(tmp_path))) == {(64, 64), (32, 64), (96, 64), (64, 96)}
