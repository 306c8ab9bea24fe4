"""Weights of more than 2^31 blocks in the Triton matmuls, in files that are all but empty."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from nf4 import formats
from nf4.backends import reference
from nf4.backends.tuning import MatmulConfig, Target

pytest.importorskip("triton")
pytestmark = pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") != "1", reason="needs TRITON_INTERPRET=1"
)

BLOCK = 32
N, K = 96, 2**30  # 3 * 2^30 blocks: the first of row 64 has the number 2^31
ROW_BLOCKS, ROW_BYTES = K // BLOCK, K // 2
# Where the kernels look, of each row: its first block.
FIRST = torch.arange(N) * ROW_BLOCKS


class Sparse:
    """Elements ``low`` .. ``high`` of an array, of which only what is written takes space."""

    def __init__(self, file: Path, dtype: type, low: int, high: int) -> None:
        self.array = np.memmap(file, dtype, "w+", shape=(high - low,))
        self.low = low

    def base(self) -> Tensor:
        """Element 0, as a tensor of one element: the interpreter copies what a tensor spans."""
        return torch.from_numpy(self.array[-self.low :][:1])

    def write(self, indices: Tensor, values: Tensor) -> None:
        self.array[indices.numpy() - self.low] = values.numpy()


def _weight(folder: Path, nested: bool) -> tuple[dict[str, Tensor | None], Tensor]:
    """The pointers of a weight whose first blocks are random, and those blocks' values."""
    packed, absmax = reference.quantize(torch.randn(N, BLOCK), BLOCK, formats.NF4.id)
    parts: tuple[Tensor | None, ...] = (absmax, None, None)
    pointers: dict[str, Tensor | None] = {"nested_ptr": None, "offset_ptr": None}
    # Below the scales there is room for an index that 32 bits made negative.
    low, high = -(2**31), N * ROW_BLOCKS
    if nested:
        codes = torch.randint(256, (N,), dtype=torch.uint8)
        # The first blocks lie in nested blocks of their own.
        inner, offset = torch.rand(N) + 0.5, torch.tensor(0.7)
        map = torch.from_numpy(formats.DYNAMIC8.values.copy())
        parts = (map[codes.long()] * inner + offset, None, None)
        nested_absmax = Sparse(folder / "nested", np.float32, low // 256, high // 256)
        nested_absmax.write(FIRST // 256, inner)
        pointers = {"nested_ptr": nested_absmax.base(), "offset_ptr": offset}
    scales = Sparse(folder / "scales", np.uint8 if nested else np.float32, low, high)
    scales.write(FIRST, codes if nested else absmax)
    bytes_ = Sparse(folder / "packed", np.uint8, 0, N * ROW_BYTES)
    columns = torch.arange(N)[:, None] * ROW_BYTES + torch.arange(BLOCK // 2)
    bytes_.write(columns, packed.view(N, BLOCK // 2))
    pointers |= {"packed_ptr": bytes_.base(), "absmax_ptr": scales.base()}
    values = reference.dequantize(packed, *parts, [N, BLOCK], BLOCK, formats.NF4.id, torch.float32)
    return pointers, values


def _run_first_program(launch: Any, pointers: dict[str, Tensor | None]) -> None:
    from nf4.backends.triton_launch import value_table

    table = value_table(formats.DYNAMIC8.id, torch.device("cpu"))
    launch.kernel[(1, 1, 1)](**{**launch.args, **pointers, "map_ptr": table})


@pytest.mark.parametrize("op", ["linear", "linear_backward"])
@pytest.mark.parametrize("nested", [False, True], ids=["plain", "nested"])
def test_more_than_two_to_the_31_blocks(op: str, nested: bool, tmp_path: Path) -> None:
    """The first tile of the reduction and of the output: the addresses of 96 rows of 2^30."""
    from nf4.backends.triton_launch import recording
    from nf4.backends.triton_matmul import Weight, fused_backward, fused_linear

    meta = {"device": "meta", "dtype": torch.uint8}
    weight = Weight(torch.empty(1, **meta), torch.empty(1, **meta), None, None, N, K, BLOCK, 0)
    with recording(Target(90, 132)) as launches:
        if op == "linear":
            config = MatmulConfig(8, 128, BLOCK, 4, 2, split=ROW_BLOCKS)  # one tile a program
            fused_linear(torch.empty(1, K, device="meta"), weight, config, None)
        else:
            config = MatmulConfig(8, 32, BLOCK, 4, 2)
            fused_backward(torch.empty(1, N, device="meta"), weight, config)
    pointers, values = _weight(tmp_path, nested)
    if op == "linear":
        x, out = torch.randn(1, BLOCK), torch.empty(1, N)
        _run_first_program(launches[0], {**pointers, "x_ptr": x, "out_ptr": out})
        expected = x.double() @ values.double().t()
    else:
        x, out = torch.randn(1, N), torch.empty(1, BLOCK)
        _run_first_program(launches[0], {**pointers, "g_ptr": x, "out_ptr": out})
        expected = x.double() @ values.double()
    torch.testing.assert_close(out.double(), expected, rtol=1e-5, atol=1e-5)
