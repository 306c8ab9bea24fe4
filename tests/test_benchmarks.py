"""The benchmark command runs, its rows are complete, a wrong op is refused, reports are stable."""

from __future__ import annotations

import csv
import dataclasses
import importlib
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
RUN = ROOT / "benchmarks" / "run.py"
# What the README's table is made of, in its order.
RESULTS = [
    path
    for kind in ("gpu", "cpu")
    for path in sorted((ROOT / "benchmarks" / "results").glob(f"{kind}_*.csv"))
    if not path.stem.endswith("end_to_end")
]

pytestmark = pytest.mark.skipif(not RUN.exists(), reason="benchmarks/ is not in this checkout")
needs_compiler = pytest.mark.skipif(
    shutil.which("g++") is None, reason="the CPU limits need a C++ compiler"
)


@pytest.fixture
def benchmarks(monkeypatch: pytest.MonkeyPatch):
    """Imports ``benchmarks.<name>`` from this checkout."""
    monkeypatch.syspath_prepend(str(ROOT))
    return lambda name: importlib.import_module(f"benchmarks.{name}")


def _run(*args: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(RUN), *args]
    return subprocess.run(command, capture_output=True, text=True, timeout=300)


@needs_compiler
def test_quick_sweep_writes_complete_rows(tmp_path: Path, benchmarks) -> None:
    path = tmp_path / "rows.csv"
    # One thread, no peers: fast and steady on a loaded machine; the shape is ragged on purpose.
    options = ["--quick", "--no-peers", "--device", "cpu", "--threads", "1", "--csv", str(path)]
    for op in ("quantize", "dequantize", "linear", "linear_lora", "overhead"):
        options += ["--op", op]
    done = _run(*options, "--shape", "96x200", "--m", "3")
    assert done.returncode == 0, done.stdout + done.stderr
    with path.open() as file:
        rows = list(csv.DictReader(file))
    seen = {(row["op"], row["contender"]) for row in rows}
    assert {(op, "nf4") for op in ("quantize", "dequantize", "linear", "linear_lora")} <= seen
    assert {("linear", "limit:read"), ("linear", "torch_dense"), ("overhead", "nf4")} <= seen
    for row in rows:
        for column in ("date", "commit", "torch", "python", "hardware", "isa", "threads"):
            assert row[column], (column, row)
        assert 0 < float(row["ms_p20"]) <= float(row["ms_p50"]) <= float(row["ms_p80"])
        if row["limit"] and row["contender"] == "nf4":
            assert float(row["share"]) > 0 and float(row["limit_ms"]) > 0
    assert len(benchmarks("results").read([path])) == len(rows)


def test_a_later_row_of_the_same_case_counts(tmp_path: Path, benchmarks) -> None:
    results = benchmarks("results")
    path = tmp_path / "rows.csv"
    for milliseconds, noisy in ((2.0, True), (1.0, False)):
        results.append(path, [_row(results, milliseconds, noisy)])
    results.rewrite(path)
    assert path.read_text().count("\n") == 2
    (row,) = results.read([path])
    assert row.measurement.ms_p50 == 1.0 and not row.measurement.noisy
    path.write_text("other,columns\n1,2\n")
    with pytest.raises(ValueError, match=r"must have the columns of results\.py"):
        results.read([path])


def _row(results, milliseconds: float, noisy: bool):
    """A row whose fields hold what their types allow, apart from those named."""
    blank = {"str": "x", "int": 1, "bool": False}
    kinds = (results.Environment, results.Measurement)
    env, measured = (
        kind(**{f.name: blank.get(f.type, 0.5) for f in dataclasses.fields(kind)}) for kind in kinds
    )
    measured = dataclasses.replace(measured, ms_p50=milliseconds, noisy=noisy)
    return results.Row(env, measured)


@needs_compiler
def test_wrong_op_is_refused(monkeypatch: pytest.MonkeyPatch, benchmarks) -> None:
    import torch

    import nf4

    measure, workload = benchmarks("measure"), benchmarks("workload")
    peaks = benchmarks("peaks").CpuPeaks(1)
    bench = workload.Bench(torch.device("cpu"), 1, "portable", peaks, ["default"], (), 0)
    layer = workload.Layer(bench, 64, 128)
    right_linear, right_quantize = nf4.linear, nf4.quantize
    # An error of 1 % in one output column of 64, and one wrong byte.
    monkeypatch.setattr(nf4, "linear", lambda x, q: _scaled(right_linear(x, q)))
    linear = workload.Case("linear", 64, 128, 4, torch.float32)
    outcome = measure.run_case(linear, layer, bench, 1, 0.001)
    assert "exceeds" in outcome.red["nf4"]
    assert not any(m.contender == "nf4" for m in outcome.measurements)
    assert any(m.contender == "torch_dense" for m in outcome.measurements)

    def off_by_one(*args, **options):
        q = right_quantize(*args, **options)
        if nf4.backends.namespace() == "nf4":
            q.packed[7] ^= 1
        return q

    monkeypatch.setattr(nf4, "quantize", off_by_one)
    outcome = measure.run_case(workload.Case("quantize", 64, 128), layer, bench, 1, 0.001)
    assert "differ from the reference" in outcome.red["nf4"]


def _scaled(y):
    y[:, 5] *= 1.01
    return y


def test_statistics(benchmarks) -> None:
    timing = benchmarks("timing")
    samples = timing.Samples((4.0, 1.0, 2.0, 3.0, 5.0), 1, None, False, "wall")
    assert [samples.quantile(q) for q in (0.0, 0.2, 0.5, 0.8, 1.0)] == [1.0, 1.8, 3.0, 4.2, 5.0]
    calls: list[str] = []
    contenders = {name: [lambda n=name: calls.append(n)] for name in ("a", "b")}
    timed = timing.interleave(contenders, rounds=2, budget=1e-4)
    assert set(timed) == {"a", "b"}
    # Both ran in each round: the last call of `a` comes after the first rounds of `b`.
    assert max(i for i, n in enumerate(calls) if n == "a") > calls.index("b")


@pytest.mark.skipif(not RESULTS, reason="no results are committed")
def test_report_is_deterministic_and_the_readme_agrees(benchmarks, tmp_path: Path) -> None:
    report, results = benchmarks("report"), benchmarks("results")
    rows = results.read(RESULTS)
    table = report.markdown(rows)
    assert table == report.markdown(results.read(RESULTS))
    page = tmp_path / "page.md"
    page.write_text(f"before\n{report.BEGIN}\nold\n{report.END}\nafter\n")
    report.write_between_markers(page, table)
    assert report.between_markers(page) == table
    assert page.read_text().startswith("before\n") and page.read_text().endswith("after\n")
    readme = ROOT / "README.md"
    if readme.exists() and report.BEGIN in readme.read_text():
        assert report.between_markers(readme) == table


@pytest.mark.skipif(not RESULTS, reason="no results are committed")
def test_a_cell_of_a_gpu_holds_cuda_before_triton(benchmarks) -> None:
    rows = [r for r in benchmarks("results").read(RESULTS) if r.environment.driver]
    times = {
        r.measurement.contender: r.measurement.ms_p50
        for r in rows
        if (r.measurement.op, r.measurement.shape, r.measurement.m) == ("linear", "14336x4096", 8)
    }
    table = benchmarks("report").markdown(rows)
    row = next(line for line in table.splitlines() if line.startswith("| linear | 14336x4096 | 8 "))
    cells = [cell.strip() for cell in row.split("|")]
    cuda, triton = (float(cell) for cell in cells[5].split(" / "))
    assert cuda == pytest.approx(times["nf4_cuda"], rel=0.01)
    assert triton == pytest.approx(times["nf4_triton"], rel=0.01)
    peer = min(times["bitsandbytes"], times.get("bitsandbytes_eval", times["bitsandbytes"]))
    assert float(cells[7].split("x / ")[0]) == pytest.approx(peer / cuda, rel=0.01)


def test_missing_markers_are_an_error(benchmarks, tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("no markers")
    with pytest.raises(ValueError, match="must hold <!-- bench:begin -->"):
        benchmarks("report").write_between_markers(page, "table")
    assert page.read_text() == "no markers"


@pytest.mark.skipif(not RESULTS, reason="no results are committed")
def test_committed_results_come_from_clean_checkouts(benchmarks) -> None:
    rows = benchmarks("results").read(RESULTS)
    assert not [row for row in rows if row.environment.dirty]


def test_thresholds_of_an_empty_file_are_not_measured(benchmarks) -> None:
    text, passed = benchmarks("thresholds").report([])
    assert passed and " 0 FAIL" in text
