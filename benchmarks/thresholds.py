"""What the CPU kernels must reach, and whether a file of rows shows it.

Stated for Llama's layer shapes with double quantization and all cores, in one interleaved run.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

from benchmarks import thresholds_gpu
from benchmarks.findings import Cases, Finding, ratio
from benchmarks.report import by_case
from benchmarks.results import Row

SHAPES = ("4096x4096", "14336x4096", "4096x14336")
_LEVELS = ("avx512_bf16", "avx512", "avx2", "portable")


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
        yield ratio(cases, f"quantize {shape} / bitsandbytes", case, "bitsandbytes", 50, 100)
        case = ("dequantize", shape, 0, "bfloat16")
        yield _share(cases, f"dequantize {shape}, share of the mixed stream", case, 0.85, 0.95)
        case = ("linear", shape, 1, "bfloat16")
        yield _share(cases, f"linear {shape} M=1, share of DRAM read", case, 0.85, 0.95)
        for m in (1, 2, 4, 8, 16, 64, 512):
            case = ("linear", shape, m, "bfloat16")
            what = f"linear {shape} M={m} bf16 / bitsandbytes eval"
            least, reach = {64: (1.3, 1.3), 512: (1.5, 1.5)}.get(m, (1.1, 1.3))
            yield ratio(cases, what, case, "bitsandbytes_eval", least, reach)
        for m, reach in ((64, 0.92), (512, 0.95)):
            case = ("linear", shape, m, "bfloat16")
            what = f"linear {shape} M={m} bf16"
            yield ratio(cases, f"{what} / torch dense", case, "torch_dense", 0.97, 1.0)
            yield _share(cases, f"{what}, share of the bf16-dot rate", case, 0.0, reach)
        for m, least in ((64, 0.75), (512, 0.85)):
            case = ("linear", shape, m, "float32")
            what = f"linear {shape} M={m} fp32"
            yield _share(cases, f"{what}, share of the FMA rate", case, least, 0.95)
            yield ratio(cases, f"{what} / torch dense", case, "torch_dense", 1.0, 1.0)
        for dtype, least in (("bfloat16", 1.3), ("float32", 1.6)):
            case = ("linear_lora", shape, 512, dtype)
            what = f"linear_lora {shape} {dtype} forward+backward"
            yield ratio(cases, f"{what} / PEFT", case, "peft_bitsandbytes", least, least)
            yield ratio(cases, f"{what} / torch without LoRA", case, "torch_dense", 0.0, 1.0)
    yield _geometric_mean(cases)
    for dtype in ("bfloat16", "float32"):
        yield _overhead(cases, dtype)
    case = ("adamw8bit", "100000000x1", 0, "float32")
    yield ratio(cases, "AdamW8bit step / torch fused AdamW", case, "torch_fused", 1.2, 1.5)
    yield ratio(cases, "AdamW8bit step / bitsandbytes", case, "bitsandbytes", 40, 40)


def _geometric_mean(cases: Cases) -> Finding:
    what = "linear M=1 bf16 / bitsandbytes eval, geometric mean"
    ratios = []
    for shape in SHAPES:
        found = ratio(cases, "", ("linear", shape, 1, "bfloat16"), "bitsandbytes_eval", 0, 0)
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
        yield ratio(avx2, f"{what} / bitsandbytes", case, peer, 1.0, 1.0)
        wide = full.get(case, {}).get("nf4")
        if dtype == "float32" and wide is not None:
            value = wide.ms_p50 / contenders["nf4"].ms_p50
            yield Finding(f"{what}, share of the AVX-512 level", value, 0.5, 0.5)


def report(rows: Sequence[Row]) -> tuple[str, bool]:
    """A Markdown table of every threshold, and whether none of the measured ones is missed."""
    levels = {
        level: by_case(row for row in rows if row.environment.isa == level) for level in _LEVELS
    }
    gpu = [row for row in rows if row.environment.driver]
    full = next((cases for cases in levels.values() if cases), {})
    findings = [] if gpu else list(_at_full_level(full))
    findings += thresholds_gpu.findings(by_case(gpu))
    if full is not levels["avx2"]:
        findings += _at_avx2(levels["avx2"], full)
    lines = ["| what | measured | at least | reach for | |", "| --- | ---: | --- | --- | --- |"]
    lines += [finding.line() for finding in findings]
    verdicts = [finding.verdict for finding in findings]
    counts = {v: verdicts.count(v) for v in ("reached", "pass", "FAIL", "not measured")}
    summary = ", ".join(f"{count} {verdict}" for verdict, count in counts.items())
    return "\n".join([*lines, "", summary]), not counts["FAIL"]
