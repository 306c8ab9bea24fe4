"""More than 2^31 elements: 64-bit indexing. `pytest -m large`; needs about 12 GiB of memory."""

from __future__ import annotations

import pytest
import torch

import nf4
from nf4.ops import numel

BLOCK = 64


@pytest.mark.large
@pytest.mark.parametrize("format", ["nf4", "dynamic8"])
def test_more_than_two_to_the_31_elements(backend: str, device: torch.device, format: str) -> None:
    if backend == "reference":
        pytest.skip("the reference takes some ten times the memory")
    torch.use_deterministic_algorithms(False)  # its fill of fresh memory would double the work
    count = 2**31 + 5 * BLOCK + 17  # a short last block, and an odd count
    weight = torch.randn(2**22, device=device).bfloat16().repeat(count // 2**22 + 1)[:count]
    weight[-3 * BLOCK :] = torch.randn(3 * BLOCK, device=device).bfloat16()
    q = nf4.quantize(weight, BLOCK, double_quant=False, format=format)
    per_block = q.packed.numel() * BLOCK // numel(weight.shape) if format == "nf4" else BLOCK
    assert per_block in (BLOCK // 2, BLOCK)
    back = nf4.dequantize(q)
    for start in (0, 2**30, 2**31 - BLOCK, count // BLOCK * BLOCK - 2 * BLOCK):
        part = nf4.quantize(weight[start : start + 4 * BLOCK], BLOCK, False, format)
        first = start // BLOCK
        packed = q.packed[first * per_block :][: part.packed.numel()]
        assert torch.equal(packed, part.packed), start
        assert torch.equal(q.absmax[first:][: part.absmax.numel()], part.absmax), start
        assert torch.equal(back[start : start + 4 * BLOCK], nf4.dequantize(part)), start
