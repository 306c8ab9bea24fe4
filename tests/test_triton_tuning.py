"""A user's tuning table, and the search that writes it."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from nf4.backends import tuning, tuning_table
from nf4.backends.tuning import Shape, Target
from nf4.backends.tuning_table import Entry, Key, MatmulConfig, Table

pytest.importorskip("triton")
ROOT = Path(__file__).resolve().parent.parent
GPU = "Some GPU"
TARGET = Target(90, 132, GPU)
CONFIG = MatmulConfig(32, 64, 32, 4, 3, split=2)
interpreted = pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") != "1", reason="needs TRITON_INTERPRET=1"
)


@pytest.fixture(autouse=True)
def file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The table that the environment names; not there yet."""
    path = tmp_path / "folder" / "table.json"
    monkeypatch.setenv(tuning_table.VARIABLE, str(path))
    tuning_table.reload()
    yield path
    tuning_table.reload()


def linear_key(n: int = 640, k: int = 1280) -> Key:
    return Key("linear", n, k, 2, 64)


def plan(m: int, target: Target = TARGET) -> MatmulConfig | None:
    return tuning.linear(Shape(m, 640, 1280, 64, True, 2), target)


def builtin(m: int) -> MatmulConfig | None:
    return plan(m, replace(TARGET, name=""))


def random_entries(count: int) -> list[Entry]:
    entries = {}
    for _ in range(count):
        op = random.choice(tuning_table.OPS)
        packed = op in ("linear", "linear_backward")
        n, k = random.randrange(1, 10**6), random.randrange(1, 10**6)
        dropout = op == "dense_backward" and random.random() < 0.5
        key = Key(op, n, k, random.choice((2, 4)), 4096 if packed else 0, dropout)
        config = MatmulConfig(
            2 ** random.randrange(3, 9),
            2 ** random.randrange(4, 9),
            2 ** random.randrange(4, 9),
            2 ** random.randrange(6),
            random.randrange(1, 9),
            2 ** random.randrange(7) if packed else 1,
            op == "linear" and random.random() < 0.5,
        )
        entry = Entry(key, random.randrange(1, 10**5), config)
        if packed and random.random() < 0.2:
            entry = replace(entry, config=None)
        entries[entry.key, entry.m] = entry
    return list(entries.values())


def test_round_trip(file: Path) -> None:
    """What is written is read; later writes add, replace, and leave other devices alone."""
    first, second = random_entries(20), random_entries(20)
    tuning_table.write(file, GPU, first)
    tuning_table.write(file, "Another", second)
    changed = replace(first[0], config=replace(first[1].config or CONFIG, num_stages=1))
    if tuning_table.broken_rule(changed.key, changed.config):
        changed = first[0]
    tuning_table.write(file, GPU, [changed, *second])

    sections = tuning_table.read(file)
    assert set(sections) == {GPU, "Another"}
    assert set(sections["Another"].entries) == set(second)
    expected = {(e.key, e.m): e for e in [*first, changed, *second]}
    assert {(e.key, e.m): e for e in sections[GPU].entries} == expected
    assert sections[GPU].kernels == tuning_table.kernels_hash()
    assert [p.name for p in file.parent.iterdir()] == [file.name]  # no temporary left


def test_a_failed_write_leaves_the_old_table(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tuning_table.write(file, GPU, [Entry(linear_key(), 8, CONFIG)])
    before = file.read_bytes()

    def fail(*_: Any, **__: Any) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(tuning_table.json, "dump", fail)
    with pytest.raises(OSError, match="disk full"):
        tuning_table.write(file, GPU, [Entry(linear_key(), 16, CONFIG)])
    assert file.read_bytes() == before
    assert [p.name for p in file.parent.iterdir()] == [file.name]


def test_the_table_comes_first(file: Path) -> None:
    """Up to the largest tuned row count, on its device, and for its shape alone."""
    other = replace(CONFIG, block_n=32)
    rows = [(4, CONFIG), (16, other), (64, None)]
    tuning_table.write(file, GPU, [Entry(linear_key(), m, config) for m, config in rows])
    assert [plan(m) for m in (1, 4, 5, 16, 17, 64)] == [CONFIG, CONFIG, other, other, None, None]
    assert plan(65) == builtin(65) is not None
    assert plan(4, replace(TARGET, name="Another")) == builtin(4) != CONFIG
    shape = Shape(4, 640, 1280, 32, True, 2)
    assert tuning.linear(shape, TARGET) == tuning.linear(shape, replace(TARGET, name=""))
    # Never for weights that the packed kernels cannot take.
    assert tuning.linear(Shape(4, 640, 1280, 64, False, 2), TARGET) is None


def test_every_op_asks_the_table(file: Path) -> None:
    entries = [
        Entry(Key("linear_backward", 640, 1280, 2, 64), 4, CONFIG),
        Entry(Key("dense", 640, 1280, 2), 4, replace(CONFIG, split=1)),
        Entry(Key("dense_backward", 640, 1280, 2), 4, replace(CONFIG, split=1, num_warps=8)),
        Entry(Key("dense_backward", 640, 1280, 2, 0, True), 4, replace(CONFIG, split=1, block_m=8)),
    ]
    tuning_table.write(file, GPU, entries)
    assert tuning.linear_backward(Shape(4, 640, 1280, 64, True, 2), TARGET) == entries[0].config
    assert tuning.dense(4, 640, 1280, False, False, 2, TARGET) == entries[1].config
    assert tuning.dense(4, 1280, 640, True, False, 2, TARGET) == entries[2].config
    assert tuning.dense(4, 1280, 640, True, True, 2, TARGET) == entries[3].config


def test_without_a_table(file: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A named file must be there; the default one need not."""
    with pytest.raises(FileNotFoundError, match=str(file)):
        plan(4)
    monkeypatch.setenv(tuning_table.VARIABLE, "")
    assert plan(4) == builtin(4)
    monkeypatch.delenv(tuning_table.VARIABLE)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert tuning_table.path() == tmp_path / "nf4" / "tuning.json"
    tuning_table.reload()
    assert plan(4) == builtin(4)
    tuning_table.write(tmp_path / "nf4" / "tuning.json", GPU, [Entry(linear_key(), 8, CONFIG)])
    tuning_table.reload()
    assert plan(4) == CONFIG


def test_a_stale_table_is_passed_over_visibly(file: Path) -> None:
    tuning_table.write(file, GPU, [Entry(linear_key(), 8, CONFIG)])
    content = json.loads(file.read_text())
    content["devices"][GPU]["kernels"] = "0" * 16
    file.write_text(json.dumps(content))
    with pytest.warns(UserWarning, match=f"{file}.*other kernels.*nf4 tune"):
        assert plan(4) == builtin(4)
    assert "other kernels" in tuning_table.status(GPU)
    tuning_table.write(file, GPU, [Entry(linear_key(), 64, CONFIG)])  # the stale entries go
    assert [e.m for e in tuning_table.read(file)[GPU].entries] == [64]


Change = Callable[[dict[str, Any]], object]


def entry(**values: Any) -> Change:
    """New values in the first entry of a table."""

    def change(content: dict[str, Any]) -> None:
        _update(content["devices"][GPU]["entries"][0], values)

    return change


def config(op: str = "linear", **values: Any) -> Change:
    """New values in the configuration of the first entry."""

    def change(content: dict[str, Any]) -> None:
        row = content["devices"][GPU]["entries"][0]
        row["op"] = op
        _update(row["config"], values)

    return change


def _update(row: dict[str, Any], values: dict[str, Any]) -> None:
    row.update(values)
    for name, value in values.items():
        if value is DROPPED:
            del row[name]


DROPPED = object()
DENSE = {"op": "dense", "block_size": 0}
INVALID: dict[str, tuple[Change, str]] = {
    "format": (lambda c: c.update(format=2), "format must be 1, got 2"),
    "no devices": (lambda c: c.pop("devices"), "must have the keys format, devices"),
    "devices": (lambda c: c.update(devices=[]), "devices must be dict"),
    "more": (lambda c: c.update(more=1), "must have the keys"),
    "device": (lambda c: c["devices"].update(x=3), "device 'x' must be an object, got 3"),
    "section": (lambda c: c["devices"][GPU].pop("kernels"), "must have the keys kernels, entries"),
    "unknown key": (entry(colour=1), "must have the keys op"),
    "missing key": (entry(k=DROPPED), "must have the keys op"),
    "op": (entry(op="conv"), "op must be one of linear,"),
    "n": (entry(n=0), "n and k must be positive"),
    "m": (entry(m=0), "m must be positive, got 0"),
    "m text": (entry(m="8"), "m must be int, got '8'"),
    "m bool": (entry(m=True), "m must be int, got True"),
    "m float": (entry(m=8.0), "m must be int, got 8.0"),
    "itemsize": (entry(itemsize=1), "itemsize must be 2 or 4, got 1"),
    "dropout": (entry(dropout=True), "only dense_backward takes dropout"),
    "block size": (entry(block_size=0), "block_size of linear must be positive"),
    "config": (entry(config=[]), "config must be an object or null"),
    "dense without": (entry(**DENSE, config=None), "dense must have a config"),
    "dense split": (entry(**DENSE), "split of dense must be 1, got 2"),
    "config key": (config(split=DROPPED), "config must have the keys block_m"),
    "tile": (config(block_n=48), "block_n must be a power of two in 16..256, got 48"),
    "block_k": (config(block_k=128), "block_k must divide block_size"),
    "stages": (config(num_stages=9), "num_stages must be in 1..8"),
    "permute": (config(permute=1), "permute must be bool, got 1"),
    "permute op": (config("linear_backward", permute=True), "only linear takes permute"),
}


@pytest.mark.parametrize("name", INVALID)
def test_invalid_tables(name: str, file: Path) -> None:
    """Each is refused with the file, the rule and the value, when a launch is planned."""
    change, rule = INVALID[name]
    tuning_table.write(file, GPU, [Entry(linear_key(), 8, CONFIG)])
    content = json.loads(file.read_text())
    change(content)
    file.write_text(json.dumps(content))
    with pytest.raises(ValueError) as caught:
        plan(4)
    assert str(caught.value).startswith(f"nf4.tuning: {file}: ") and rule in str(caught.value)
    assert tuning_table.status(GPU) == str(caught.value)  # nf4 doctor reports, and does not crash


def test_a_table_that_is_no_json(file: Path) -> None:
    tuning_table.write(file, GPU, [])
    file.write_text(file.read_text()[:-9])
    with pytest.raises(ValueError, match=f"{file} must be JSON"):
        plan(4)


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
    file: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
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
    entries = tuning_table.read(file)[GPU].entries
    assert len(entries) == 4
    target = replace(target_of(device), name=GPU)
    for entry in entries:
        ask = tuning.linear if entry.key.op == "linear" else tuning.linear_backward
        shape = Shape(entry.m, entry.key.n, entry.key.k, 64, True, 2)
        assert ask(shape, target) == entry.config != ask(shape, replace(target, name=""))

    assert command.main(["--shapes", "16x64", "--tokens", "1"]) == 0
    shown = capsys.readouterr().out
    assert "16x64 M=1" in shown and f"{file}: 2 entries for {GPU}" in shown


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


def test_an_empty_table_finds_nothing() -> None:
    assert Table().find(linear_key(), 1) == (False, None)
