"""Launchers of the Triton matmul kernels: flattened inputs, one weight, plans from ``tuning``."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from nf4 import formats
from nf4.backends import tuning
from nf4.backends.triton_launch import (
    decoder,
    dot_decoder,
    kernel,
    launch,
    target_of,
    value_table,
)

_MAP = formats.DYNAMIC8.id


def cdiv(a: int, b: int) -> int:
    """``a / b`` rounded up."""
    return -(-a // b)


@dataclass(frozen=True)
class Weight:
    """A quantized weight [n, k]."""

    packed: Tensor
    absmax: Tensor
    nested_absmax: Tensor | None
    offset: Tensor | None
    n: int
    k: int
    block_size: int
    format: int

    def pointers(self) -> dict[str, Tensor | None]:
        """The kernel arguments that hold the weight."""
        return {
            "packed_ptr": self.packed.contiguous(),
            "absmax_ptr": self.absmax.contiguous(),
            "nested_ptr": self.nested_absmax,
            "offset_ptr": self.offset,
            "map_ptr": value_table(_MAP, self.packed.device),
        }

    def shape(self, m: int, dtype: torch.dtype) -> tuning.Shape:
        """What tuning needs to know of a product with ``m`` rows."""
        aligned = self.k % self.block_size == 0 and formats.BY_ID[self.format].bits == 4
        return tuning.Shape(m, self.n, self.k, self.block_size, aligned, dtype.itemsize)


@dataclass(frozen=True)
class Dropout:
    """Which elements of x are dropped; ``seed`` None for none, else one for each member."""

    seed: Tensor | None = None
    p: float = 0.0

    @classmethod
    def of(cls, p: float, seed: Tensor | None) -> Dropout:
        """No dropout unless both are given, as the reference has it."""
        return cls() if p == 0.0 or seed is None else cls(seed, p)

    def member(self, index: int) -> Dropout:
        """The dropout of one member of a group."""
        return self if self.seed is None else Dropout(self.seed[index : index + 1], self.p)

    @property
    def factor(self) -> float:
        """The multiplier of kept elements."""
        return 1.0 / (1.0 - self.p)

    @property
    def threshold(self) -> int:
        """The smallest random word that is kept, as the int32 with its bits."""
        word = min(round(self.p * 2**32), 2**32 - 1)
        return word - 2**32 if word >= 2**31 else word

    def arguments(self, features: int) -> dict[str, Any]:
        """The kernel arguments for a tensor with ``features`` columns."""
        return {
            "seed_ptr": self.seed,
            "threshold": self.threshold,
            "factor": self.factor,
            "WHOLE": features % 4 == 0,
        }


def _language(dtype: torch.dtype) -> Any:
    import triton.language as tl

    names = {torch.float32: tl.float32, torch.float16: tl.float16, torch.bfloat16: tl.bfloat16}
    return names[dtype]


def products(dtype: torch.dtype, device: torch.device) -> dict[str, Any]:
    """The dtype that products are taken in, and the precision of float32 ones."""
    # Below compute capability 8.0 bfloat16 has no arithmetic.
    wide = dtype is torch.float32 or (dtype is torch.bfloat16 and target_of(device).capability < 80)
    compute = torch.float32 if wide else dtype
    return {"DTYPE": _language(compute), "PRECISION": "ieee" if wide else None}


def sum_partials(
    partial: Tensor,
    shape: tuple[int, ...],
    dtype: torch.dtype,
    factor: float,
    bias: Tensor | None,
    out: Tensor | None = None,
) -> Tensor:
    """``factor`` times the sum over the first dimension, in order, plus bias.

    The parts are contiguous, and may lie in a larger buffer.
    """
    if out is None:
        out = torch.empty(shape, dtype=dtype, device=partial.device)
    launch(
        kernel("linear", "sum_partials_kernel"),
        (cdiv(out.numel(), tuning.SUM_BLOCK),),
        {
            "partial_ptr": partial,
            "bias_ptr": bias,
            "out_ptr": out,
            "numel": out.numel(),
            "stride": partial.stride(0),
            "N": shape[-1],
            "factor": factor,
            "COUNT": partial.shape[0],
            "BLOCK": tuning.SUM_BLOCK,
        },
        partial.device,
    )
    return out


def _output(x: Tensor, features: int, split: int) -> Tensor:
    """The result [M, features] in x's dtype, or float32 partial sums [split, M, features]."""
    if split == 1:
        return x.new_empty(x.shape[0], features)
    return x.new_empty(split, x.shape[0], features, dtype=torch.float32)


def fused_linear(
    x: Tensor,
    w: Weight,
    config: tuning.MatmulConfig,
    bias: Tensor | None,
    s: Tensor | None = None,
    lora_b: Tensor | None = None,
    scaling: float = 0.0,
) -> Tensor:
    """x [M, K] times W^T from packed bytes, plus bias and scaling * s lora_b^T: [M, N]."""
    m, device = x.shape[0], x.device
    row = tuning.linear_row(w.shape(m, x.dtype))
    # Its loads of x are of two elements.
    if row is not None and x.data_ptr() % 4 == 0:
        return _linear_row(x, w, row, bias, s, lora_b, scaling)
    split = config.split
    out = _output(x, w.n, split)
    arithmetic = products(x.dtype, device)
    code_dtype = torch.float32 if arithmetic["PRECISION"] else x.dtype
    r = 1 if s is None else s.shape[1]
    launch(
        kernel("linear", "linear_kernel"),
        (cdiv(m, config.block_m), cdiv(w.n, config.block_n), split),
        {
            "x_ptr": x,
            **w.pointers(),
            "bias_ptr": bias if split == 1 else None,
            "s_ptr": s,
            "b_ptr": lora_b,
            "out_ptr": out,
            "M": m,
            "N": w.n,
            "K": w.k,
            "R": r,
            "scaling": scaling,
            "BLOCK_SIZE": w.block_size,
            "BLOCK_M": config.block_m,
            "BLOCK_N": config.block_n,
            "BLOCK_K": config.block_k,
            "BLOCK_R": tuning.up_tile(r),
            "SPLIT": split,
            "PERMUTE": config.permute,
            "TWICE": tuning.twice(config, x.dtype.itemsize, target_of(device)),
            **arithmetic,
            **decoder(w.format, code_dtype),
        },
        device,
        num_warps=config.num_warps,
        num_stages=config.num_stages,
    )
    return out if split == 1 else sum_partials(out, (m, w.n), x.dtype, 1.0, bias)


def _linear_row(
    x: Tensor,
    w: Weight,
    config: tuning.RowConfig,
    bias: Tensor | None,
    s: Tensor | None,
    lora_b: Tensor | None,
    scaling: float,
) -> Tensor:
    """``fused_linear`` of a single row."""
    out = x.new_empty(1, w.n)
    r = 1 if s is None else s.shape[1]
    launch(
        kernel("linear_row", "linear_row_kernel"),
        (cdiv(w.n, config.block_n),),
        {
            "x_ptr": x,
            **w.pointers(),
            "value_ptr": value_table(w.format, x.device),
            "bias_ptr": bias,
            "s_ptr": s,
            "b_ptr": lora_b,
            "out_ptr": out,
            "N": w.n,
            "K": w.k,
            "R": r,
            "scaling": scaling,
            "BLOCK_SIZE": w.block_size,
            "BLOCK_N": config.block_n,
            "BLOCK_K": config.block_k,
            "BLOCK_R": tuning.up_tile(r),
            "EVEN": w.k % config.block_k == 0,
            **dot_decoder(w.format),
        },
        x.device,
        num_warps=config.num_warps,
    )
    return out


def fused_backward(
    grad_y: Tensor,
    w: Weight,
    config: tuning.MatmulConfig,
    ds: Tensor | None = None,
    lora_a: Tensor | None = None,
    dropout: Dropout | None = None,
) -> Tensor:
    """grad_y [M, N] times W from packed bytes, plus mask(ds lora_a): [M, K]."""
    m, device = grad_y.shape[0], grad_y.device
    dropout = dropout or Dropout()
    split = config.split
    out = _output(grad_y, w.k, split)
    arithmetic = products(grad_y.dtype, device)
    code_dtype = torch.float32 if arithmetic["PRECISION"] else torch.float16
    r = 1 if ds is None else ds.shape[1]
    launch(
        kernel("linear_backward", "linear_backward_kernel"),
        (cdiv(w.k, config.block_k), cdiv(m, config.block_m), split),
        {
            "g_ptr": grad_y,
            **w.pointers(),
            "ds_ptr": ds,
            "a_ptr": lora_a,
            **dropout.arguments(w.k),
            "out_ptr": out,
            "M": m,
            "N": w.n,
            "K": w.k,
            "R": r,
            "BLOCK_SIZE": w.block_size,
            "BLOCK_M": config.block_m,
            "BLOCK_N": config.block_n,
            "BLOCK_K": config.block_k,
            "BLOCK_R": tuning.up_tile(r),
            "SPLIT": split,
            "CODE_DTYPE": _language(code_dtype),
            **arithmetic,
            **decoder(w.format, code_dtype),
        },
        device,
        num_warps=config.num_warps,
        num_stages=config.num_stages,
    )
    return out if split == 1 else sum_partials(out, (m, w.k), grad_y.dtype, 1.0, None)


def dense_lora(
    x: Tensor | None,
    w: Tensor | None,
    u: Tensor,
    v: Tensor,
    scaling: float,
    bias: Tensor | None,
    dropout: Dropout,
    dtype: torch.dtype,
) -> Tensor:
    """x [M, K] times w [K, N] plus mask(scaling * u v) plus bias: [M, N]; w and v may be strided.

    x and w None leave the LoRA term and the bias.
    """
    m, n = u.shape[0], v.shape[1]
    k = 0 if x is None else x.shape[1]
    backward = w is not None and w.stride(1) == 1
    masked = dropout.seed is not None
    config = tuning.dense(m, n, k, backward, masked, dtype.itemsize, target_of(u.device))
    out = torch.empty(m, n, dtype=dtype, device=u.device)
    launch(
        kernel("linear_lora", "dense_lora_kernel"),
        (cdiv(m, config.block_m) * cdiv(n, config.block_n),),
        {
            "x_ptr": out if x is None else x,
            "w_ptr": out if w is None else w,
            "u_ptr": u,
            "v_ptr": v,
            "bias_ptr": bias,
            **dropout.arguments(n),
            "out_ptr": out,
            "M": m,
            "N": n,
            "K": k,
            "R": u.shape[1],
            "stride_wk": 0 if w is None else w.stride(0),
            "stride_wn": 0 if w is None else w.stride(1),
            "stride_vr": v.stride(0),
            "stride_vn": v.stride(1),
            "scaling": scaling,
            "BLOCK_M": config.block_m,
            "BLOCK_N": config.block_n,
            "BLOCK_K": config.block_k,
            "BLOCK_R": tuning.up_tile(u.shape[1]),
            "GROUP": 8,
            "EVEN": k % config.block_k == 0,
            **products(dtype, u.device),
        },
        u.device,
        num_warps=config.num_warps,
        num_stages=config.num_stages,
    )
    return out
