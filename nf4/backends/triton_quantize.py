"""The ops of quantization on the Triton kernels."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from nf4 import formats
from nf4.backends import tuning
from nf4.backends.triton_launch import (
    bucket_table,
    decoder,
    kernel,
    lane_encoder,
    lane_table,
    launch,
    threshold_table,
    value_table,
)
from nf4.backends.triton_matmul import cdiv

_MAP = formats.DYNAMIC8.id


def quantize(x: Tensor, block_size: int, format: int) -> tuple[Tensor, Tensor]:
    """One launch: packed uint8 [bytes, 1] and float32 absmax [blocks] of the flattened x."""
    fmt = formats.BY_ID[format]
    flat = x.detach().contiguous().view(-1)
    if flat.dtype is torch.float64:
        flat = flat.float()
    n = flat.numel()
    packed = flat.new_empty((fmt.packed_bytes(n), 1), dtype=torch.uint8)
    absmax = flat.new_empty(cdiv(n, block_size), dtype=torch.float32)
    if n == 0:
        return packed, absmax
    config = tuning.quantize()
    blocks = config.tile // block_size
    encoder: dict[str, Any] = {"ASM": None, "CONSTRAINTS": None}
    lanes = lane_table(format, flat.device) if fmt.bits == 4 else None
    if lanes is not None:
        table, encoder = lanes, lane_encoder()
    elif fmt.bits == 4:
        table = bucket_table(format, flat.device)
    else:
        table = threshold_table(format, flat.device)
    launch(
        kernel("quantize", "quantize_kernel"),
        (cdiv(n, blocks * block_size),),
        {
            "x_ptr": flat,
            "table_ptr": table,
            "packed_ptr": packed,
            "absmax_ptr": absmax,
            "numel": n,
            "bytes_": packed.numel(),
            "BLOCK_SIZE": block_size,
            "BLOCKS": blocks,
            "BUCKETS": table.numel() // 4 if fmt.bits == 4 else None,
            "PAIRS": n % 2 == 0 and flat.data_ptr() % (2 * flat.itemsize) == 0,
            "SHORT": fmt.bits == 4 and n % block_size != 0,
            **encoder,
        },
        flat.device,
        num_warps=config.num_warps,
        exact=True,
    )
    return packed, absmax


def double_quantize(absmax: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Two launches: uint8 codes [n], float32 nested_absmax [ceil(n / 256)], float32 offset []."""
    absmax = absmax.detach().contiguous()
    n, device = absmax.numel(), absmax.device
    result = torch.empty_like(absmax, dtype=torch.uint8)
    nested = absmax.new_empty(cdiv(n, formats.NESTED_BLOCK_SIZE))
    if n == 0:
        return result, nested, absmax.new_zeros(())
    offset = absmax.new_empty(())
    config = tuning.double_quantize()
    chunks = cdiv(n, formats.OFFSET_CHUNK)
    sums = absmax.new_empty(chunks, dtype=torch.float64)
    launch(
        kernel("double_quantize", "chunk_sums_kernel"),
        (cdiv(chunks, config.chunks),),
        {
            "absmax_ptr": absmax,
            "sums_ptr": sums,
            "n": n,
            "CHUNK": formats.OFFSET_CHUNK,
            "CHUNKS": config.chunks,
        },
        device,
        num_warps=config.num_warps,
        exact=True,
    )
    launch(
        kernel("double_quantize", "double_quantize_kernel"),
        (cdiv(nested.numel(), config.blocks),),
        {
            "absmax_ptr": absmax,
            "sums_ptr": sums,
            "threshold_ptr": threshold_table(_MAP, device),
            "codes_ptr": result,
            "nested_ptr": nested,
            "offset_ptr": offset,
            "n": n,
            "chunks": chunks,
            "BLOCKS": config.blocks,
            "SUMS": config.sums,
        },
        device,
        num_warps=config.num_warps,
        exact=True,
    )
    return result, nested, offset


def dequantize(
    packed: Tensor,
    absmax: Tensor,
    nested_absmax: Tensor | None,
    offset: Tensor | None,
    shape: list[int],
    block_size: int,
    format: int,
    dtype: torch.dtype,
) -> Tensor:
    """One launch: a new tensor of ``shape`` and ``dtype``."""
    out = torch.empty(shape, dtype=dtype, device=packed.device)
    dequantize_out(packed, absmax, nested_absmax, offset, block_size, format, out)
    return out


def dequantize_out(
    packed: Tensor,
    absmax: Tensor,
    nested_absmax: Tensor | None,
    offset: Tensor | None,
    block_size: int,
    format: int,
    out: Tensor,
) -> None:
    """One launch into ``out``; through a new tensor where ``out`` is strided."""
    n = out.numel()
    if n == 0:
        return
    target = (
        out if out.is_contiguous() else torch.empty_like(out, memory_format=torch.contiguous_format)
    )
    config = tuning.dequantize()
    blocks = config.tile // block_size
    fmt = formats.BY_ID[format]
    launch(
        kernel("dequantize", "dequantize_kernel"),
        (cdiv(n, blocks * block_size),),
        {
            "packed_ptr": packed.contiguous(),
            "absmax_ptr": absmax.contiguous(),
            "nested_ptr": nested_absmax,
            "offset_ptr": offset,
            "map_ptr": value_table(_MAP, out.device),
            "table_ptr": value_table(format, out.device) if fmt.bits == 8 else None,
            "out_ptr": target,
            "numel": n,
            "bytes_": fmt.packed_bytes(n),
            "BLOCK_SIZE": block_size,
            "BLOCKS": blocks,
            **decoder(format, torch.float32),
        },
        out.device,
        num_warps=config.num_warps,
        exact=True,
    )
    if target is not out:
        out.copy_(target)
