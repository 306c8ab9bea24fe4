"""Every Triton kernel compiled ahead of time for every architecture, and its resources.

The table that these tests read is printed by ``python -m benchmarks.triton_static``.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from types import ModuleType

import pytest

pytest.importorskip("triton")

ARCHS = (75, 80, 86, 89, 90, 100, 120)

pytestmark = pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") == "1",
    reason="compiling Triton kernels needs a process without TRITON_INTERPRET=1",
)


@pytest.fixture(scope="module")
def static() -> ModuleType:
    from benchmarks import triton_static

    return triton_static


@pytest.fixture(scope="module")
def compiled(static: ModuleType) -> Iterator[dict]:
    """(row, problems) of one configuration a kernel, by architecture."""
    table: dict[int, list] = {arch: [] for arch in ARCHS}
    for row, problems in static.rows():
        print(static.table_line(row))
        table[row.arch].append((row, problems))
    yield table


@pytest.mark.timeout(600)
@pytest.mark.parametrize("arch", ARCHS)
def test_one_configuration(arch: int, compiled: dict, static: ModuleType) -> None:
    """No spill, a matrix instruction where one is meant, and no worse than the committed table."""
    before = static.read_results()
    found = []
    for row, problems in compiled[arch]:
        known = before[row.case, row.kernel, arch]
        found += [f"{row.kernel}: {p}" for p in problems + static.regressions(row, known)]
    assert not found, "\n".join(found)


def test_every_kernel_is_compiled(compiled: dict) -> None:
    """A kernel that no case reaches would pass by absence."""
    from pathlib import Path

    kernels = Path(__file__).parent.parent / "kernels"
    names = {
        line.removeprefix("def ").split("(")[0]
        for path in kernels.glob("*.py")
        for line in path.read_text().splitlines()
        if line.startswith("def ")
        and line.split("(")[0].endswith("_kernel")
        # The optimizer step has a gate of its own.
        and path.stem != "optimizer"
    }
    for arch in ARCHS:
        assert {row.kernel for row, _ in compiled[arch]} == names


@pytest.mark.check
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("arch", ARCHS)
def test_every_configuration(arch: int, static: ModuleType) -> None:
    """Every dtype, row count, block size and format that changes what is compiled."""
    found = [
        f"{row.kernel} {row.case} {row.config}: {p}"
        for row, problems in static.rows(everything=True, archs=[arch])
        for p in problems
    ]
    assert not found, "\n".join(found)
