"""Interleaved timing: every contender of a case runs in every round, in one process.

Nothing is compared across runs. A round on which other processes took the CPU is thrown away and
repeated, up to twice as many rounds as asked for; if too few quiet ones are found, the noisy ones
count and the result says so.
"""

from __future__ import annotations

import math
import os
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch

Call = Callable[[], object]

# Share of one core that other processes may take in a round. Two kernel ticks of 10 ms in the
# shortest rounds of 0.2 s reach 0.1 without anything running.
MAX_FOREIGN_CORES = 0.2
# A sample shorter than this is mostly the clock, so fast calls are timed in batches.
_MIN_SAMPLE_SECONDS = 200e-6
_SLOW_SECONDS = 0.4


@dataclass(frozen=True)
class Samples:
    """Milliseconds of single calls, pooled over the rounds that counted."""

    ms: tuple[float, ...]
    rounds: int
    foreign_cores: float | None
    noisy: bool
    method: str

    def quantile(self, q: float) -> float:
        """The value at ``q`` in 0..1, linearly interpolated."""
        ordered = sorted(self.ms)
        position = q * (len(ordered) - 1)
        low = math.floor(position)
        high = min(low + 1, len(ordered) - 1)
        return ordered[low] + (ordered[high] - ordered[low]) * (position - low)


def _busy_seconds() -> float | None:
    """Seconds that all cores together were busy, or taken by the hypervisor, since boot."""
    try:
        fields = Path("/proc/stat").read_text().splitlines()[0].split()[1:]
    except OSError:
        return None
    user, nice, system, _idle, _iowait, irq, softirq, steal = (int(v) for v in fields[:8])
    return (user + nice + system + irq + softirq + steal) / os.sysconf("SC_CLK_TCK")


class LoadMeter:
    """Cores that processes other than this one kept busy since the meter was made."""

    def __init__(self) -> None:
        self._busy, self._own, self._wall = _busy_seconds(), time.process_time(), time.time()

    def foreign_cores(self) -> float | None:
        """None where the system does not tell."""
        busy = _busy_seconds()
        if busy is None or self._busy is None:
            return None
        elapsed = max(time.time() - self._wall, 1e-9)
        own = time.process_time() - self._own
        return max(0.0, (busy - self._busy - own) / elapsed)


@dataclass
class _Plan:
    """How one contender is sampled: ``samples`` a round, ``batch`` calls a sample."""

    calls: Sequence[Call]
    batch: int
    samples: int
    rounds: int
    next: int = 0
    by_round: list[list[float]] = field(default_factory=list)

    def run_round(self) -> None:
        times = []
        # One untimed call: the contender before this one has left its data in the caches.
        self._step()
        for _ in range(self.samples):
            start = time.perf_counter()
            for _ in range(self.batch):
                self._step()
            times.append((time.perf_counter() - start) * 1e3 / self.batch)
        self.by_round.append(times)

    def _step(self) -> None:
        self.calls[self.next]()
        self.next = (self.next + 1) % len(self.calls)


def _plan(calls: Sequence[Call], rounds: int, budget: float) -> _Plan:
    calls[0]()
    start = time.perf_counter()
    calls[-1]()
    once = time.perf_counter() - start
    if once > _SLOW_SECONDS:
        # Peers that take seconds a call get fewer rounds; they are not close races.
        return _Plan(calls, 1, 1, min(rounds, 3))
    batch = max(1, math.ceil(_MIN_SAMPLE_SECONDS / max(once, 1e-7)))
    samples = max(1, min(100, round(budget / (once * batch))))
    return _Plan(calls, batch, samples, rounds)


def interleave(
    contenders: Mapping[str, Sequence[Call]], rounds: int = 5, budget: float = 0.08
) -> dict[str, Samples]:
    """Time each contender's calls on the CPU for about ``budget`` seconds in each round.

    ``contenders`` maps a name to calls that do the same work on different copies of the weight;
    they are taken in turn, so that no weight stays in the last-level cache.
    """
    plans = {name: _plan(calls, rounds, budget) for name, calls in contenders.items()}
    names = list(plans)
    load: list[float | None] = []
    for attempt in range(2 * rounds):
        quiet = [v for v in load if v is not None and v <= MAX_FOREIGN_CORES]
        if len(quiet) >= rounds or (attempt >= rounds and None in load):
            break
        meter = LoadMeter()
        shift = attempt % len(names)
        for name in names[shift:] + names[:shift]:
            plan = plans[name]
            if len(plan.by_round) < plan.rounds or plan.rounds == rounds:
                plan.run_round()
        load.append(meter.foreign_cores())
    return {name: _collect(plan, load, rounds) for name, plan in plans.items()}


def _collect(plan: _Plan, load: Sequence[float | None], rounds: int) -> Samples:
    pairs = list(zip(plan.by_round, load, strict=False))
    quiet = [(t, f) for t, f in pairs if f is None or f <= MAX_FOREIGN_CORES]
    enough = len(quiet) >= min(rounds, plan.rounds)
    used = quiet if enough else pairs
    foreign = [f for _, f in used if f is not None]
    ms = tuple(v for times, _ in used for v in times)
    return Samples(ms, len(used), max(foreign) if foreign else None, not enough, "wall")


def _replayer(calls: Sequence[Call]) -> tuple[Call, str]:
    """One replay of all calls, and how it is done: a CUDA graph, or a loop where capture fails."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for call in calls:
            call()
    torch.cuda.current_stream().wait_stream(stream)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph):
            for call in calls:
                call()
    except RuntimeError:
        # bitsandbytes' quantize launches on the default stream, which no graph can record.
        torch.cuda.synchronize()

        def loop() -> None:
            for call in calls:
                call()

        return loop, "events"
    return graph.replay, "graph"


def interleave_cuda(
    contenders: Mapping[str, tuple[Sequence[Call], bool]], rounds: int = 7, budget: float = 0.02
) -> dict[str, Samples]:
    """Time each contender's calls on the current GPU by CUDA events around whole rotations.

    ``contenders`` maps a name to (calls, capturable); capturable ones are replayed as one CUDA
    graph, the others run as a loop, where the host's share counts if the GPU waits for it.
    """
    replays: dict[str, tuple[Call, str, int, int]] = {}
    for name, (calls, capturable) in contenders.items():
        if capturable:
            replay, method = _replayer(calls)
        else:

            def replay(calls: Sequence[Call] = calls) -> None:
                for call in calls:
                    call()

            method = "events"
        replay()
        once = _event_ms(replay, 1) / 1e3
        repeat = max(1, min(200, round(budget / max(once, 1e-6))))
        replays[name] = (replay, method, repeat, len(calls))
    samples: dict[str, list[float]] = {name: [] for name in replays}
    names = list(replays)
    for attempt in range(rounds):
        shift = attempt % len(names)
        for name in names[shift:] + names[:shift]:
            replay, _, repeat, count = replays[name]
            samples[name] += [_event_ms(replay, 1) / count for _ in range(repeat)]
    return {
        name: Samples(tuple(ms), rounds, None, False, replays[name][1])
        for name, ms in samples.items()
    }


def _event_ms(call: Call, repeat: int) -> float:
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    for _ in range(repeat):
        call()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / repeat


def median_seconds(call: Call, rounds: int = 5) -> float:
    """Median wall seconds of one call, for figures that stand alone."""
    call()
    seconds = []
    for _ in range(rounds):
        start = time.perf_counter()
        call()
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds)
