"""One case from inputs to rows: check first, then time what is right, then state the share."""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from benchmarks import ops, optimizers, timing
from benchmarks.results import Measurement
from benchmarks.timing import Samples
from benchmarks.workload import Bench, Case, Contender, Layer, Probe, Workload

OPS: dict[str, Callable[[Case, Layer, Bench], Workload]] = {
    "quantize": ops.quantize,
    "quantize_flat": ops.quantize_flat,
    "dequantize": ops.dequantize,
    "linear": ops.linear,
    "linear_lora": ops.linear_lora,
    "linear_lora_forward": ops.linear_lora_forward,
    "overhead": ops.overhead,
    "adamw8bit": optimizers.adamw8bit,
}
# Ops whose calls record gradients or change their inputs.
_TRAINS = ("linear_lora", "adamw8bit")
# A peer further off than this computes something else, and its time means nothing. torchao's own
# scales put it at 0.01 from the shared bytes; bitsandbytes is at 0.003 where it computes in bf16.
PEER_ERROR = 0.05
# The gradients of A and B are sums over tokens, and have no counterpart in F.linear; they are
# rounded once from float32, plus once more where s or dS passes through the activations' dtype.
GRADIENT_ERROR = {torch.float32: 1e-5, torch.bfloat16: 8e-3, torch.float16: 1e-3}


@dataclass(frozen=True)
class Verdict:
    """A contender's error (None: not checked), and why it is not timed ("" if it is)."""

    error: float | None
    refused: str


def _results(value: object) -> tuple[Tensor, ...]:
    if isinstance(value, Tensor):
        return (value,)
    assert isinstance(value, tuple)
    return value


def differing_bytes(got: Sequence[Tensor], expected: Sequence[Tensor]) -> float:
    """Share of all bytes of ``expected`` that differ; 1 where sizes do."""
    different = total = 0
    for result, reference in zip(got, expected, strict=False):
        a = result.detach().contiguous().view(-1).view(torch.uint8)
        b = reference.contiguous().view(-1).view(torch.uint8)
        total += b.numel()
        different += b.numel() if a.shape != b.shape else int((a != b).sum())
    return different / total


def relative_errors(got: Sequence[Tensor], expected: Sequence[Tensor]) -> list[float]:
    """Relative Frobenius error of each result; infinite where a value is not finite."""
    errors = []
    for result, reference in zip(got, expected, strict=False):
        difference = torch.linalg.vector_norm(result.double() - reference)
        error = (difference / torch.linalg.vector_norm(reference)).item()
        errors.append(error if error == error else float("inf"))
    return errors


def _judge_exact(workload: Workload, contender: Contender) -> Verdict:
    got = _results(contender.calls[0]())
    share = differing_bytes(got, workload.expected)
    if not contender.ours:
        return Verdict(share, "")
    if len(got) != len(workload.expected):
        return Verdict(share, f"{len(got)} results instead of {len(workload.expected)}")
    return Verdict(share, f"{share:.2g} of its bytes differ from the reference" if share else "")


def _judge(
    workload: Workload, ours: bool, errors: Sequence[float], yardstick: Sequence[float]
) -> Verdict:
    worst = max(errors)
    if not ours:
        return Verdict(worst, f"error {worst:.2g}" if worst > PEER_ERROR else "")
    if len(errors) != len(workload.expected):
        return Verdict(worst, f"{len(errors)} results instead of {len(workload.expected)}")
    for index, error in enumerate(errors):
        bound = workload.factor * yardstick[index]
        if index >= 2:
            bound = max(bound, GRADIENT_ERROR[workload.case.dtype])
        # Not `error > bound`: a NaN must fail.
        if not error <= bound:
            return Verdict(worst, f"error {error:.3g} of result {index} exceeds {bound:.3g}")
    return Verdict(worst, "")


def check(workload: Workload) -> dict[str, Verdict]:
    """Run each contender once and hold its results against float64, or the reference's bytes."""
    whole = [c for c in workload.contenders if not c.partial]
    verdicts = {c.name: Verdict(None, "") for c in workload.contenders if c.partial}
    if workload.exact:
        return verdicts | {c.name: _judge_exact(workload, c) for c in whole}
    errors = {
        c.name: relative_errors(_results((c.outcome or c.calls[0])()), workload.expected)
        for c in whole
    }
    yardstick = errors[workload.yardstick]
    return verdicts | {c.name: _judge(workload, c.ours, errors[c.name], yardstick) for c in whole}


@dataclass(frozen=True)
class Outcome:
    """Measurements of one case, and what was refused: name of the contender to reason."""

    measurements: list[Measurement]
    red: dict[str, str]
    refused_peers: dict[str, str]


def _measurement(
    workload: Workload,
    name: str,
    samples: Samples,
    scale: float,
    limit: tuple[str, float],
    error: float | None,
) -> Measurement:
    case = workload.case
    p20, p50, p80 = (samples.quantile(q) * scale for q in (0.2, 0.5, 0.8))
    limit_name, limit_ms = limit
    return Measurement(
        op=case.op,
        contender=name,
        n=case.n,
        k=case.k,
        m=case.m,
        rank=case.rank,
        dtype=str(case.dtype).removeprefix("torch."),
        ms_p20=p20,
        ms_p50=p50,
        ms_p80=p80,
        gbps=workload.nbytes / p50 / 1e6,
        gflops=workload.flops / p50 / 1e6,
        limit=limit_name,
        limit_ms=limit_ms,
        share=limit_ms / p50,
        error=error,
        samples=len(samples.ms),
        rounds=samples.rounds,
        method=samples.method,
        foreign_cores=samples.foreign_cores,
        noisy=samples.noisy,
    )


def _cuda_limit(workload: Workload, bench: Bench) -> tuple[str, float]:
    copy, matmul = (rate.per_second for rate in bench.peaks.rates())
    # float32 has no tensor-core peak here; its limit is left to the bytes.
    flops = 0.0 if workload.case.dtype is torch.float32 else workload.flops
    limits = {"copy": workload.nbytes / copy, "matmul_bf16": flops / matmul}
    name = max(limits, key=lambda key: limits[key])
    return name, limits[name] * 1e3


def run_case(
    case: Case, layer: Layer, bench: Bench, rounds: int, budget: float, only: Sequence[str] = ()
) -> Outcome:
    """Check and time every contender of ``case`` (those named in ``only``, if any are)."""
    workload = OPS[case.op](case, layer, bench)
    red: dict[str, str] = {}
    refused: dict[str, str] = {}
    mode = contextlib.nullcontext() if case.op in _TRAINS else torch.inference_mode()
    with mode:
        verdicts = check(workload)
        for contender in workload.contenders:
            reason = verdicts[contender.name].refused
            if reason:
                (red if contender.ours else refused)[contender.name] = reason
        timed = [
            c
            for c in workload.contenders
            if c.name not in red and c.name not in refused and (not only or c.name in only)
        ]
        samples = _time(workload, timed, bench, rounds, budget)
    limit = ("", 0.0)
    if bench.device.type == "cuda" and workload.nbytes:
        limit = _cuda_limit(workload, bench)
    rows = []
    fastest = {p.name: _fastest(p, samples) for p in workload.probes}
    times = {p.name: fastest[p.name].quantile(0.5) * p.scale for p in workload.probes}
    if times:
        name = max(times, key=lambda key: times[key])
        limit = (name, times[name])
    for p in workload.probes:
        row = _measurement(workload, f"limit:{p.name}", fastest[p.name], p.scale, limit, None)
        rows.append(row)
    for c in timed:
        rows.append(
            _measurement(workload, c.name, samples[c.name], 1.0, limit, verdicts[c.name].error)
        )
    # Weights of several hundred MB hang in reference cycles of their closures.
    del workload, timed
    gc.collect()
    return Outcome(rows, red, refused)


def _time(
    workload: Workload, timed: Sequence[Contender], bench: Bench, rounds: int, budget: float
) -> dict[str, Samples]:
    if bench.device.type == "cuda":
        return timing.interleave_cuda({c.name: (c.calls, c.capturable) for c in timed}, rounds)
    probes = {_key(p, i): v for p in workload.probes for i, v in enumerate(p.variants)}
    return timing.interleave(probes | {c.name: c.calls for c in timed}, rounds, budget)


def _key(probe: Probe, variant: int) -> str:
    return f"limit:{probe.name}:{variant}"


def _fastest(probe: Probe, samples: Mapping[str, Samples]) -> Samples:
    found = [samples[_key(probe, i)] for i in range(len(probe.variants))]
    return min(found, key=lambda s: s.quantile(0.5))
