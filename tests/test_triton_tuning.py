"""A user's tuning table: what is read, written, refused and used."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from nf4.backends import tuning, tuning_table
from nf4.backends.tuning import Shape, Target
from nf4.backends.tuning_table import Entry, Key, MatmulConfig, Table

pytest.importorskip("triton")
pytestmark = pytest.mark.usefixtures("tuning_file")
GPU = "Some GPU"
TARGET = Target(90, 132, GPU)
CONFIG = MatmulConfig(32, 64, 32, 4, 3, split=2)


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


def test_round_trip(tuning_file: Path) -> None:
    """What is written is read; later writes add, replace, and leave other devices alone."""
    first, second = random_entries(20), random_entries(20)
    tuning_table.write(tuning_file, GPU, first)
    tuning_table.write(tuning_file, "Another", second)
    changed = replace(first[0], config=replace(first[1].config or CONFIG, num_stages=1))
    if tuning_table.broken_rule(changed.key, changed.config):
        changed = first[0]
    tuning_table.write(tuning_file, GPU, [changed, *second])

    sections = tuning_table.read(tuning_file)
    assert set(sections) == {GPU, "Another"}
    assert set(sections["Another"].entries) == set(second)
    expected = {(e.key, e.m): e for e in [*first, changed, *second]}
    assert {(e.key, e.m): e for e in sections[GPU].entries} == expected
    assert sections[GPU].kernels == tuning_table.kernels_hash()
    assert [p.name for p in tuning_file.parent.iterdir()] == [tuning_file.name]  # no temporary left


def test_a_failed_write_leaves_the_old_table(
    tuning_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tuning_table.write(tuning_file, GPU, [Entry(linear_key(), 8, CONFIG)])
    before = tuning_file.read_bytes()

    def fail(*_: Any, **__: Any) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(tuning_table.json, "dump", fail)
    with pytest.raises(OSError, match="disk full"):
        tuning_table.write(tuning_file, GPU, [Entry(linear_key(), 16, CONFIG)])
    assert tuning_file.read_bytes() == before
    assert [p.name for p in tuning_file.parent.iterdir()] == [tuning_file.name]


def test_the_table_comes_first(tuning_file: Path) -> None:
    """Up to the largest tuned row count, on its device, and for its shape alone."""
    other = replace(CONFIG, block_n=32)
    rows = [(4, CONFIG), (16, other), (40, None)]
    tuning_table.write(tuning_file, GPU, [Entry(linear_key(), m, config) for m, config in rows])
    assert [plan(m) for m in (1, 4, 5, 16, 17, 40)] == [CONFIG, CONFIG, other, other, None, None]
    assert plan(41) == builtin(41) is not None
    assert plan(4, replace(TARGET, name="Another")) == builtin(4) != CONFIG
    shape = Shape(4, 640, 1280, 32, True, 2)
    assert tuning.linear(shape, TARGET) == tuning.linear(shape, replace(TARGET, name=""))
    # Never for weights that the packed kernels cannot take.
    assert tuning.linear(Shape(4, 640, 1280, 64, False, 2), TARGET) is None


def test_every_op_asks_the_table(tuning_file: Path) -> None:
    entries = [
        Entry(Key("linear_backward", 640, 1280, 2, 64), 4, CONFIG),
        Entry(Key("dense", 640, 1280, 2), 4, replace(CONFIG, split=1)),
        Entry(Key("dense_backward", 640, 1280, 2), 4, replace(CONFIG, split=1, num_warps=8)),
        Entry(Key("dense_backward", 640, 1280, 2, 0, True), 4, replace(CONFIG, split=1, block_m=8)),
    ]
    tuning_table.write(tuning_file, GPU, entries)
    assert tuning.linear_backward(Shape(4, 640, 1280, 64, True, 2), TARGET) == entries[0].config
    assert tuning.dense(4, 640, 1280, False, False, 2, TARGET) == entries[1].config
    assert tuning.dense(4, 1280, 640, True, False, 2, TARGET) == entries[2].config
    assert tuning.dense(4, 1280, 640, True, True, 2, TARGET) == entries[3].config


def test_without_a_table(
    tuning_file: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """A named file must be there; the default one need not."""
    with pytest.raises(FileNotFoundError, match=str(tuning_file)):
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


def test_a_stale_table_is_passed_over_visibly(tuning_file: Path) -> None:
    tuning_table.write(tuning_file, GPU, [Entry(linear_key(), 8, CONFIG)])
    content = json.loads(tuning_file.read_text())
    content["devices"][GPU]["kernels"] = "0" * 16
    tuning_file.write_text(json.dumps(content))
    with pytest.warns(UserWarning, match=f"{tuning_file}.*other kernels.*nf4 tune"):
        assert plan(4) == builtin(4)
    assert "other kernels" in tuning_table.status(GPU)
    tuning_table.write(tuning_file, GPU, [Entry(linear_key(), 64, CONFIG)])  # the stale entries go
    assert [e.m for e in tuning_table.read(tuning_file)[GPU].entries] == [64]


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
def test_invalid_tables(name: str, tuning_file: Path) -> None:
    """Each is refused with the file, the rule and the value, when a launch is planned."""
    change, rule = INVALID[name]
    tuning_table.write(tuning_file, GPU, [Entry(linear_key(), 8, CONFIG)])
    content = json.loads(tuning_file.read_text())
    change(content)
    tuning_file.write_text(json.dumps(content))
    with pytest.raises(ValueError) as caught:
        plan(4)
    assert str(caught.value).startswith(f"nf4.tuning: {tuning_file}: ") and rule in str(
        caught.value
    )
    assert tuning_table.status(GPU) == str(caught.value)  # nf4 doctor reports, and does not crash


def test_a_table_that_is_no_json(tuning_file: Path) -> None:
    tuning_table.write(tuning_file, GPU, [])
    tuning_file.write_text(tuning_file.read_text()[:-9])
    with pytest.raises(ValueError, match=f"{tuning_file} must be JSON"):
        plan(4)


def test_an_empty_table_finds_nothing() -> None:
    assert Table().find(linear_key(), 1) == (False, None)
