"""Shape -> configuration of the Triton kernels, as plain data with the reason beside it.

Where a figure of an H200 stands beside a configuration, it was timed there; the others follow from
counted bytes, registers and instructions (benchmarks/results/triton_static.csv). What ``nf4 tune``
measured on the user's own device (``tuning_table``) comes first.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cache, lru_cache

from nf4.backends import tuning_table
from nf4.backends.tuning_table import Key, MatmulConfig

SUM_BLOCK = 1024  # elements of a program that adds partial sums: 8 a thread, two 16-byte loads


@dataclass(frozen=True)
class Target:
    """The device that a launch is planned for."""

    capability: int  # 90 for compute capability 9.0
    sm_count: int
    name: str = ""  # of the device in a user's table; empty: the built-in rules alone


@dataclass(frozen=True)
class Shape:
    """A product of ``m`` rows with a quantized weight [n, k]."""

    m: int
    n: int
    k: int
    block_size: int
    aligned: bool  # 4-bit codes, and no block crosses rows
    itemsize: int  # of the activations


@dataclass(frozen=True)
class ElementwiseConfig:
    """A program handles ``tile`` elements, whole blocks."""

    tile: int
    num_warps: int


@dataclass(frozen=True)
class RowConfig:
    """Tiles of the kernel for a single row of x."""

    block_n: int
    block_k: int
    num_warps: int


@dataclass(frozen=True)
class DoubleQuantizeConfig:
    chunks: int  # chunks of 256 scales that a program of the first kernel adds
    blocks: int  # blocks of 256 that a program of the second kernel encodes
    sums: int  # chunk sums that are added at a time
    num_warps: int


def quantize() -> ElementwiseConfig:
    """32 elements a thread: for 14336 x 4096 of bfloat16 on an H200 38 us, and 41 with 64."""
    return ElementwiseConfig(tile=4096, num_warps=4)


def dequantize() -> ElementwiseConfig:
    """Eight 4-byte loads a thread, all in flight before the first store; 11 instructions an element
    on sm_90 (12 with four loads, 14 with two).
    """
    return ElementwiseConfig(tile=8192, num_warps=4)


def double_quantize() -> DoubleQuantizeConfig:
    """A warp a chunk, and a warp a block."""
    return DoubleQuantizeConfig(chunks=4, blocks=4, sums=1024, num_warps=4)


def _ceil_pow2(x: int) -> int:
    return 1 << max(x - 1, 0).bit_length()


def _floor_pow2(x: int) -> int:
    return 1 << max(x, 1).bit_length() - 1


def lora_tile(r: int) -> int:
    """Columns of a LoRA tile: a matrix instruction takes 16 at least; more than 64 go in a loop."""
    return min(max(_ceil_pow2(r), 16), 64)


def up_tile(r: int) -> int:
    """The same for the up-projection, which shares its registers with a tile of the output."""
    return min(lora_tile(r), 32)


def tensor_cores(itemsize: int, target: Target) -> bool:
    """Whether Triton multiplies this type on tensor cores.

    Triton 3.9 emits no matrix instruction below compute capability 8.0 (seen in its PTX for 7.5),
    and float32 products must not be rounded to TF32.
    """
    return itemsize == 2 and target.capability >= 80


@lru_cache
def _split(
    programs: int,
    steps: int,
    partial_bytes: int,
    weight_bytes: int,
    sm_count: int,
    resident: int = 4,
) -> int:
    """Parts of the reduction: a power of two.

    At least four steps a part, so that the pipeline fills, and no more bytes of partial sums,
    written and read once, than bytes of weights. Within that, the fewest steps on the busiest SM
    (112 tiles of 64 steps on 132 SMs: 64 in 4 parts, 56 in 8), and ``resident`` programs an SM
    where that costs none, so that enough loads are in flight.
    """
    by_device = max(8, resident) * sm_count // programs
    by_steps = steps // 4
    by_bytes = weight_bytes // (2 * partial_bytes)
    most = _floor_pow2(min(by_device, by_steps, by_bytes, 64))

    def cost(split: int) -> tuple[int, bool, int]:
        busiest = -(-programs * split // sm_count) * -(-steps // split)
        return busiest, programs * split > resident * sm_count, -split

    return min((1 << i for i in range(most.bit_length())), key=cost)


# (largest m, block_m, block_n, warps). Weights are decoded once a tile of block_m tokens, so that
# tiles are as tall as registers allow.
_LINEAR = (
    (8, 8, 128, 4),
    (16, 16, 128, 4),
    (32, 32, 128, 4),
    (None, 64, 128, 4),
)
# Where the accumulators of mma.sync would leave no registers: 8.9 instructions a weight for 128
# tokens, for 5.8 to 6.0 twice.
_LINEAR_WIDE = (128, 128, 8)
# (block_n, warps) for up to 8 tokens: mma.sync in many programs of one warp, which do not wait for
# each other. On an H200 24 us for 14336 x 4096, where wgmma takes 30.
_LINEAR_FEW_90 = (32, 1)
# Fused, a weight costs about 7 instructions for each tile of 64 tokens and 0.52 bytes; through a
# workspace 4.6 bytes more and none. By the rates of H200 and A100 the two meet between 256 and 512
# tokens (counted, not timed).
_LINEAR_FUSED_ROWS = 256
# An H200 takes 110 and 166 us fused for 128 and 256 tokens (14336 x 4096), and 40 us to unpack plus
# 35 and 45 us in cuBLAS; for 64 tokens 46 us, and 40 plus 34 us.
_LINEAR_FUSED_ROWS_90 = 64
# Weights are scaled one by one and pass through shared memory, about three times the instructions.
_BACKWARD_FUSED_ROWS = 64
# Without tensor cores every token costs a multiply-add a weight; a workspace costs 4.6 bytes.
_PLAIN_FUSED_ROWS = 8


def linear(shape: Shape, target: Target) -> MatmulConfig | None:
    """How to multiply packed weights, or None: dequantize to a workspace, then a dense product.

    None is also the general path of weights whose blocks cross rows, and of 8-bit codes.
    """
    if not shape.aligned:
        return None
    key = Key("linear", shape.n, shape.k, shape.itemsize, shape.block_size)
    found, tuned = tuning_table.find(target.name, key, shape.m)
    if found:
        return tuned
    weight_bytes = shape.n * shape.k // 2
    if tensor_cores(shape.itemsize, target):
        if shape.m > (_LINEAR_FUSED_ROWS_90 if target.capability == 90 else _LINEAR_FUSED_ROWS):
            return None
        _, block_m, block_n, warps = next(c for c in _LINEAR if c[0] is None or shape.m <= c[0])
        if shape.m > 64 and target.capability == 100:
            block_m, block_n, warps = _LINEAR_WIDE
        if shape.m <= 8 and target.capability == 90:
            block_n, warps = _LINEAR_FEW_90
        block_k, stages = min(shape.block_size, 64), 4
    elif shape.m <= _PLAIN_FUSED_ROWS:
        block_m, block_n, block_k, warps, stages = 8, 32, 32, 4, 2
    else:
        return None
    programs = -(-shape.n // block_n) * -(-shape.m // block_m)
    partial_bytes = 4 * shape.m * shape.n
    split = _split(
        programs,
        shape.k // block_k,
        partial_bytes,
        weight_bytes,
        target.sm_count,
        resident=16 if warps == 1 else 4,
    )
    # Only wgmma takes weights from registers in an order that a permuted reduction makes wide:
    # 5.9 for 6.4 instructions a weight on sm_90 with 64 tokens (static counts).
    permute = target.capability == 90 and tensor_cores(shape.itemsize, target) and warps >= 4
    return MatmulConfig(block_m, block_n, block_k, warps, stages, split, permute)


def linear_row(shape: Shape) -> RowConfig | None:
    """How to multiply packed weights with a single row, or None: as ``linear`` says.

    Each thread multiplies 256 weights a step with 32 values of x, eight rows of 16 bytes.
    """
    if shape.m != 1 or not shape.aligned or shape.itemsize != 2:
        return None
    return RowConfig(block_n=8, block_k=1024, num_warps=1)


def twice(config: MatmulConfig, itemsize: int, target: Target) -> bool:
    """Whether ``linear`` multiplies a tile of weights with its tokens in two halves: where it has
    64 and mma.sync (not wgmma or tcgen05) would lay warps in a square.
    """
    square = tensor_cores(itemsize, target) and target.capability not in (90, 100)
    return square and config.block_m == 64


def linear_backward(shape: Shape, target: Target) -> MatmulConfig | None:
    """How to multiply a gradient with packed weights, or None: through a workspace."""
    if not shape.aligned:
        return None
    key = Key("linear_backward", shape.n, shape.k, shape.itemsize, shape.block_size)
    found, tuned = tuning_table.find(target.name, key, shape.m)
    if found:
        return tuned
    if tensor_cores(shape.itemsize, target):
        if shape.m > _BACKWARD_FUSED_ROWS:
            return None
        block_m = max(16, _ceil_pow2(shape.m))
        block_n, block_k, warps, stages = 64, min(shape.block_size, 64), 4, 3
        if target.capability == 120 and block_m == 16:
            block_n = 128  # with 64 rows, 80 registers are held and one spills
    elif shape.m <= _PLAIN_FUSED_ROWS:
        block_m, block_n, block_k, warps, stages = 8, 32, 32, 4, 2
    else:
        return None
    programs = -(-shape.k // block_k) * -(-shape.m // block_m)
    split = _split(
        programs,
        -(-shape.n // block_n),
        4 * shape.m * shape.k,
        shape.n * shape.k // 2,
        target.sm_count,
    )
    return MatmulConfig(block_m, block_n, block_k, warps, stages, split)


def carries_lora(itemsize: int, target: Target) -> bool:
    """Whether Triton's dense product, with the LoRA term as more columns of the reduction, is to be
    preferred to the vendor's, which adds to a term written before.

    On an H200 it is not: a forward of 14336 x 4096 with 8192 tokens takes 1878 us that way, where
    cuBLAS takes 1389 and the term, written and read, 0.47 GB.
    """
    return tensor_cores(itemsize, target) and target.capability != 90


def dense(
    m: int, n: int, k: int, backward: bool, dropout: bool, itemsize: int, target: Target
) -> MatmulConfig:
    """Tiles of the dense product [m, k] x [k, n] with a LoRA term, which ``dropout`` masks.

    ``backward``: its [k, n] is the weight, else the weight's transpose.
    """
    key = Key("dense", n, k, itemsize)
    if backward:
        key = Key("dense_backward", k, n, itemsize, dropout=dropout)
    _, tuned = tuning_table.find(target.name, key, m)
    if tuned is not None:
        return tuned
    if not tensor_cores(itemsize, target):
        return MatmulConfig(32, 32, 32, num_warps=4, num_stages=2)
    if dropout and n % 4:
        # Every element then computes its own random words; 128 x 128 of them spill on sm_86.
        return MatmulConfig(64, 64, 32, num_warps=4, num_stages=3)
    if k == 0:
        # The term alone, for 2048 tokens and 14336 columns on an H200: 22 us, and 30 with the tiles
        # of a product.
        return MatmulConfig(64, 128, 32, num_warps=4, num_stages=1)
    # 128 accumulators a thread. Beside them random words spill on sm_80 and sm_90, and masks of a
    # ragged reduction on sm_90.
    wide = k % 64 == 0 and (not dropout or target.capability == 100)
    if target.capability in (90, 100):
        # Two steps of 128 x 256 in flight, or four of half their products, outlast a load from
        # memory. 256 columns are the widest instruction.
        if wide and not _spills_wide_accumulators():
            return MatmulConfig(128, 256, 64, num_warps=8, num_stages=3)
        return MatmulConfig(128, 128, 64, num_warps=8, num_stages=5)
    if target.capability == 80 and wide:
        return MatmulConfig(128, 256, 32, num_warps=8, num_stages=4)
    # 99 KiB of shared memory on sm_86, sm_89 and sm_120 hold two programs of 48 KiB.
    return MatmulConfig(128, 128, 32, num_warps=8, num_stages=4)


@cache
def _spills_wide_accumulators() -> bool:
    """Triton 3.7 spills 604 times where a thread holds 128 accumulators; 3.6, 3.8 and 3.9 do not
    (the dense kernel on sm_90, static counts).
    """
    import triton

    return triton.__version__.startswith("3.7.")


@lru_cache
def lora_down(m: int, k: int, r: int, itemsize: int, target: Target) -> MatmulConfig:
    """Tiles of x A^T; ``block_n`` tiles the rank."""
    block_n = lora_tile(r)
    if tensor_cores(itemsize, target):
        block_m = 16 if m <= 16 else 64
        # 64 columns of a float32 A take 32 KiB a stage with 128 rows, too much for sm_86. On sm_100
        # the random words of 64 x 128 elements spill.
        narrow = block_n == 64 or (target.capability == 100 and block_m == 64)
        block_k, warps, stages = 64 if narrow else 128, 4, 3
    else:
        block_m, block_k, warps, stages = 16, 32, 4, 2
    programs = -(-m // block_m) * -(-r // block_n)
    split = _split(programs, -(-k // block_k), 4 * m * r, itemsize * m * k, target.sm_count)
    return MatmulConfig(block_m, block_n, block_k, warps, stages, split)


@lru_cache
def lora_grad_y(m: int, n: int, r: int, itemsize: int, target: Target) -> MatmulConfig:
    """``lora_grad`` of the pass over grad_y, which writes partial sums of ds for each tile of n."""
    plan = lora_grad(m, n, r, False, itemsize, target)
    if target.capability != 90 or itemsize != 2 or lora_tile(r) == 64 or min(m, n) < 2048:
        return plan
    # With 512 columns 47 us for 2048 tokens of 14336 on an H200, 54 with 256, and 73 with 128.
    block_n = 512 if n >= 8192 else 256
    programs = -(-n // block_n)
    split = _split(programs, -(-m // plan.block_m), 4 * r, 2 * m, target.sm_count)
    # Two programs an SM, whose partial sums of dB cost more than a third one hides.
    split = min(split, _floor_pow2(2 * target.sm_count // programs))
    return replace(plan, block_n=block_n, num_warps=8, split=split)


@lru_cache
def lora_grad(
    m: int, features: int, r: int, dropout: bool, itemsize: int, target: Target
) -> MatmulConfig:
    """Tiles of the gradients of LoRA: ``block_n`` of the features, ``split`` slices of the rows."""
    if dropout and features % 4:
        # Every element computes its own random words; 64 x 128 of them spill on sm_90.
        block_m, block_n, warps, stages = 16, 64, 4, 2
    elif tensor_cores(itemsize, target):
        # Partial sums of ds take 8 r / block_n bytes an element of grad_y, a quarter at r = 16.
        block_m, block_n, warps, stages = 64, 128, 4, 2
        if lora_tile(r) == 64:
            # 64 rows, or the random words of 128 columns, spill beside an accumulator that wide.
            block_m, block_n = 32, 64 if dropout else 128
    else:
        # With 64 columns of the rank, four warps spill on sm_80.
        block_m, block_n, warps, stages = 16, 32, 8 if lora_tile(r) == 64 else 4, 2
    programs = -(-features // block_n) * -(-r // lora_tile(r))
    split = _split(programs, -(-m // block_m), 4 * r, itemsize * m, target.sm_count)
    return MatmulConfig(block_m, block_n, 0, warps, stages, split)
