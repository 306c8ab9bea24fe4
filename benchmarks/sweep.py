"""The cases of a sweep, run one after another, printed as they finish and appended to a CSV."""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import torch

import nf4
from benchmarks import peers, results
from benchmarks.measure import OPS, Outcome, run_case
from benchmarks.peaks import CpuPeaks, CudaPeaks
from benchmarks.results import Environment, Measurement, Row
from benchmarks.workload import LORA_RANK, Bench, Case, Layer
from nf4.backends import cpu

SHAPES = ((4096, 4096), (14336, 4096), (4096, 14336))
TOKENS = {"bfloat16": (1, 2, 4, 8, 16, 64, 512), "float32": (64, 512)}
GPU_TOKENS = (1, 4, 8, 16, 32, 64, 256, 2048, 8192)
QUICK_SHAPE = (4096, 4096)
OVERHEAD_SHAPE = (64, 64)
# Over 4 caches (32 MB of a Zen 5 CPU) a read stream still ran 30 % above DRAM's rate, over 8 at it.
_ROTATED_CACHES = 8
_DEFAULT_ROTATION = 256 << 20
# A GPU's L2 reaches 126 MB.
_CUDA_ROTATION = 256 << 20


def _last_level_cache() -> int:
    """Bytes of the largest cache of the first CPU; 0 where the system does not tell."""
    units = {"K": 1 << 10, "M": 1 << 20, "G": 1 << 30}
    sizes = [0]
    for file in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size"):
        text = file.read_text().strip()
        if text[:-1].isdigit() and text[-1] in units:
            sizes.append(int(text[:-1]) * units[text[-1]])
    return max(sizes)


def _cpu_isa() -> str:
    """The instruction-set level that nf4's native kernels run at."""
    isa = getattr(cpu, "isa", lambda: None)()
    return isa or "reference"


def cuda_bench(backends: Sequence[str], names: Sequence[str]) -> Bench:
    """The current GPU, with every nf4 backend that runs on it if none is named."""
    device = torch.device("cuda")
    usable = [n for n in ("cuda", "triton") if nf4.available_backends()[n]]
    major, minor = torch.cuda.get_device_capability()
    threads = torch.get_num_threads()
    chosen = backends or usable or ["default"]
    peaks = CudaPeaks(device)
    return Bench(device, threads, f"sm_{major}{minor}", peaks, chosen, names, _CUDA_ROTATION)


def _bench(args: argparse.Namespace) -> Bench:
    names = [] if args.no_peers else peers.installed()
    if args.quick:
        # torchao's import and its eager dequantization take longer than all the rest.
        names = [n for n in names if n != "torchao"]
    torch.set_num_threads(args.threads)
    if (args.device or ("cuda" if torch.cuda.is_available() else "cpu")) == "cuda":
        return cuda_bench(args.backend or (), names)
    isa = _cpu_isa()
    limits = CpuPeaks(args.threads, 64 if isa.startswith("avx512") else 32)
    rotation = _ROTATED_CACHES * _last_level_cache() or _DEFAULT_ROTATION
    if args.quick:
        rotation //= 4
    device = torch.device("cpu")
    return Bench(device, args.threads, isa, limits, args.backend or ["default"], names, rotation)


def _cases(args: argparse.Namespace, device: torch.device) -> Iterator[Case]:
    chosen = args.op or [op for op in OPS if op != "quantize_flat"]
    unknown = set(chosen) - set(OPS)
    if unknown:
        raise SystemExit(f"benchmarks: --op must be one of {', '.join(OPS)}, got {unknown.pop()}")
    gpu = device.type == "cuda"
    shapes = args.shape or ([QUICK_SHAPE] if args.quick else SHAPES)
    dtypes = args.dtype or (["bfloat16"] if gpu else ["bfloat16", "float32"])
    for n, k in shapes:
        for op in chosen:
            if op in ("quantize", "quantize_flat", "dequantize"):
                yield Case(op, n, k)
            elif op not in ("overhead", "adamw8bit"):
                for dtype in dtypes:
                    for m in _tokens(args, op, dtype, gpu):
                        rank = 0 if op == "linear" else LORA_RANK
                        yield Case(op, n, k, m, getattr(torch, dtype), rank)
    if "overhead" in chosen:
        for dtype in dtypes:
            yield Case("overhead", *OVERHEAD_SHAPE, 1, getattr(torch, dtype))
    if "adamw8bit" in chosen:
        yield Case("adamw8bit", 8_000_000 if args.quick else 100_000_000, 1, 0, torch.float32)


def _tokens(args: argparse.Namespace, op: str, dtype: str, gpu: bool) -> Sequence[int]:
    if args.m:
        return args.m
    if args.quick:
        return (1, 16, 256) if op == "linear" else (256,)
    if op == "linear":
        return GPU_TOKENS if gpu else TOKENS["float32" if dtype == "float32" else "bfloat16"]
    if gpu:
        return (2048, 8192)
    # The CPU's training step covers the forward.
    return (512,) if op == "linear_lora" else ()


def _print(case: Case, outcome: Outcome) -> None:
    print(f"{case}", flush=True)
    for m in outcome.measurements:
        share = f"{m.share:.0%} of {m.limit}" if m.limit else ""
        error = "" if m.error is None else f"error {m.error:.2g}"
        compute = m.limit in ("dot_bf16", "fma_f32", "matmul_bf16")
        rate = f"{m.gflops:.0f} GFLOP/s" if compute else f"{m.gbps:.1f} GB/s"
        noise = f"noisy: {m.foreign_cores:.1f} foreign cores" if m.noisy else ""
        times = f"{m.ms_p50:.4f} ms ({m.ms_p20:.4f} .. {m.ms_p80:.4f})"
        line = f"  {m.contender:<24}{times:<38}{rate:>13}  {share:<17}{error:<15}{noise}"
        print(line.rstrip(), flush=True)
    for name, reason in {**outcome.red, **outcome.refused_peers}.items():
        print(f"  {name:<24}not timed: {reason}", flush=True)


def run_cases(
    bench: Bench,
    cases: Iterable[Case],
    csv: Path | None,
    rounds: int,
    budget: float,
    only: Sequence[str] = (),
    seconds: float = math.inf,
) -> tuple[list[str], list[Case]]:
    """Run, print and record ``cases``, starting none after ``seconds``.

    Returns what was wrong, and the cases that were left out.
    """
    env = results.environment(bench.device, bench.isa, bench.threads)
    print(f"{env.hardware}; {env.isa}; {env.threads} threads; nf4 {env.nf4} at {env.commit}")
    print(f"limits: {', '.join(str(rate) for rate in bench.peaks.rates())}")
    print(f"peers: {', '.join(bench.peers) or 'none'}; torch {env.torch}", flush=True)
    layer = None
    red, left_out = [], []
    end = time.monotonic() + seconds
    for case in cases:
        if time.monotonic() > end:
            left_out.append(case)
            continue
        if layer is None or (layer.n, layer.k) != (case.n, case.k):
            # A call so small that only its overhead counts finds its data in the cache anyway.
            rotate_bytes = 0 if case.op == "overhead" else bench.rotate_bytes
            layer = Layer(replace(bench, rotate_bytes=rotate_bytes), case.n, case.k)
        outcome = run_case(case, layer, layer.bench, rounds, budget, only)
        _print(case, outcome)
        red += [f"{case} by {name}: {reason}" for name, reason in outcome.red.items()]
        if csv:
            results.append(csv, [Row(env, m) for m in outcome.measurements])
    return red, left_out


def _measured(path: Path, env: Environment) -> set[tuple[str, int, int, int, str]]:
    """The cases that a file has quiet rows for, from this commit, machine, level and threads."""
    if not path.exists():
        return set()
    here = [
        row
        for row in results.read([path])
        if replace(row.environment, date="") == replace(env, date="")
    ]
    noisy = {_key(row.measurement) for row in here if row.measurement.noisy}
    return {_key(row.measurement) for row in here} - noisy


def _key(m: Measurement) -> tuple[str, int, int, int, str]:
    return m.op, m.n, m.k, m.m, m.dtype


def _case_key(case: Case) -> tuple[str, int, int, int, str]:
    return case.op, case.n, case.k, case.m, str(case.dtype).removeprefix("torch.")


def run(args: argparse.Namespace) -> list[str]:
    """Run the sweep that ``args`` describe; returns what was wrong."""
    bench = _bench(args)
    rounds = args.rounds or (2 if args.quick else 5)
    budget = 0.03 if args.quick else 0.08
    cases: Iterable[Case] = _cases(args, bench.device)
    if args.missing and args.csv:
        env = results.environment(bench.device, bench.isa, bench.threads)
        have = _measured(args.csv, env)
        cases = [case for case in cases if _case_key(case) not in have]
    only = args.contender or ()
    red, left_out = run_cases(bench, cases, args.csv, rounds, budget, only, args.seconds)
    if args.csv and args.csv.exists():
        results.rewrite(args.csv)
    if left_out:
        print(f"left out for time: {len(left_out)} cases")
    return red
