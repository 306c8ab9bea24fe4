"""``QuantizedWeight``: the storage that every module over a quantized weight shares."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from nf4 import functional
from nf4.formats import FORMATS, NESTED_BLOCK_SIZE
from nf4.tensor import QuantizedTensor

_STATISTICS = ("weight_absmax", "weight_nested_absmax", "weight_offset")


class QuantizedWeight(nn.Module):
    """A module with one frozen, blockwise quantized matrix ``weight`` ``[rows, columns]``.

    The packed codes are a uint8 Parameter (``weight``, ``[bytes, 1]``), the scales plain buffers
    (``weight_absmax``; ``weight_nested_absmax`` and ``weight_offset`` when double quantized), so
    state dicts, deepcopy, pickle, offloading and FSDP2 need nothing special. ``.half()`` and its
    like leave codes and scales as they are. ``load_state_dict`` also reads bitsandbytes' keys.
    A new instance holds zeros.
    """

    weight: nn.Parameter
    weight_absmax: Tensor
    weight_nested_absmax: Tensor | None
    weight_offset: Tensor | None

    def __init__(
        self,
        rows: int,
        columns: int,
        *,
        block_size: int,
        double_quant: bool,
        format: str,
        compute_dtype: torch.dtype | None,
        device: torch.device | str | None,
        dtype: torch.dtype | None,
    ) -> None:
        super().__init__()
        self.compute_dtype = compute_dtype
        count = rows * columns
        blocks = -(-count // block_size)
        scale_dtype = torch.uint8 if double_quant else torch.float32
        nested = torch.zeros(-(-blocks // NESTED_BLOCK_SIZE), dtype=torch.float32, device=device)
        offset = torch.zeros((), dtype=torch.float32, device=device)
        packed_bytes = FORMATS[format].packed_bytes(count)
        self.set_quantized(
            QuantizedTensor(
                torch.zeros(packed_bytes, 1, dtype=torch.uint8, device=device),
                torch.zeros(blocks, dtype=scale_dtype, device=device),
                nested if double_quant else None,
                offset if double_quant else None,
                torch.Size((rows, columns)),
                dtype or torch.get_default_dtype(),
                block_size,
                format,
            )
        )

    def set_quantized(self, q: QuantizedTensor) -> None:
        """Make ``q`` the weight; nothing is copied."""
        self.weight_shape, self.weight_dtype = q.shape, q.dtype
        self.block_size, self.format = q.block_size, q.format
        self.weight = nn.Parameter(q.packed, requires_grad=False)
        for name, value in zip(_STATISTICS, q.tensors[1:], strict=True):
            self.register_buffer(name, value)

    @property
    def q(self) -> QuantizedTensor:
        """The weight as a ``QuantizedTensor`` over the same memory."""
        # Every forward asks: nn.Module finds a buffer by name in 1.3 us, its dict in 0.04.
        buffers = self._buffers
        return QuantizedTensor(
            self.weight.detach(),
            buffers["weight_absmax"],  # type: ignore[arg-type]
            buffers["weight_nested_absmax"],
            buffers["weight_offset"],
            self.weight_shape,
            self.weight_dtype,
            self.block_size,
            self.format,
        )

    def dequantize(self, dtype: torch.dtype | None = None) -> Tensor:
        """The weight as ``[rows, columns]``, by default in the dtype quantized from."""
        return functional.dequantize(self.q, dtype)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> QuantizedWeight:
        # The scales are float32 whatever dtype the rest of the model is cast to.
        kept = {name: self._buffers.pop(name) for name in _STATISTICS}
        super()._apply(fn, recurse)
        for name, value in kept.items():
            if value is not None:
                moved = fn(value)
                value = moved if moved.dtype is value.dtype else value.to(moved.device)
            self._buffers[name] = value
        return self

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any
    ) -> None:
        if any(key.startswith(f"{prefix}weight.quant_state.") for key in state_dict):
            q = QuantizedTensor.from_state_dict(state_dict, f"{prefix}weight")
            if q.shape != self.weight_shape:
                raise ValueError(
                    f"nf4: {prefix}weight must have shape {list(self.weight_shape)}, "
                    f"got {list(q.shape)}"
                )
            for key in [k for k in state_dict if k.startswith(f"{prefix}weight.")]:
                del state_dict[key]
            # Storage of the file's layout, into which the loader then copies.
            self.set_quantized(q.empty_like(self.weight.device))
            for name, value in zip(("weight", *_STATISTICS), q.tensors, strict=True):
                if value is not None:
                    state_dict[prefix + name] = value
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)
