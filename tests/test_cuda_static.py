"""The committed table of what the compiler makes of the CUDA kernels; nothing in it is a time."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks import cuda_static  # noqa: E402

needs_nvcc = pytest.mark.skipif(shutil.which("nvcc") is None, reason="no nvcc on PATH")


def rows(arch: str) -> dict[str, cuda_static.Row]:
    return {r.loop: r for r in cuda_static.read_table() if r.arch == arch}


def test_the_committed_table_keeps_the_limits() -> None:
    table = rows("90a")
    for target in cuda_static.TARGETS:
        row = table[target.name]
        assert row.spill_bytes == 0
        if target.limit is not None:
            assert row.slots <= target.limit, target.name
    # At decode an H200's memory asks for 32 weights a clock of each SM.
    assert table["linear, 8 tokens"].ceiling >= 32
    # wgmma: 2048 products a clock of each SM, so a tile of M tokens takes 2048 / M weights.
    wgmma = [row for name, row in table.items() if "wgmma" in name]
    assert len(wgmma) == 6 and all(row.hgmma > 0 for row in wgmma)
    # setmaxnreg hands 232 registers to 256 threads and 40 to 128. A CTA that starts with fewer than
    # 168 each has not got them all, and waits for ever.
    assert all(row.registers == 168 for row in wgmma)


def test_the_table_puts_memory_beside_the_ceiling() -> None:
    table = rows("90a")
    assert table["linear, 8 tokens"].memory == pytest.approx(31.9)
    # Nothing that memory should bound is bound by issue slots.
    for name in ("dequantize nf4 64 nested bf16", "lora backward, ds and db", "linear, 8 tokens"):
        assert table[name].ceiling >= table[name].memory, name


def test_a_spilling_kernel_is_named() -> None:
    used = {"_Z3fooi": (255, 8, 8), "_Z3bari": (32, 0, 0)}
    assert cuda_static.spilling("90a", used) == ["sm_90a foo(int): 8 bytes"]


@needs_nvcc
@pytest.mark.check
@pytest.mark.parametrize("arch", ["80", "90a", "100", "120"])
def test_no_regression_against_the_table(arch: str) -> None:
    assert cuda_static.regressions(cuda_static.measure([arch], None)) == []
