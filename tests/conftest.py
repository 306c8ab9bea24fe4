"""One fixture over every backend, random inputs on every run, and poisoned outputs."""

from __future__ import annotations

import os
import random
import zlib
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

# Deterministic cuBLAS, which torch.use_deterministic_algorithms asks for.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")

import pytest
import torch

import nf4
from nf4.backends import tuning_table
from nf4.ops import BACKENDS

SEED = int(os.environ.get("NF4_TEST_SEED", random.SystemRandom().randrange(2**31)))


def pytest_report_header() -> list[str]:
    status = nf4.available_backends()
    lines = [f"nf4 {nf4.__version__}, torch {torch.__version__}; repeat with NF4_TEST_SEED={SEED}"]
    lines += [f"backend {n}: {'usable' if s else s.reason}" for n, s in status.items()]
    return lines


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """How many tests ran, and how many were skipped for want of what."""
    stats = terminalreporter.stats
    reasons = Counter(r.longrepr[2].removeprefix("Skipped: ") for r in stats.get("skipped", []))
    ran = sum(len(stats.get(outcome, [])) for outcome in ("passed", "failed", "error"))
    terminalreporter.write_line(f"{ran} tests run, {reasons.total()} skipped:")
    for reason, count in reasons.most_common():
        terminalreporter.write_line(f"  {count:5} {reason}")


@pytest.fixture(autouse=True)
def _seed_and_poison(request: pytest.FixtureRequest) -> Iterator[None]:
    """A seed of its own for every test, and NaN in fresh memory, so that a missed store fails."""
    torch.manual_seed(zlib.crc32(f"{SEED}{request.node.nodeid}".encode()))
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(params=BACKENDS)
def backend(request: pytest.FixtureRequest) -> Iterator[str]:
    """The name of each backend in turn; its calls are forced to it."""
    name = request.param
    status = nf4.available_backends()[name]
    if not status:
        pytest.skip(f"backend {name}: {status.reason}")
    with nf4.use_backend(name):
        yield name


@pytest.fixture
def device(backend: str) -> torch.device:
    """A device that the backend runs on, a GPU where there is a choice."""
    from nf4.backends import _BY_NAME

    kinds = ("cuda", "cpu") if torch.cuda.is_available() else ("cpu",)
    module = _BY_NAME[backend]
    return next(torch.device(k) for k in kinds if module.unsupported(torch.device(k)) is None)


@pytest.fixture
def device_of_choice() -> torch.device:
    """For tests of no particular backend: a GPU where there is one."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture
def one_thread() -> Iterator[None]:
    """One thread: on tiny models more of them only wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def tuning_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The tuning table that the environment names; not there yet."""
    path = tmp_path / "folder" / "table.json"
    monkeypatch.setenv(tuning_table.VARIABLE, str(path))
    tuning_table.reload()
    yield path
    tuning_table.reload()
