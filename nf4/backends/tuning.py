"""Shape -> configuration of the Triton kernels, as plain data with the reason beside it.

No configuration here was timed yet: each follows from counted bytes, registers and instructions
(benchmarks/results/triton_static.csv), and says so by naming no figure.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class ElementwiseConfig:
    """A program handles ``tile`` elements, whole blocks."""

    tile: int
    num_warps: int


@dataclass(frozen=True)
class DoubleQuantizeConfig:
    chunks: int  # chunks of 256 sums that a program of the first kernel adds, one a thread
    blocks: int  # blocks of 256 that a program of the second kernel encodes
    unroll: int  # loads in flight while the chunk sums are added in order
    num_warps: int


def quantize(block_size: int) -> ElementwiseConfig:
    """32 elements a thread: four 16-byte loads in flight, 20 instructions an element on sm_90
    (22 with 16 elements, 24 with 8).
    """
    return ElementwiseConfig(tile=max(4096, block_size), num_warps=4)


def dequantize(block_size: int) -> ElementwiseConfig:
    """Four 4-byte loads a thread, all in flight before the first store."""
    return ElementwiseConfig(tile=4096, num_warps=4)


def double_quantize() -> DoubleQuantizeConfig:
    """One warp a program spreads the serial sums over as many SMs as there are."""
    return DoubleQuantizeConfig(chunks=32, blocks=4, unroll=32, num_warps=4)
