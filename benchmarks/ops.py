"""The registry: for each op its inputs, what it must move and compute, and who competes."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor

import nf4
from benchmarks import peers
from benchmarks.peaks import CpuPeaks
from benchmarks.workload import (
    BLOCK_SIZE,
    LORA_SCALING,
    Bench,
    Case,
    Contender,
    Layer,
    LoraInputs,
    Probe,
    Workload,
)
from nf4.formats import NF4


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
    variants = list(zip(*(bench.peaks.read(q.packed) for q in layer.qs), strict=True))
    return [Probe("read", variants, total / layer.q.packed.nbytes)]


def _compute_probe(bench: Bench, case: Case, flops: float) -> list[Probe]:
    if not isinstance(bench.peaks, CpuPeaks):
        return []
    if case.dtype is not torch.float32 and bench.peaks.has_dot_bf16:
        amount, call = bench.peaks.dot_burst()
        return [Probe("dot_bf16", [[call]], flops / amount)]
    amount, call = bench.peaks.fma_burst()
    return [Probe("fma_f32", [[call]], flops / amount)]


def quantize(case: Case, layer: Layer, bench: Bench) -> Workload:
    """bf16 weight to NF4 with double quantization."""
    count = bench.copies(layer.source.nbytes)
    weights = [layer.source, *(layer.source.clone() for _ in range(count - 1))]
    nbytes = layer.source.nbytes + layer.q.nbytes
    probes = []
    if isinstance(bench.peaks, CpuPeaks):
        target = torch.empty_like(layer.q.packed)
        variants = list(zip(*(bench.peaks.mix(w, target) for w in weights), strict=True))
        probes = [Probe("mix", variants, nbytes / (layer.source.nbytes + target.nbytes))]

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


def quantize_flat(case: Case, layer: Layer, bench: Bench) -> Workload:
    """The quantize kernel alone: no nested scales, no check for NaN, one launch."""
    count = bench.copies(layer.source.nbytes)
    weights = [layer.source, *(layer.source.clone() for _ in range(count - 1))]
    nbytes = layer.source.nbytes + layer.q.packed.nbytes + 4 * layer.q.absmax.numel()

    def make(i: int) -> Callable[[], object]:
        return lambda: getattr(torch.ops, nf4.backends.namespace()).quantize(
            weights[i], BLOCK_SIZE, NF4.id
        )

    contenders = [*_ours(bench, make, count), *peers.quantize(case, weights, bench, nested=False)]
    expected = torch.ops.nf4_reference.quantize(layer.source, BLOCK_SIZE, NF4.id)
    return Workload(case, contenders, (), nbytes, 0, expected, exact=True)


def _quantized_tensors(q: nf4.QuantizedTensor) -> tuple[Tensor, ...]:
    return tuple(t for t in q.tensors if t is not None)


def dequantize(case: Case, layer: Layer, bench: Bench) -> Workload:
    """Into a given buffer; the buffers rotate with the weights."""
    qs = layer.qs
    out_bytes = case.n * case.k * case.dtype.itemsize
    outs = [
        torch.empty(case.n, case.k, dtype=case.dtype, device=bench.device)
        for _ in range(max(2, bench.copies(out_bytes)))
    ]
    nbytes = layer.q.nbytes + out_bytes
    probes = []
    if isinstance(bench.peaks, CpuPeaks):
        streams = (
            bench.peaks.mix(qs[i % len(qs)].packed, outs[i % len(outs)]) for i in range(len(qs))
        )
        variants = list(zip(*streams, strict=True))
        probes = [Probe("mix", variants, nbytes / (layer.q.packed.nbytes + out_bytes))]

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
