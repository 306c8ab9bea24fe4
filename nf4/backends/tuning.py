"""Shape -> configuration of the Triton kernels, as plain data with the reason beside it.

No configuration here was timed yet: each follows from counted bytes, registers and instructions
(benchmarks/results/triton_static.csv), and says so by naming no figure.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class ElementwiseConfig:
    """A program handles ``steps`` tiles of ``tile`` elements each."""

    tile: int
    steps: int
    num_warps: int


@dataclass(frozen=True)
class DoubleQuantizeConfig:
    chunks: int  # chunks of 256 sums that a program of the first kernel adds, one a thread
    blocks: int  # blocks of 256 that a program of the second kernel encodes
    unroll: int  # loads in flight while the chunk sums are added in order
    num_warps: int


def quantize(block_size: int) -> ElementwiseConfig:
    """8 elements a thread: 16-byte loads of 16-bit inputs, 4-byte stores of their codes."""
    return ElementwiseConfig(tile=max(1024, block_size), steps=1, num_warps=4)


def dequantize(block_size: int) -> ElementwiseConfig:
    """8 elements a thread and step.

    A thread then loads 4 bytes of codes and stores 16 bytes of bfloat16, both contiguous over a
    warp, so that no data crosses threads; wider loads would need an exchange before the store.
    Four independent steps keep four loads in flight.
    """
    tile = max(1024, block_size)
    return ElementwiseConfig(tile=tile, steps=max(1, 4096 // tile), num_warps=4)


def double_quantize() -> DoubleQuantizeConfig:
    """One warp a program spreads the serial sums over as many SMs as there are."""
    return DoubleQuantizeConfig(chunks=32, blocks=4, unroll=32, num_warps=4)
