"""The GPU sweep: Llama-3-8B and 70B layer shapes, most telling cases first, within a time budget.

``python -m benchmarks.gpu --csv FILE`` on a machine with a GPU; benchmarks/gpu.sh calls it.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from pathlib import Path

import torch

from benchmarks import peers, sweep
from benchmarks.workload import LORA_RANK, Case

# q/o, gate/up, down of the 8B model; q/o, gate/up, down of the 70B one.
SHAPES_8B = ((4096, 4096), (14336, 4096), (4096, 14336))
SHAPES_70B = ((8192, 8192), (28672, 8192), (8192, 28672))
# All token counts at the shape that most of a model's weights have; elsewhere those of the goals in
# thresholds_gpu.py. In all 72 cases, of about two seconds each with the peers.
TOKENS = (1, 4, 8, 16, 32, 64, 128, 256, 512, 2048, 8192)
FEW_TOKENS = (1, 16, 64, 256)
FIRST = (14336, 4096)


def cases() -> Iterator[Case]:
    """What a first reader asks comes first: a budget that ends early cuts the end."""
    yield from _layer(*FIRST, TOKENS)
    yield Case("quantize", *FIRST)
    for m in (1, 16):  # decoding with an adapter that is not merged
        yield Case("linear_lora_forward", *FIRST, m, rank=LORA_RANK)
    yield from _layer(8192, 8192, (1, 8, 16, 64, 256, 2048))
    yield Case("adamw8bit", 100_000_000, 1, 0, torch.float32)
    for n, k in (SHAPES_8B[0], SHAPES_70B[1], SHAPES_8B[2], SHAPES_70B[2]):
        yield from _layer(n, k, FEW_TOKENS)


def _layer(n: int, k: int, tokens: tuple[int, ...]) -> Iterator[Case]:
    for op in ("dequantize", "quantize_flat"):
        yield Case(op, n, k)
    for m in tokens:
        yield Case("linear", n, k, m)
    for m in (2048, 8192):
        yield Case("linear_lora_forward", n, k, m, rank=LORA_RANK)
        yield Case("linear_lora", n, k, m, rank=LORA_RANK)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--csv", type=Path, required=True)
    parser.add_argument("--seconds", type=float, default=190, help="start no case after this")
    args = parser.parse_args()
    if not torch.cuda.is_available():
        print("benchmarks.gpu: needs a CUDA device, torch sees none", file=sys.stderr)
        return 1
    bench = sweep.cuda_bench((), peers.installed())
    red, left_out = sweep.run_cases(bench, cases(), args.csv, 5, 0.02, (), args.seconds)
    for case in left_out:
        print(f"left out for time: {case}")
    if red:
        print(f"WRONG, and not timed: {'; '.join(red)}")
    return 1 if red else 0


if __name__ == "__main__":
    sys.exit(main())
