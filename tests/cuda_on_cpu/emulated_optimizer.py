"""The op ``adamw_step`` on CPU tensors by the emulated CUDA kernel; see emulated.py."""

from __future__ import annotations

import ctypes
from ctypes import c_int32, c_int64, c_void_p

from cuda_on_cpu.emulated import DTYPES, Library, _pointer, _workspace
from torch import Tensor


class Param(ctypes.Structure):
    """nf4_adamw_param of csrc/cuda/api.h."""

    _fields_ = [
        ("param", c_void_p),
        ("grad", c_void_p),
        ("state1", c_void_p),
        ("state2", c_void_p),
        ("absmax1", c_void_p),
        ("absmax2", c_void_p),
        ("numel", c_int64),
        ("offset", c_int64),
        ("param_dtype", c_int32),
        ("grad_dtype", c_int32),
    ]


def adamw_step(
    library: Library,
    params: list[Tensor],
    grads: list[Tensor],
    state1: list[Tensor],
    state2: list[Tensor],
    absmax1: list[Tensor],
    absmax2: list[Tensor],
    hyper: Tensor,
    seed: Tensor | None,
    offsets: list[int],
    skipped: Tensor,
) -> None:
    lists = (params, grads, state1, state2, absmax1, absmax2)
    rows = [
        Param(
            *map(_pointer, tensors), tensors[0].numel(), offset,
            DTYPES[tensors[0].dtype], DTYPES[tensors[1].dtype],
        )
        for *tensors, offset in zip(*lists, offsets, strict=True)
        if tensors[0].numel()
    ]  # fmt: skip
    table = (Param * len(rows))(*rows)
    size = library.size("adamw_step", c_int64(len(rows)))
    work = _workspace(size)
    written = [t for tensors in (params, *lists[2:]) for t in tensors]
    library.call(
        "adamw_step", table, c_int64(len(rows)), _pointer(hyper), _pointer(seed),
        _pointer(skipped), _pointer(work), None,
        reads=[*grads, hyper, seed], writes=[*written, skipped, work],
    )  # fmt: skip
