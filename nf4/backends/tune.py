"""Times candidate configurations of the Triton matmuls on one device and keeps the fastest.

A coordinate search from the built-in configuration: one size at a time is halved and doubled, and
moved on as long as that helps. A candidate that does not compile, or whose result differs, is
dropped. What is timed is the launch that a user's call makes, planned by a table of one entry.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from nf4 import formats
from nf4.backends import triton, tuning, tuning_table
from nf4.backends.triton_launch import target_of
from nf4.backends.triton_matmul import Dropout, dense_lora
from nf4.backends.tuning_table import Entry, Key, MatmulConfig, Table

Call = Callable[[], Tensor]
# Seconds of one call, from calls that do the same work on different copies of the weight.
Clock = Callable[[Sequence[Call]], float]

# A weight that stays in the second-level cache is timed too well: the copies exceed any GPU's.
_ROTATED_BYTES = 256 << 20
# Relative to the built-in configuration's result: two roundings, and another order of the sum.
_TOLERANCE = {torch.float32: 1e-5, torch.float16: 3e-3, torch.bfloat16: 2e-2}
_RANK = 16  # of the LoRA term that the dense kernels carry
_FIELDS = ("block_n", "block_m", "block_k", "num_warps", "num_stages", "split")


@dataclass(frozen=True)
class Problem:
    """One op on a weight [n, k] with ``m`` rows."""

    op: str
    m: int
    n: int
    k: int
    dtype: torch.dtype
    block_size: int = 64
    nested: bool = True
    dropout: bool = False

    @property
    def key(self) -> Key:
        """What a table lists it under."""
        packed = self.op in ("linear", "linear_backward")
        block_size = self.block_size if packed else 0
        return Key(self.op, self.n, self.k, self.dtype.itemsize, block_size, self.dropout)


@dataclass(frozen=True)
class Result:
    """The fastest configuration that was found, and what it gains."""

    problem: Problem
    config: MatmulConfig | None
    seconds: float
    builtin_seconds: float
    tried: int
    dropped: tuple[str, ...]  # candidates that failed, and why

    @property
    def entry(self) -> Entry:
        return Entry(self.problem.key, self.problem.m, self.config)


def problems(
    shapes: Sequence[tuple[int, int]],
    tokens: Sequence[int],
    dtype: torch.dtype,
    block_size: int,
    nested: bool,
    device: torch.device,
) -> Iterator[Problem]:
    """What a model with layers of ``shapes`` (n, k) meets at ``tokens`` rows.

    The dense kernels are only asked where the built-in rules unpack the weight first, and nothing
    for the product of a single row, whose kernel has one configuration.
    """
    target = target_of(device)
    for n, k in shapes:
        aligned = k % block_size == 0
        for m in tokens:
            shape = tuning.Shape(m, n, k, block_size, aligned, dtype.itemsize)
            with tuning_table.using(Table()):
                plans = tuning.linear(shape, target), tuning.linear_backward(shape, target)
            layer = (m, n, k, dtype, block_size, nested)
            for op, dense, plan in zip(
                ("linear", "linear_backward"), ("dense", "dense_backward"), plans, strict=True
            ):
                if op == "linear" and tuning.linear_row(shape) is not None:
                    continue
                if plan is not None:
                    yield Problem(op, *layer)
                elif tuning.carries_lora(dtype.itemsize, target):
                    masks = (False, True) if dense == "dense_backward" else (False,)
                    yield from (Problem(dense, *layer, dropout) for dropout in masks)


def calls(
    problem: Problem, device: torch.device, rotated_bytes: int = _ROTATED_BYTES
) -> list[Call]:
    """Calls of the op on random inputs, each on a copy of the weight of its own."""
    p = problem
    weight = torch.randn(p.n, p.k, dtype=p.dtype, device=device)
    rows = p.k if p.op in ("linear", "dense") else p.n
    x = torch.randn(p.m, rows, dtype=p.dtype, device=device)
    if p.op.startswith("dense"):
        weights = _copies(weight, rotated_bytes)
        return [_dense_call(p, x, w) for w in weights]
    packed, absmax = triton.quantize(weight, p.block_size, formats.NF4.id)
    nested, offset = None, None
    if p.nested:
        absmax, nested, offset = triton.double_quantize(absmax)
    scales, layout = (absmax, nested, offset), (p.block_size, formats.NF4.id)

    def call(packed: Tensor) -> Tensor:
        if p.op == "linear":
            return triton.linear(x, packed, *scales, None, p.n, *layout)
        return triton.linear_backward(x, packed, *scales, p.k, *layout)

    return [partial(call, copy) for copy in _copies(packed, rotated_bytes)]


def _copies(weight: Tensor, rotated_bytes: int) -> list[Tensor]:
    return [weight, *(weight.clone() for _ in range(rotated_bytes // weight.nbytes))]


def _dense_call(p: Problem, x: Tensor, weight: Tensor) -> Call:
    features = p.n if p.op == "dense" else p.k
    u = torch.randn(p.m, _RANK, device=x.device)
    v = torch.randn(_RANK, features, device=x.device)
    dropout = Dropout()
    if p.dropout:
        dropout = Dropout(torch.ones(1, dtype=torch.int64, device=x.device), 0.05)
    w = weight.t() if p.op == "dense" else weight
    return partial(dense_lora, x, w, u, v, 1.0, None, dropout, p.dtype)


def search(
    problem: Problem, device: torch.device, clock: Clock, rotated_bytes: int = _ROTATED_BYTES
) -> Result:
    """The fastest configuration for one problem."""
    from triton.errors import TritonError

    work = calls(problem, device, rotated_bytes)
    builtin = builtin_config(problem, device)
    seconds: dict[MatmulConfig | None, float] = {}
    dropped = []
    with tuning_table.using(_only(problem, builtin)):
        expected = work[0]().double()
        seconds[builtin] = clock(work)

    def time(config: MatmulConfig | None) -> float:
        if config in seconds:
            return seconds[config]
        seconds[config] = float("inf")
        if tuning_table.broken_rule(problem.key, config) is None:
            with tuning_table.using(_only(problem, config)):
                try:
                    error = (work[0]().double() - expected).norm() / expected.norm()
                    if error <= _TOLERANCE[problem.dtype]:  # also false for NaN
                        seconds[config] = clock(work)
                    else:
                        dropped.append(f"{config}: the result differs by {error:.1e}")
                except (TritonError, RuntimeError) as error:
                    # A failed compiler pass is a plain RuntimeError, as is a broken device.
                    if not isinstance(error, TritonError) and "PassManager" not in str(error):
                        raise
                    dropped.append(f"{config}: {' '.join(str(error).split())}")
        return seconds[config]

    best = builtin
    assert best is not None
    for field in (*_FIELDS, "permute"):
        for step in _steps(field):
            while True:
                value = step(getattr(best, field))
                candidate = replace(best, **{field: value})
                if not time(candidate) < seconds[best]:
                    break
                best = candidate
    winner: MatmulConfig | None = best
    if problem.key.block_size and time(None) < seconds[best]:
        winner = None
    tried = sum(s < float("inf") for s in seconds.values())
    return Result(problem, winner, seconds[winner], seconds[builtin], tried, tuple(dropped))


def builtin_config(problem: Problem, device: torch.device) -> MatmulConfig | None:
    """What the built-in rules choose."""
    p, target = problem, target_of(device)
    with tuning_table.using(Table()):
        if p.op.startswith("dense"):
            n, k = (p.n, p.k) if p.op == "dense" else (p.k, p.n)
            backward = p.op == "dense_backward"
            return tuning.dense(p.m, n, k, backward, p.dropout, p.dtype.itemsize, target)
        shape = tuning.Shape(p.m, p.n, p.k, p.block_size, p.k % p.block_size == 0, p.dtype.itemsize)
        plan = tuning.linear if p.op == "linear" else tuning.linear_backward
        return plan(shape, target)


def _only(problem: Problem, config: MatmulConfig | None) -> Table:
    return Table([Entry(problem.key, problem.m, config)])


def _steps(field: str) -> tuple[Callable[[Any], Any], ...]:
    if field == "permute":
        return (lambda value: not value,)
    if field == "num_stages":
        return (lambda value: value + 1, lambda value: value - 1)
    return (lambda value: 2 * value, lambda value: value // 2)


def gpu_clock(calls: Sequence[Call], seconds: float = 0.05) -> float:
    """Median over replays of a CUDA graph of all calls, which leaves out the host."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for call in calls:
            call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()

    def replay() -> float:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1e3

    replay()
    repeat = max(3, min(100, round(seconds / replay())))
    return statistics.median(replay() for _ in range(repeat)) / len(calls)
