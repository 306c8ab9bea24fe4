"""A user's own table of matmul configurations, which ``nf4 tune`` measures and writes.

``tuning`` asks it before its built-in rules. The file is read at the first launch on a device:
``$NF4_TUNING_TABLE`` if set (empty: no table), else ``nf4/tuning.json`` under ``$XDG_CACHE_HOME``
or ``~/.cache``. It holds one section a GPU; a section that was measured with other kernels than
the installed ones is passed over with a warning. Anything else that is wrong is an error that
names the file, because a table that silently does not apply is worse than none.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import tempfile
import warnings
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, fields
from functools import lru_cache
from pathlib import Path
from typing import Any

FORMAT = 1
VARIABLE = "NF4_TUNING_TABLE"
OPS = ("linear", "linear_backward", "dense", "dense_backward")


@dataclass(frozen=True)
class MatmulConfig:
    """Tile sizes of a matmul kernel. ``split`` parts of the reduction go to different programs."""

    block_m: int
    block_n: int
    block_k: int
    num_warps: int
    num_stages: int
    split: int = 1
    permute: bool = False


@dataclass(frozen=True)
class Key:
    """What a configuration is for, but for the row count.

    ``block_size`` is 0 where the weight was unpacked before (``dense``, ``dense_backward``);
    ``dropout`` is whether ``dense_backward`` masks its LoRA term.
    """

    op: str
    n: int  # rows of the weight, also where they are the reduction
    k: int
    itemsize: int  # of the activations
    block_size: int = 0
    dropout: bool = False


@dataclass(frozen=True)
class Entry:
    """The fastest configuration for up to ``m`` rows; None: through a workspace."""

    key: Key
    m: int
    config: MatmulConfig | None


class Table:
    """Entries of one device, by key and then by row count."""

    def __init__(self, entries: Iterable[Entry] = ()) -> None:
        self._by_key: dict[Key, dict[int, MatmulConfig | None]] = {}
        for entry in entries:
            self._by_key.setdefault(entry.key, {})[entry.m] = entry.config

    def find(self, key: Key, m: int) -> tuple[bool, MatmulConfig | None]:
        """(whether there is an entry, its config): that of the fewest rows that are at least m."""
        tuned = self._by_key.get(key)
        if not tuned or max(tuned) < m:
            return False, None
        return True, tuned[min(rows for rows in tuned if rows >= m)]


# Set by ``using``: the table that every device then has.
_in_use: Table | None = None


@contextlib.contextmanager
def using(table: Table) -> Iterator[None]:
    """Plan with ``table`` instead of the file; ``Table()`` for the built-in rules alone."""
    global _in_use
    previous, _in_use = _in_use, table
    try:
        yield
    finally:
        _in_use = previous


def find(device_name: str, key: Key, m: int) -> tuple[bool, MatmulConfig | None]:
    """(whether the user's table covers ``m`` rows on the device, the config or None)."""
    if _in_use is not None:
        return _in_use.find(key, m)
    if not device_name:
        return False, None
    return _device_table(device_name).find(key, m)


def path() -> Path | None:
    """The file that is read; None where the variable is set and empty."""
    named = os.environ.get(VARIABLE)
    if named is not None:
        return Path(named) if named else None
    cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(cache) / "nf4" / "tuning.json"


def reload() -> None:
    """Forget what was read."""
    _device_table.cache_clear()


@lru_cache
def kernels_hash() -> str:
    """16 hex digits that change with any kernel's source."""
    digest = hashlib.sha256()
    for file in sorted((Path(__file__).parent.parent / "kernels").glob("*.py")):
        digest.update(file.read_bytes())
    return digest.hexdigest()[:16]


@lru_cache
def _device_table(device_name: str) -> Table:
    file = path()
    if file is None or not (file.exists() or os.environ.get(VARIABLE)):
        return Table()
    section = read(file).get(device_name)
    if section is None:
        return Table()
    if section.kernels != kernels_hash():
        warnings.warn(
            f"nf4: the tuning table {file} for {device_name} was measured with other kernels and "
            "is not used; run `nf4 tune` again, or remove it",
            stacklevel=2,
        )
        return Table()
    return Table(section.entries)


@dataclass(frozen=True)
class Section:
    """One device's part of the file."""

    kernels: str  # the hash of the kernels that were timed
    entries: tuple[Entry, ...]


def status(device_name: str) -> str:
    """One line for people: which table a device uses, and if none, why."""
    file = path()
    if file is None:
        return f"none ({VARIABLE} is empty)"
    if not (file.exists() or os.environ.get(VARIABLE)):
        return "none (nf4 tune writes one)"
    try:
        section = read(file).get(device_name)
    except (OSError, ValueError) as error:
        return str(error)
    if section is None:
        return f"{file}: nothing for {device_name}"
    if section.kernels != kernels_hash():
        return f"{file}: measured with other kernels, not used"
    return f"{file}: {len(section.entries)} entries"


def read(file: Path) -> dict[str, Section]:
    """The sections of a file by device name.

    Raises FileNotFoundError, or ValueError naming the file and the rule that it breaks.
    """
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise FileNotFoundError(f"nf4.tuning: {file} does not exist") from None
    except ValueError as error:
        raise ValueError(f"nf4.tuning: {file} must be JSON: {error}") from None
    check = _Checker(file)
    root = check.keys(content, "the file", {"format": int, "devices": dict})
    check.rule(root["format"] == FORMAT, f"format must be {FORMAT}", root["format"])
    sections = {}
    for name, value in root["devices"].items():
        section = check.keys(value, f"device {name!r}", {"kernels": str, "entries": list})
        entries = tuple(
            _entry(check, entry, f"entry {i} of {name!r}")
            for i, entry in enumerate(section["entries"])
        )
        sections[name] = Section(section["kernels"], entries)
    return sections


def write(file: Path, device_name: str, entries: Iterable[Entry]) -> None:
    """Add entries of the installed kernels to a file, whole or not at all.

    Entries of other keys and row counts, and of other devices, stay; those of other kernels go.
    """
    sections = read(file) if file.exists() else {}
    merged: dict[tuple[Key, int], Entry] = {}
    before = sections.get(device_name)
    if before is not None and before.kernels == kernels_hash():
        merged = {(e.key, e.m): e for e in before.entries}
    merged |= {(e.key, e.m): e for e in entries}
    sections[device_name] = Section(kernels_hash(), tuple(merged.values()))
    content = {
        "format": FORMAT,
        "devices": {
            name: {"kernels": s.kernels, "entries": [row(e) for e in s.entries]}
            for name, s in sections.items()
        },
    }
    file.parent.mkdir(parents=True, exist_ok=True)
    descriptor, temporary = tempfile.mkstemp(dir=file.parent, prefix=f".{file.name}.")
    try:
        with os.fdopen(descriptor, "w", encoding="utf-8") as out:
            json.dump(content, out, indent=1)
            out.write("\n")
        os.replace(temporary, file)
    except BaseException:
        os.unlink(temporary)
        raise


def row(entry: Entry) -> dict[str, Any]:
    """An entry as the file holds it."""
    config = None if entry.config is None else asdict(entry.config)
    return {**asdict(entry.key), "m": entry.m, "config": config}


@dataclass(frozen=True)
class _Checker:
    """Raises ValueError with the name of the file."""

    file: Path

    def rule(self, holds: bool, rule: str, got: object) -> None:
        if not holds:
            raise ValueError(f"nf4.tuning: {self.file}: {rule}, got {got!r}")

    def keys(self, value: Any, what: str, kinds: dict[str, Any]) -> dict[str, Any]:
        """A JSON object with exactly these keys, each of its type."""
        self.rule(isinstance(value, dict), f"{what} must be an object", value)
        expected = ", ".join(kinds)
        self.rule(set(value) == set(kinds), f"{what} must have the keys {expected}", list(value))
        for name, kind in kinds.items():
            # Not isinstance: in Python, and not in this file, True is an int.
            right = type(value[name]) in (kind if isinstance(kind, tuple) else (kind,))
            expected = getattr(kind, "__name__", "an object or null")
            self.rule(right, f"{what}: {name} must be {expected}", value[name])
        return value


_TYPES: dict[str, Any] = {"int": int, "bool": bool, "str": str}


def _kinds(of: type) -> dict[str, Any]:
    return {f.name: _TYPES[str(f.type)] for f in fields(of)}


def _entry(check: _Checker, value: Any, what: str) -> Entry:
    kinds = {**_kinds(Key), "m": int, "config": (dict, type(None))}
    row = dict(check.keys(value, what, kinds))
    config, m = row.pop("config"), row.pop("m")
    key = Key(**row)
    check.rule(m > 0, f"{what}: m must be positive", m)
    if config is not None:
        config = MatmulConfig(**check.keys(config, f"{what}: config", _kinds(MatmulConfig)))
    broken = broken_rule(key, config)
    if broken:
        check.rule(False, f"{what}: {broken[0]}", broken[1])
    return Entry(key, m, config)


# Bounds of the sizes, which are powers of two: what a matrix instruction takes at least, and what
# a program's registers hold at most.
_BOUNDS = {
    "block_m": (8, 256),
    "block_n": (16, 256),
    "block_k": (16, 256),
    "num_warps": (1, 32),
    "split": (1, 64),
}


def broken_rule(key: Key, config: MatmulConfig | None) -> tuple[str, object] | None:
    """(rule, value) of the first rule that a configuration breaks, or None."""
    packed = key.op in ("linear", "linear_backward")
    rules: list[tuple[str, object, bool]] = [
        (f"op must be one of {', '.join(OPS)}", key.op, key.op in OPS),
        ("n and k must be positive", (key.n, key.k), key.n > 0 and key.k > 0),
        ("itemsize must be 2 or 4", key.itemsize, key.itemsize in (2, 4)),
        (f"block_size of {key.op} must be {'positive' if packed else '0'}", key.block_size,
         (key.block_size > 0) == packed),
        ("only dense_backward takes dropout", key.dropout,
         not key.dropout or key.op == "dense_backward"),
        (f"{key.op} must have a config", None, packed or config is not None),
    ]  # fmt: skip
    if config is not None:
        for name, (low, high) in _BOUNDS.items():
            size = getattr(config, name)
            power = low <= size <= high and size & (size - 1) == 0
            rules.append((f"{name} must be a power of two in {low}..{high}", size, power))
        stages = config.num_stages
        rules += [
            ("num_stages must be in 1..8", stages, 1 <= stages <= 8),
            ("block_k must divide block_size", config.block_k,
             not packed or key.block_size % config.block_k == 0),
            # Its kernel adds up the whole reduction.
            (f"split of {key.op} must be 1", config.split, packed or config.split == 1),
            ("only linear takes permute", config.permute,
             not config.permute or key.op == "linear"),
        ]  # fmt: skip
    return next(((rule, got) for rule, got, holds in rules if not holds), None)
