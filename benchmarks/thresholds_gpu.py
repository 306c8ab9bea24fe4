"""What the GPU kernels must reach against the GPU's own limits, bitsandbytes, PEFT and cuBLAS."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from benchmarks.findings import Cases, Finding, ratio
from benchmarks.results import Measurement

# Below this a launch, not the memory, decides; such shapes are stated and not held to a share.
SHARE_FROM_MS = 0.007
MODELS = {
    "14336x4096": "8B",
    "4096x14336": "8B",
    "4096x4096": "8B",
    "8192x8192": "70B",
    "28672x8192": "70B",
    "8192x28672": "70B",
}


@dataclass(frozen=True)
class Goal:
    """Least share of the limit, and the aim, of one op at the token counts ``tokens``."""

    op: str
    tokens: range
    least: float
    reach: float


@dataclass(frozen=True)
class Goals:
    """The goals of one backend. ``dense``: least cuBLAS time over ours, by token count."""

    shares: tuple[Goal, ...]
    dense: dict[int, tuple[float, float]]
    # Least bitsandbytes time over ours at M=64; None where no goal is set.
    bitsandbytes_m64: float | None
    # Least PEFT time over ours for forward and backward, by model.
    peft: dict[str, float]


GOALS = {
    "cuda": Goals(
        shares=(
            Goal("dequantize", range(0, 1), 0.90, 0.95),
            Goal("quantize_flat", range(0, 1), 0.85, 0.95),
            Goal("linear", range(1, 17), 0.75, 0.90),
            Goal("linear", range(32, 257), 0.70, 0.85),
        ),
        dense={2048: (1 / 1.20, 1 / 1.05), 8192: (1 / 1.10, 1 / 1.05)},
        bitsandbytes_m64=None,
        peft={"8B": 1.3, "70B": 1.12},
    ),
    "triton": Goals(
        shares=(
            Goal("dequantize", range(0, 1), 0.85, 0.95),
            Goal("quantize_flat", range(0, 1), 0.75, 0.90),
            Goal("linear", range(1, 2), 0.60, 0.75),
        ),
        dense={2048: (1 / 1.35, 1 / 1.10), 8192: (1 / 1.20, 1 / 1.10)},
        bitsandbytes_m64=3.0,
        peft={},
    ),
}


def findings(cases: Cases) -> Iterator[Finding]:
    """Every goal against what was measured; a share of a case that is too short is left out."""
    for case, contenders in cases.items():
        for backend, goals in GOALS.items():
            ours = contenders.get(f"nf4_{backend}")
            if ours is not None:
                yield from _of_case(cases, case, backend, goals, ours)


def _of_case(
    cases: Cases,
    case: tuple[str, str, int, str],
    backend: str,
    goals: Goals,
    ours: Measurement,
) -> Iterator[Finding]:
    op, shape, m, _ = case
    name = f"nf4_{backend}"
    what = f"{backend} {op} {shape}{f' M={m}' if m else ''}"
    for goal in goals.shares:
        if op == goal.op and m in goal.tokens and ours.limit_ms >= SHARE_FROM_MS:
            yield Finding(f"{what}, share of {ours.limit}", ours.share, goal.least, goal.reach, "")
    if op == "linear_lora_forward" and m in goals.dense:
        least, reach = goals.dense[m]
        yield ratio(cases, f"{what} / cuBLAS dense", case, "torch_dense", least, reach, name)
    if op == "linear" and m == 64 and goals.bitsandbytes_m64 is not None:
        least = goals.bitsandbytes_m64
        yield ratio(cases, f"{what} / bitsandbytes", case, "bitsandbytes", least, least, name)
    if op == "linear_lora" and MODELS.get(shape) in goals.peft:
        least = goals.peft[MODELS[shape]]
        yield ratio(cases, f"{what} / PEFT", case, "peft_bitsandbytes", least, least, name)
