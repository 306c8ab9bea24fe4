"""The Triton AdamW step compiled ahead of time: no spills, and 16-byte accesses."""

from __future__ import annotations

import os

import pytest
import torch
from test_adamw_step import hyper_tensor, random_arguments

pytest.importorskip("triton")

pytestmark = pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") == "1",
    reason="compiling Triton kernels needs a process without TRITON_INTERPRET=1",
)


@pytest.mark.parametrize(
    ("arch", "dtype", "bits", "stochastic"),
    [
        (80, torch.float32, 8, False),
        (90, torch.float32, 8, False),
        (90, torch.bfloat16, 8, True),
        (90, torch.float32, 32, False),
        (120, torch.float32, 8, False),
    ],
)
def test_compiles(arch: int, dtype: torch.dtype, bits: int, stochastic: bool) -> None:
    from benchmarks.triton_static import SM_COUNT, allowed_spills, measure
    from nf4.backends import triton
    from nf4.backends.triton_launch import recording
    from nf4.backends.tuning import Target

    args = random_arguments((5000, 70_000), dtypes=(dtype,), bits=(bits,))
    seed = torch.tensor([3]) if stochastic else None
    with recording(Target(arch, SM_COUNT[arch])) as launches:
        args.call(triton.adamw_step, hyper_tensor(1), seed, torch.zeros(1, dtype=torch.int64))
    (launch,) = launches  # both parameters in one
    row = measure("adamw", launch, arch)
    assert row.spills <= allowed_spills(row)
    # Loads of parameter, gradient and moments, and stores of what is written, where 16 bytes a
    # thread are eight 16-bit or four 32-bit elements. Eight codes are eight bytes.
    assert row.wide_accesses >= (3 if dtype is torch.bfloat16 else 6)
