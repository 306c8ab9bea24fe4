"""The Triton matmuls and their gradients with products and sums rounded apart, and in one.

A GPU launches each kernel both ways. The interpreter never fuses, so that here a product remembers
its factors and a sum that takes one is rounded once, as a fused multiply-add is.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from cases import DTYPES, Lora, Matmul, dtype_id
from test_linear_lora import Bound, Inputs

import nf4
from nf4.backends import triton_launch

pytest.importorskip("triton")

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = torch.device("cpu" if INTERPRETED else "cuda")
pytestmark = pytest.mark.skipif(
    not INTERPRETED and not torch.cuda.is_available(), reason="needs a GPU or TRITON_INTERPRET=1"
)


class Contraction:
    """Sums of the interpreter that take a product unrounded; counts their elements."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        from triton.runtime.interpreter import InterpreterBuilder

        triton_launch.repair_interpreter()
        self.elements = 0
        multiply = InterpreterBuilder.create_fmul

        def remembered(builder: Any, a: Any, b: Any) -> Any:
            product = multiply(builder, a, b)
            product.factors = a, b
            return product

        monkeypatch.setattr(InterpreterBuilder, "create_fmul", remembered)
        for name, sign in (("create_fadd", 1.0), ("create_fsub", -1.0)):
            plain = getattr(InterpreterBuilder, name)
            monkeypatch.setattr(InterpreterBuilder, name, self._fused(plain, sign))

    def _fused(self, plain: Callable, sign: float) -> Callable:
        def add(builder: Any, a: Any, b: Any) -> Any:
            result = plain(builder, a, b)
            first, second = (getattr(t, "factors", None) for t in (a, b))
            if result.data.dtype == np.float32 and (first or second):
                # Products of two float32 are exact in float64.
                exact = [_wide(t, factors) for t, factors in ((a, first), (b, second))]
                if first and second:  # one of the two products is rounded
                    exact[1] = _wide(b, None)
                result.data = (exact[0] + sign * exact[1]).astype(np.float32)
                self.elements += result.data.size
            return result

        return add


def _wide(t: Any, factors: tuple[Any, Any] | None) -> np.ndarray:
    if factors is None:
        return np.asarray(t.data, np.float64)
    return np.asarray(factors[0].data, np.float64) * np.asarray(factors[1].data, np.float64)


@pytest.fixture(params=[False, True], ids=["rounded", "fused"])
def contraction(
    request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Contraction | None]:
    """The matmul kernels without fused multiply-adds, then with."""
    made = None
    if INTERPRETED and request.param:
        made = Contraction(monkeypatch)
    if not INTERPRETED:
        from nf4.backends import triton_lora, triton_matmul

        launch = partial(triton_launch.launch, exact=not request.param)
        for module in (triton_lora, triton_matmul):
            monkeypatch.setattr(module, "launch", launch)
    with nf4.use_backend("triton"):
        yield made


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
@pytest.mark.parametrize("m, k", [(8, 512), (40, 96), (300, 64)])
def test_matmul_and_gradients(
    m: int, k: int, dtype: torch.dtype, contraction: Contraction | None
) -> None:
    """Fused, split and through a workspace: the bound of ``numerics`` holds both ways."""
    base = Matmul((m,), 48, k, block_size=32, nested=True, bias=True)
    i = Inputs.random(Lora(base, dtype, 16, torch.float32, dropout_p=0.25), DEVICE)
    bound = Bound(i)

    y, s = i.forward()
    dx, da, db = i.backward(bound.exact.s.float())

    n, r = base.n, i.case.r
    bound.check("s", s, samples=r * min(m, k), terms=k)
    bound.check("y", y, samples=min(m * r, n * min(m, k)), terms=k)
    bound.check("dx", dx, samples=min(m * r, k * min(m, n)), terms=n)
    bound.check("da", da, samples=r * min(m, k), terms=max(m, n))
    bound.check("db", db, samples=r * min(m, n), terms=max(m, k))
    assert contraction is None or contraction.elements > 0
