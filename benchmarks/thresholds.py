"""What the CPU kernels must reach, and whether a file of rows shows it.

Stated for Llama's layer shapes with double quantization and all cores, in one interleaved run.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from benchmarks.report import by_case
from benchmarks.results import Measurement, Row

SHAPES = ("4096x4096", "14336x4096", "4096x14336")
_LEVELS = ("avx512_bf16", "avx512", "avx2", "portable")
Cases = dict[tuple[str, str, int, str], dict[str, Measurement]]


@dataclass(frozen=True)
class Finding:
    """One threshold: ``value`` (None: not measured) against ``least``; ``reach`` is the aim."""

    what: str
    value: float | None
    least: float
    reach: float
    unit: str = "x"
    at_most: bool = False
    noisy: bool = False

    @property
    def verdict(self) -> str:
        if self.value is None:
            return "not measured"
        good = self.value <= self.least if self.at_most else self.value >= self.least
        best = self.value <= self.reach if self.at_most else self.value >= self.reach
        return "reached" if good and best else "pass" if good else "FAIL"

    def line(self) -> str:
        sign = "<=" if self.at_most else ">="
        value = "" if self.value is None else f"{self.value:.2f}{self.unit}"
        noisy = " (noisy)" if self.noisy else ""
        least, reach = f"{sign} {self.least:g}{self.unit}", f"{sign} {self.reach:g}{self.unit}"
        return f"| {self.what} | {value}{noisy} | {least} | {reach} | {self.verdict} |"


def _ratio(
    cases: Cases, what: str, case: tuple[str, str, int, str], peer: str, least: float, reach: float
) -> Finding:
    contenders = cases.get(case, {})
    ours, other = contenders.get("nf4"), contenders.get(peer)
    if ours is None or other is None:
        return Finding(what, None, least, reach)
    return Finding(what, other.ms_p50 / ours.ms_p50, least, reach, noisy=ours.noisy or other.noisy)


def _share(
    cases: Cases, what: str, case: tuple[str, str, int, str], least: float, reach: float
) -> Finding:
    ours = cases.get(case, {}).get("nf4")
    if ours is None or not ours.limit:
        return Finding(what, None, least, reach, "")
    return Finding(what, ours.share, least, reach, "", noisy=ours.noisy)


def _at_full_level(cases: Cases) -> Iterator[Finding]:
    for shape in SHAPES:
        case = ("quantize", shape, 0, "bfloat16")
        yield _ratio(cases, f"quantize {shape} / bitsandbytes", case, "bitsandbytes", 50, 100)
        case = ("dequantize", shape, 0, "bfloat16")
        yield _share(cases, f"dequantize {shape}, share of the mixed stream", case, 0.85, 0.95)
        case = ("linear", shape, 1, "bfloat16")
        yield _share(cases, f"linear {shape} M=1, share of DRAM read", case, 0.85, 0.95)
        for m in (1, 2, 4, 8, 16, 64, 512):
            case = ("linear", shape, m, "bfloat16")
            what = f"linear {shape} M={m} bf16 / bitsandbytes eval"
            least, reach = {64: (1.3, 1.3), 512: (1.5, 1.5)}.get(m, (1.1, 1.3))
            yield _ratio(cases, what, case, "bitsandbytes_eval", least, reach)
        for m, reach in ((64, 0.92), (512, 0.95)):
            case = ("linear", shape, m, "bfloat16")
            what = f"linear {shape} M={m} bf16"
            yield _ratio(cases, f"{what} / torch dense", case, "torch_dense", 0.97, 1.0)
            yield _share(cases, f"{what}, share of the bf16-dot rate", case, 0.0, reach)
        for m, least in ((64, 0.75), (512, 0.85)):
            case = ("linear", shape, m, "float32")
            what = f"linear {shape} M={m} fp32"
            yield _share(cases, f"{what}, share of the FMA rate", case, least, 0.95)
            yield _ratio(cases, f"{what} / torch dense", case, "torch_dense", 1.0, 1.0)
        for dtype, least in (("bfloat16", 1.3), ("float32", 1.6)):
            case = ("linear_lora", shape, 512, dtype)
            what = f"linear_lora {shape} {dtype} forward+backward"
            yield _ratio(cases, f"{what} / PEFT", case, "peft_bitsandbytes", least, least)
            yield _ratio(cases, f"{what} / torch without LoRA", case, "torch_dense", 0.0, 1.0)
    yield _geometric_mean(cases)
    for dtype in ("bfloat16", "float32"):
        yield _overhead(cases, dtype)
    case = ("adamw8bit", "100000000x1", 0, "float32")
    yield _ratio(cases, "AdamW8bit step / torch fused AdamW", case, "torch_fused", 1.2, 1.5)
    yield _ratio(cases, "AdamW8bit step / bitsandbytes", case, "bitsandbytes", 40, 40)


def _geometric_mean(cases: Cases) -> Finding:
    what = "linear M=1 bf16 / bitsandbytes eval, geometric mean"
    ratios = []
    for shape in SHAPES:
        found = _ratio(cases, "", ("linear", shape, 1, "bfloat16"), "bitsandbytes_eval", 0, 0)
        if found.value is None:
            return Finding(what, None, 1.2, 1.2)
        ratios.append(found.value)
    return Finding(what, math.prod(ratios) ** (1 / len(ratios)), 1.2, 1.2)


def _overhead(cases: Cases, dtype: str) -> Finding:
    what = f"call overhead over F.linear, 64x64 {dtype}"
    contenders = cases.get(("overhead", "64x64", 1, dtype), {})
    ours, dense = contenders.get("nf4"), contenders.get("torch_dense")
    if ours is None or dense is None:
        return Finding(what, None, 15, 8, " us", True)
    value = (ours.ms_p50 - dense.ms_p50) * 1e3
    return Finding(what, value, 15, 8, " us", True, ours.noisy or dense.noisy)


def _at_avx2(avx2: Cases, full: Cases) -> Iterator[Finding]:
    for case, contenders in avx2.items():
        op, shape, m, dtype = case
        if op == "overhead" or "nf4" not in contenders:
            continue
        what = f"AVX2 {op} {shape}{f' M={m}' if m else ''} {dtype}"
        peer = next(
            name
            for name in ("peft_bitsandbytes", "bitsandbytes_new_output", "bitsandbytes")
            if name in contenders or name == "bitsandbytes"
        )
        yield _ratio(avx2, f"{what} / bitsandbytes", case, peer, 1.0, 1.0)
        wide = full.get(case, {}).get("nf4")
        if dtype == "float32" and wide is not None:
            value = wide.ms_p50 / contenders["nf4"].ms_p50
            yield Finding(f"{what}, share of the AVX-512 level", value, 0.5, 0.5)


def report(rows: Sequence[Row]) -> tuple[str, bool]:
    """A Markdown table of every threshold, and whether none of the measured ones is missed."""
    levels = {
        level: by_case(row for row in rows if row.environment.isa == level) for level in _LEVELS
    }
    full = next((cases for cases in levels.values() if cases), {})
    findings = list(_at_full_level(full))
    if full is not levels["avx2"]:
        findings += _at_avx2(levels["avx2"], full)
    lines = ["| what | measured | at least | reach for | |", "| --- | ---: | --- | --- | --- |"]
    lines += [finding.line() for finding in findings]
    verdicts = [finding.verdict for finding in findings]
    counts = {v: verdicts.count(v) for v in ("reached", "pass", "FAIL", "not measured")}
    summary = ", ".join(f"{count} {verdict}" for verdict, count in counts.items())
    return "\n".join([*lines, "", summary]), not counts["FAIL"]
