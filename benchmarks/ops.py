"""The registry: for each op its inputs, what it must move and compute, and who competes.

All contenders of a case compute the same function of the same quantized bytes. Each has several
calls, on different copies of the weight, so that a rotation over them exceeds the last-level cache.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property

import torch
import torch.nn.functional as F
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
    """A limit of the machine, timed beside the contenders; ``scale`` converts its time."""

    name: str
    calls: Sequence[Call]
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
    _dense: dict[torch.dtype, list[Tensor]] = field(default_factory=dict)

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
        """Copies of ``q`` in memory of their own."""
        count = self.bench.copies(self.q.nbytes)
        copies = [
            replace(self.q, packed=self.q.packed.clone(), absmax=self.q.absmax.clone())
            for _ in range(count - 1)
        ]
        return [self.q, *copies]

    @cached_property
    def w32(self) -> Tensor:
        """The dequantized weight by the reference backend, float32."""
        with nf4.use_backend("reference"):
            return nf4.dequantize(self.q, torch.float32)

    def dense(self, dtype: torch.dtype) -> list[Tensor]:
        """Copies of the dequantized weight in ``dtype``."""
        if dtype not in self._dense:
            w = self.w32.to(dtype)
            count = self.bench.copies(w.nbytes)
            self._dense[dtype] = [w, *(w.clone() for _ in range(count - 1))]
        return self._dense[dtype]


def _ours(
    bench: Bench, make: Callable[[int], Callable[[], object]], count: int, capturable: bool = True
) -> list[Contender]:
    """One contender per nf4 backend in the run; ``make(i)`` is the call on copy ``i``."""
    contenders = []
    for backend in bench.backends:

        def forced(
            i: int, backend: str = backend, call_of: Callable = make
        ) -> Callable[[], object]:
            call = call_of(i)

            def run() -> object:
                with nf4.use_backend(backend):
                    return call()

            return run

        make_call = make if backend == "default" else forced
        name = "nf4" if backend == "default" else f"nf4_{backend}"
        contenders.append(
            Contender(name, [make_call(i) for i in range(count)], ours=True, capturable=capturable)
        )
    return contenders


def _memory_probe(bench: Bench, case: Case, layer: Layer, total: float) -> list[Probe]:
    """Reading the packed weights, scaled to all bytes of the op."""
    if not isinstance(bench.peaks, CpuPeaks):
        return []
    calls = [bench.peaks.read(q.packed) for q in layer.qs]
    return [Probe("read", calls, total / layer.q.packed.nbytes)]


def _compute_probe(bench: Bench, case: Case, flops: float) -> list[Probe]:
    if not isinstance(bench.peaks, CpuPeaks):
        return []
    if case.dtype is not torch.float32 and bench.peaks.has_dot_bf16:
        amount, call = bench.peaks.dot_burst()
        return [Probe("dot_bf16", [call], flops / amount)]
    amount, call = bench.peaks.fma_burst()
    return [Probe("fma_f32", [call], flops / amount)]


def quantize(case: Case, layer: Layer, bench: Bench) -> Workload:
    """bf16 weight to NF4 with double quantization."""
    from benchmarks import peers

    count = bench.copies(layer.source.nbytes)
    weights = [layer.source, *(layer.source.clone() for _ in range(count - 1))]
    nbytes = layer.source.nbytes + layer.q.nbytes
    probes = []
    if isinstance(bench.peaks, CpuPeaks):
        target = torch.empty_like(layer.q.packed)
        calls = [bench.peaks.mix(w, target) for w in weights]
        probes = [Probe("mix", calls, nbytes / (layer.source.nbytes + target.nbytes))]

    def make(i: int) -> Callable[[], object]:
        return lambda: _quantized_tensors(nf4.quantize(weights[i], BLOCK_SIZE))

    with nf4.use_backend("reference"):
        expected = _quantized_tensors(nf4.quantize(layer.source, BLOCK_SIZE))
    contenders = [
        # The finite check reads one flag, which no CUDA graph can record.
        *_ours(bench, make, count, capturable=False),
        *peers.quantize(case, weights, bench),
    ]
    return Workload(case, contenders, probes, nbytes, 0, expected, exact=True)


def _quantized_tensors(q: nf4.QuantizedTensor) -> tuple[Tensor, ...]:
    return tuple(t for t in q.tensors if t is not None)


def dequantize(case: Case, layer: Layer, bench: Bench) -> Workload:
    """Into a given buffer; the buffers rotate with the weights."""
    from benchmarks import peers

    qs = layer.qs
    out_bytes = case.n * case.k * case.dtype.itemsize
    outs = [
        torch.empty(case.n, case.k, dtype=case.dtype, device=bench.device)
        for _ in range(max(2, bench.copies(out_bytes)))
    ]
    nbytes = layer.q.nbytes + out_bytes
    probes = []
    if isinstance(bench.peaks, CpuPeaks):
        calls = [
            bench.peaks.mix(qs[i % len(qs)].packed, outs[i % len(outs)]) for i in range(len(qs))
        ]
        probes = [Probe("mix", calls, nbytes / (layer.q.packed.nbytes + out_bytes))]

    def make(i: int) -> Callable[[], object]:
        return lambda: nf4.dequantize(qs[i], out=outs[i % len(outs)])

    expected = (layer.w32.to(case.dtype),)
    contenders = [
        *_ours(bench, make, len(qs)),
        *peers.dequantize(case, layer, outs, bench),
    ]
    return Workload(case, contenders, probes, nbytes, 0, expected, exact=True)


def _dense(x: Tensor, w: Tensor) -> Callable[[], object]:
    return lambda: F.linear(x, w)


# Error of ours over that of F.linear on the dequantized weight, as the tests demand it.
ERROR_FACTOR = {torch.float32: 2.0, torch.bfloat16: 1.25, torch.float16: 1.25}


def linear(case: Case, layer: Layer, bench: Bench) -> Workload:
    """Forward only, as in decoding and evaluation."""
    from benchmarks import peers

    x = torch.randn(case.m, case.k, dtype=case.dtype, device=bench.device)
    qs = layer.qs
    dense = layer.dense(case.dtype)
    flops = 2.0 * case.m * case.n * case.k
    nbytes = layer.q.nbytes + (case.m * (case.n + case.k)) * case.dtype.itemsize
    contenders = [
        *_ours(bench, lambda i: lambda: nf4.linear(x, qs[i]), len(qs)),
        Contender("torch_dense", [_dense(x, w) for w in dense]),
        *peers.linear(case, layer, x, bench),
    ]
    expected = (x.double() @ layer.w32.double().t(),)
    return Workload(
        case,
        contenders,
        [*_memory_probe(bench, case, layer, nbytes), *_compute_probe(bench, case, flops)],
        nbytes,
        flops,
        expected,
        yardstick="torch_dense",
        factor=ERROR_FACTOR[case.dtype],
    )


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


def _lora_inputs(case: Case, bench: Bench) -> LoraInputs:
    a = (torch.rand(case.rank, case.k, device=bench.device) - 0.5) * (2 / math.sqrt(case.k))
    b = torch.randn(case.n, case.rank, device=bench.device) * 0.02
    x = torch.randn(case.m, case.k, device=bench.device).to(case.dtype)
    grad_y = torch.randn(case.m, case.n, device=bench.device).to(case.dtype)
    return LoraInputs(x.requires_grad_(), grad_y, a.requires_grad_(), b.requires_grad_())


def _lora_expected(i: LoraInputs, w32: Tensor) -> tuple[Tensor, ...]:
    x, g, a, b, w = (t.detach().double() for t in (i.x, i.grad_y, i.a, i.b, w32))
    s, ds = x @ a.t(), LORA_SCALING * (g @ b)
    y = x @ w.t() + LORA_SCALING * (s @ b.t())
    return y, g @ w + ds @ a, ds.t() @ x, LORA_SCALING * (g.t() @ s)


def _lora_flops(case: Case) -> tuple[float, float]:
    """(forward, forward and backward)."""
    base = 2.0 * case.m * case.n * case.k
    down, up = 2.0 * case.m * case.rank * case.k, 2.0 * case.m * case.rank * case.n
    # Backward: dS and dB are an `up` each, dX's share and dA a `down` each.
    return base + down + up, 2 * base + 3 * down + 3 * up


def _dense_lora(x: Tensor, w: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """The same layer in plain torch, with a weight that was never quantized."""
    up = F.linear(F.linear(x.to(a.dtype), a), b) * LORA_SCALING
    return F.linear(x, w) + up.to(x.dtype)


def linear_lora(case: Case, layer: Layer, bench: Bench) -> Workload:
    """One training step: forward, then the gradients of x, A and B."""
    from benchmarks import peers

    inputs = _lora_inputs(case, bench)
    x, a, b = inputs.x, inputs.a, inputs.b
    qs, dense = layer.qs, layer.dense(case.dtype)
    _, flops = _lora_flops(case)
    values = 2 * case.m * (case.n + case.k) * case.dtype.itemsize
    nbytes = 2 * layer.q.nbytes + values + 4 * 4 * case.rank * (case.n + case.k)

    def ours(i: int) -> Callable[[], object]:
        return lambda: inputs.step(lambda: nf4.linear_lora(x, qs[i], a, b, LORA_SCALING), x, a, b)

    def dense_lora(w: Tensor) -> Callable[[], object]:
        return lambda: inputs.step(lambda: _dense_lora(x, w, a, b), x, a, b)

    def dense_only(w: Tensor) -> Callable[[], object]:
        return lambda: inputs.step(lambda: F.linear(x, w), x)

    contenders = [
        *_ours(bench, ours, len(qs), capturable=False),
        Contender("torch_dense_lora", [dense_lora(w) for w in dense], capturable=False),
        # Without LoRA: what is left to gain once the adapters cost nothing.
        Contender("torch_dense", [dense_only(w) for w in dense], partial=True, capturable=False),
        *peers.linear_lora(case, layer, inputs, bench),
    ]
    return Workload(
        case,
        contenders,
        _compute_probe(bench, case, flops),
        nbytes,
        flops,
        _lora_expected(inputs, layer.w32),
        yardstick="torch_dense_lora",
        factor=ERROR_FACTOR[case.dtype],
    )


def linear_lora_forward(case: Case, layer: Layer, bench: Bench) -> Workload:
    """The forward of a training step alone, without recording gradients."""
    from benchmarks import peers

    inputs = _lora_inputs(case, bench)
    x, a, b = (t.detach() for t in (inputs.x, inputs.a, inputs.b))
    qs, dense = layer.qs, layer.dense(case.dtype)
    flops, _ = _lora_flops(case)
    values = case.m * (case.n + case.k) * case.dtype.itemsize
    nbytes = layer.q.nbytes + values + 4 * case.rank * (case.n + case.k)

    def ours(i: int) -> Callable[[], object]:
        return lambda: nf4.linear_lora(x, qs[i], a, b, LORA_SCALING)

    def dense_lora(w: Tensor) -> Callable[[], object]:
        return lambda: _dense_lora(x, w, a, b)

    contenders = [
        *_ours(bench, ours, len(qs)),
        Contender("torch_dense", [_dense(x, w) for w in dense], partial=True),
        Contender("torch_dense_lora", [dense_lora(w) for w in dense]),
        *peers.linear_lora_forward(case, layer, inputs, bench),
    ]
    return Workload(
        case,
        contenders,
        _compute_probe(bench, case, flops),
        nbytes,
        flops,
        _lora_expected(inputs, layer.w32)[:1],
        yardstick="torch_dense_lora",
        factor=ERROR_FACTOR[case.dtype],
    )


def overhead(case: Case, layer: Layer, bench: Bench) -> Workload:
    """The forward of a layer so small that only the call costs anything."""
    workload = linear(case, layer, bench)
    return replace(workload, probes=(), nbytes=0, flops=0)
