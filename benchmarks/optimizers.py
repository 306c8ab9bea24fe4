"""The optimizer step: AdamW8bit against torch's fused AdamW and bitsandbytes' AdamW8bit."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from benchmarks.peaks import CpuPeaks
from benchmarks.workload import Bench, Case, Contender, Layer, Probe, Workload

_TENSOR_ROWS, _TENSOR_COLUMNS = 2000, 2000
_OPTIONS: dict[str, Any] = {"lr": 1e-3, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.01}
# fp32 parameter and gradient, 8-bit moments and their float32 scales per 256: read, then written.
_READ_BYTES = 4 + 4 + 2 + 2 * 4 / 256
_WRITTEN_BYTES = 4 + 2 + 2 * 4 / 256
# A dozen operations an element are far below the arithmetic rate: the step is a stream.
_CHECKED = 1 << 20


def _parameters(case: Case, bench: Bench, source: list[Tensor], gradients: list[Tensor]) -> list:
    parameters = [torch.nn.Parameter(s.clone()) for s in source]
    for p, g in zip(parameters, gradients, strict=True):
        p.grad = g
    return parameters


def _expected(source: Tensor, gradient: Tensor) -> Tensor:
    """The first tensor after one step, in float64."""
    p = torch.nn.Parameter(source.double())
    p.grad = gradient.double()
    torch.optim.AdamW([p], **_OPTIONS).step()
    return (p.detach() - source.double()).flatten()[:_CHECKED]


def adamw8bit(case: Case, layer: Layer, bench: Bench) -> Workload:
    """One step over ``case.n`` float32 parameters in tensors of four million."""
    from nf4.optim import AdamW8bit

    size = _TENSOR_ROWS * _TENSOR_COLUMNS
    shape = (_TENSOR_ROWS, _TENSOR_COLUMNS)
    count = max(1, case.n // size)
    source = [torch.randn(shape, device=bench.device) * 0.02 for _ in range(count)]
    gradients = [torch.randn(shape, device=bench.device) for _ in range(count)]

    def contender(name: str, optimizer: Callable[..., torch.optim.Optimizer]) -> Contender:
        parameters = _parameters(case, bench, source, gradients)
        first = optimizer(parameters, **_OPTIONS)
        start = source[0].double().flatten()[:_CHECKED]

        def outcome() -> Tensor:
            first.step()
            return parameters[0].detach().flatten()[:_CHECKED].double() - start

        return Contender(name, [first.step], ours=name == "nf4", capturable=False, outcome=outcome)

    contenders = [
        contender("nf4", AdamW8bit),
        contender("torch_fused", lambda p, **o: torch.optim.AdamW(p, fused=True, **o)),
    ]
    if "bitsandbytes" in bench.peers:
        import bitsandbytes as bnb

        contenders.append(contender("bitsandbytes", bnb.optim.AdamW8bit))
    elements = count * size
    nbytes = (_READ_BYTES + _WRITTEN_BYTES) * elements
    probes = []
    if isinstance(bench.peaks, CpuPeaks):
        # Of the whole step: one tensor's share would partly stay in the last-level cache.
        reads = torch.ones(round(_READ_BYTES * elements), dtype=torch.uint8)
        writes = torch.ones(round(_WRITTEN_BYTES * elements), dtype=torch.uint8)
        probes = [Probe("mix", [[v] for v in bench.peaks.mix(reads, writes)], 1.0)]
    return Workload(
        case,
        contenders,
        probes,
        nbytes,
        0,
        (_expected(source[0], gradients[0]),),
        yardstick="torch_fused",
        # The first update is exact up to float32 rounding: its moments were not yet in 8 bits.
        factor=8.0,
    )
