"""What a case is made of: the quantized layer, its contenders, probes and expected results.

All contenders of a case compute the same function of the same quantized bytes. Each has several
calls, on different copies of the weight, so that a rotation over them exceeds the last-level cache.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

import nf4
from benchmarks.peaks import CpuPeaks, CudaPeaks
from benchmarks.timing import Call

BLOCK_SIZE = 64
# Tiny layers would need thousands to leave the cache; they are not timed for their bandwidth.
_MAX_COPIES = 64
LORA_RANK = 16
LORA_SCALING = 2.0
NF4_BYTES = 0.5 + 1 / BLOCK_SIZE + 4 / (BLOCK_SIZE * 256)  # a weight, with its nested scales


@dataclass(frozen=True)
class Case:
    """One line of a sweep. ``m`` is the number of tokens; ``rank`` is 0 without LoRA."""

    op: str
    n: int
    k: int
    m: int = 0
    dtype: torch.dtype = torch.bfloat16
    rank: int = 0

    def __str__(self) -> str:
        tokens = f" M={self.m}" if self.m else ""
        return f"{self.op} {self.n}x{self.k}{tokens} {str(self.dtype).removeprefix('torch.')}"


@dataclass(frozen=True)
class Contender:
    """An implementation: ``calls`` return the op's results, in the order of ``expected``.

    ``ours`` must be within the bounds or the case fails; peers are timed with their error stated.
    ``partial``: computes less than the op (no LoRA, say) and is timed as a mark, unchecked.
    ``capturable``: a CUDA graph can record the calls. ``outcome``: one call whose results are
    checked, where the timed calls return none.
    """

    name: str
    calls: Sequence[Callable[[], object]]
    ours: bool = False
    partial: bool = False
    capturable: bool = True
    outcome: Callable[[], object] | None = None


@dataclass(frozen=True)
class Probe:
    """A limit of the machine, timed beside the contenders; ``scale`` converts its time.

    ``variants``: ways to drive the same unit, each with its calls; the fastest is the limit.
    """

    name: str
    variants: Sequence[Sequence[Call]]
    scale: float


@dataclass(frozen=True)
class Workload:
    """A case made concrete. ``nbytes`` and ``flops``: the fewest one call can do with."""

    case: Case
    contenders: Sequence[Contender]
    probes: Sequence[Probe]
    nbytes: float
    flops: float
    # Float64 results, or the reference's bytes where ``exact``.
    expected: Sequence[Tensor] = ()
    exact: bool = False
    # Name of the contender whose error bounds ours, and by which factor.
    yardstick: str = ""
    factor: float = 0.0


@dataclass
class Bench:
    """What all cases of a run share."""

    device: torch.device
    threads: int
    isa: str
    peaks: CpuPeaks | CudaPeaks
    backends: Sequence[str]
    peers: Sequence[str]
    rotate_bytes: int

    def copies(self, nbytes: int) -> int:
        """How many buffers of that size make a rotation."""
        return max(1, min(_MAX_COPIES, math.ceil(self.rotate_bytes / max(nbytes, 1))))


@dataclass
class Layer:
    """A quantized weight ``[n, k]`` and its copies in every form a contender wants."""

    bench: Bench
    n: int
    k: int
    _cache: dict[tuple[str, torch.dtype], Any] = field(default_factory=dict)

    def cached(self, what: str, dtype: torch.dtype, make: Callable[[], Any]) -> Any:
        """What ``make`` returned when it was first asked for; many cases share one layer."""
        key = (what, dtype)
        if key not in self._cache:
            self._cache[key] = make()
        return self._cache[key]

    @cached_property
    def source(self) -> Tensor:
        """The bf16 weight: rows of different spread, as trained weights have."""
        spread = torch.rand(self.n, 1, device=self.bench.device) + 0.5
        w = torch.randn(self.n, self.k, device=self.bench.device) * spread * 0.02
        return w.bfloat16()

    @cached_property
    def q(self) -> nf4.QuantizedTensor:
        return nf4.quantize(self.source, block_size=BLOCK_SIZE)

    @cached_property
    def qs(self) -> list[nf4.QuantizedTensor]:
        """Equal weights in memory of their own, placed there as ``quantize`` places them."""
        count = self.bench.copies(self.q.nbytes)
        return [self.q, *(nf4.quantize(self.source, BLOCK_SIZE) for _ in range(count - 1))]

    @cached_property
    def w32(self) -> Tensor:
        """The dequantized weight by the reference backend, float32."""
        with nf4.use_backend("reference"):
            return nf4.dequantize(self.q, torch.float32)

    def dense(self, dtype: torch.dtype) -> list[Tensor]:
        """Copies of the dequantized weight in ``dtype``."""

        def make() -> list[Tensor]:
            w = self.w32.to(dtype)
            return [w, *(w.clone() for _ in range(self.bench.copies(w.nbytes) - 1))]

        return self.cached("dense", dtype, make)


@dataclass(frozen=True)
class LoraInputs:
    """Leaves of one training step through a layer with LoRA; adapters are float32."""

    x: Tensor  # [M, K]
    grad_y: Tensor  # [M, N]
    a: Tensor  # [r, K]
    b: Tensor  # [N, r]

    def step(self, forward: Callable[[], Tensor], *leaves: Tensor) -> tuple[Tensor | None, ...]:
        """Forward and backward; returns y and the gradients of ``leaves``."""
        for leaf in leaves:
            leaf.grad = None
        y = forward()
        y.backward(self.grad_y)
        return (y.detach(), *(leaf.grad for leaf in leaves))
