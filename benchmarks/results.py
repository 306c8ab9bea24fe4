"""One CSV row per contender and case, with everything needed to repeat or doubt it."""

from __future__ import annotations

import csv
import datetime
import importlib.metadata
import os
import platform
import re
import subprocess
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent


@dataclass(frozen=True)
class Environment:
    """What every row of one run shares."""

    date: str
    commit: str
    dirty: bool
    nf4: str
    torch: str
    triton: str
    bitsandbytes: str
    peft: str
    torchao: str
    python: str
    system: str
    hardware: str
    driver: str
    isa: str
    threads: int


@dataclass(frozen=True)
class Measurement:
    """One contender on one case. Times are milliseconds of one call; rates are decimal.

    ``gbps`` counts the fewest bytes the op must move and ``gflops`` the operations it must do, the
    same for every contender. ``limit_ms`` is what this machine needs for that, measured in the same
    rounds, and ``share`` is ``limit_ms / ms_p50``. ``error`` is against float64 (relative Frobenius
    norm) or, for exact ops, the share of bytes that differ from the reference.
    """

    op: str
    contender: str
    n: int
    k: int
    m: int
    rank: int
    dtype: str
    ms_p20: float
    ms_p50: float
    ms_p80: float
    gbps: float
    gflops: float
    limit: str
    limit_ms: float
    share: float
    error: float | None
    samples: int
    rounds: int
    method: str
    foreign_cores: float | None
    noisy: bool

    @property
    def shape(self) -> str:
        """``NxK``, as the weight is stored."""
        return f"{self.n}x{self.k}"


COLUMNS = tuple(f.name for f in (*fields(Environment), *fields(Measurement)))


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return ""


def _git(*args: str) -> str:
    done = subprocess.run(["git", *args], cwd=ROOT, capture_output=True, text=True)
    return done.stdout.strip() if done.returncode == 0 else ""


def cpu_name() -> str:
    """The CPU as it names itself, with family and model where the name is not unique."""
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return platform.processor() or platform.machine()
    found = dict(re.findall(r"^([\w ]+?)\s*:\s*(.*)$", text, flags=re.MULTILINE))
    name = found.get("model name", platform.machine())
    if "cpu family" in found and not re.search(r"\d{3}", name):
        name += f" (family {found['cpu family']}, model {found.get('model', '?')})"
    return f"{name}, {os.cpu_count()} CPUs"


def _driver() -> str:
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True)
    except OSError:
        return ""
    return done.stdout.strip().splitlines()[0] if done.returncode == 0 and done.stdout else ""


def environment(device: torch.device, isa: str, threads: int) -> Environment:
    """Describe this machine and this checkout."""
    import nf4

    cuda = device.type == "cuda"
    # Results of an earlier chunk of the same sweep do not make the sources dirty.
    changes = _git("status", "--porcelain", "--", ":!benchmarks/results")
    return Environment(
        date=datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d %H:%M"),
        commit=_git("rev-parse", "--short=12", "HEAD") or "unknown",
        dirty=bool(changes),
        nf4=nf4.__version__,
        torch=torch.__version__,
        triton=_version("triton"),
        bitsandbytes=_version("bitsandbytes"),
        peft=_version("peft"),
        torchao=_version("torchao"),
        python=platform.python_version(),
        system=f"{platform.system()} {platform.machine()}",
        hardware=torch.cuda.get_device_name(device) if cuda else cpu_name(),
        driver=_driver() if cuda else "",
        isa=isa,
        threads=threads,
    )


@dataclass(frozen=True)
class Row:
    """One line of a results file."""

    environment: Environment
    measurement: Measurement


def _format(value: object) -> str:
    if value is None:
        return ""
    if isinstance(value, bool):
        return str(int(value))
    return f"{value:.5g}" if isinstance(value, float) else str(value)


def append(path: Path, rows: Iterable[Row]) -> None:
    """Add rows to a CSV file, with a header where the file is new."""
    path.parent.mkdir(parents=True, exist_ok=True)
    new = not path.exists()
    with path.open("a", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        if new:
            writer.writerow(COLUMNS)
        for row in rows:
            values = asdict(row.environment) | asdict(row.measurement)
            writer.writerow([_format(values[name]) for name in COLUMNS])


def _parse(kind: str, text: str) -> object:
    if kind == "int":
        return int(text)
    if kind == "bool":
        return text == "1"
    if kind.startswith("float"):
        return float(text) if text else None
    return text


def read(paths: Sequence[Path]) -> list[Row]:
    """Read results files; of two rows about the same thing the later line counts.

    Raises ValueError where a file has other columns than these.
    """
    latest: dict[tuple[object, ...], Row] = {}
    for path in paths:
        with path.open(newline="") as file:
            reader = csv.DictReader(file)
            if tuple(reader.fieldnames or ()) != COLUMNS:
                raise ValueError(f"benchmarks: {path.name} must have the columns of results.py")
            for line in reader:
                env = Environment(**_typed(Environment, line))
                measured = Measurement(**_typed(Measurement, line))
                m = measured
                key = (env.hardware, env.isa, env.threads, m.op, m.contender, m.n, m.k, m.m)
                latest[(*key, m.rank, m.dtype)] = Row(env, measured)
    return list(latest.values())


def rewrite(path: Path) -> None:
    """Keep only the rows that count (see ``read``), in a file that is never half written."""
    rows = read([path])
    partial = path.with_name(path.name + ".partial")
    partial.unlink(missing_ok=True)
    append(partial, rows)
    partial.replace(path)


def _typed(kind: type, line: dict[str, str]) -> dict:
    return {f.name: _parse(str(f.type), line[f.name]) for f in fields(kind)}
