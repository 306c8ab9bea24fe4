"""The accuracy bound of every matmul test, in one place.

A result may be off from float64 by at most ``RATIO`` times the error of the same computation by
``F.linear`` on the weight dequantized to x's dtype, measured in the same test on the same inputs.
Both errors are sums of independent roundings, so the ratio means something only over many of them:
a test on few elements also gets ``ALLOWANCE`` standard roundings divided by the root of their
number, which leaves 0.05 roundings over 4096 elements and three over one. A rounding here is that
of the dtype and a quarter of what a float32 sum in index order collects, which BLAS may avoid: on
8 elements of a 72-term float32 sum the ratio to F.linear reached 3.4 by chance.

``energy`` is the result of the same formula on squared inputs: the variance that each element has
for random signs. It is the scale of an element that cancellation does not shrink.
"""

from __future__ import annotations

import math

import torch
from cases import ROUNDING
from torch import Tensor

RATIO = {torch.float32: 2.0, torch.float16: 1.25, torch.bfloat16: 1.25}
ALLOWANCE = 3.0
# No single element may be off by more than this many roundings of its scale, so that one wrong
# element among a million fails; the largest of a million correct ones is off by about 6.
ELEMENT_ROUNDINGS = 16.0


def assert_accurate(
    name: str,
    got: Tensor,
    baseline: Tensor,
    exact: Tensor,
    energy: Tensor,
    *,
    dtype: torch.dtype,
    terms: int,
    samples: int,
) -> None:
    """Fail unless ``got`` is as close to ``exact`` as the bound above asks.

    ``dtype`` is the coarsest dtype that inputs and result are stored in, ``terms`` the length of
    the longest sum, and ``samples`` the number of independent roundings behind the result.
    """
    assert got.shape == exact.shape, f"{name}: shape {list(got.shape)}, not {list(exact.shape)}"
    if exact.numel() == 0:
        return
    assert torch.isfinite(got).all(), f"{name}: {(~torch.isfinite(got)).sum()} not finite"
    error = got.double() - exact
    scale = energy.sqrt()

    rounding = ROUNDING[dtype]
    summing = ROUNDING[torch.float32] * math.sqrt(terms)
    limit = ELEMENT_ROUNDINGS * (rounding + summing) * scale
    wrong = (error.abs() > limit).nonzero()
    assert wrong.numel() == 0, (
        f"{name}: {len(wrong)} of {exact.numel()} elements are wrong, first at {wrong[0].tolist()}:"
        f" {got[tuple(wrong[0])].item()}, exactly {exact[tuple(wrong[0])].item()}"
    )

    floor = ALLOWANCE * (rounding + summing / 4) * scale.norm().item() / math.sqrt(max(samples, 1))
    ours, theirs = error.norm().item(), (baseline.double() - exact).norm().item()
    assert ours <= RATIO[dtype] * theirs + floor, (
        f"{name}: error {ours / exact.norm().item():.3e}, that of F.linear "
        f"{theirs / exact.norm().item():.3e}, floor {floor / exact.norm().item():.3e}"
    )
