"""``NF4Config``: how the weights of a model are quantized."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from nf4.formats import BLOCK_SIZES, WEIGHT_FORMATS


@dataclass
class NF4Config:
    """Quantization settings of a model; the defaults are QLoRA's (arXiv:2305.14314, section 3).

    ``compute_dtype`` None computes in the dtype of each layer's input. ``modules_to_not_convert``
    lists module names (a whole name, or its last components) that stay 16-bit; None keeps the
    output head. Raises ValueError for values that do not exist.
    """

    block_size: int = 64
    double_quant: bool = True
    compute_dtype: torch.dtype | None = None
    modules_to_not_convert: list[str] | None = None
    format: str = "nf4"

    def __post_init__(self) -> None:
        if self.block_size not in BLOCK_SIZES:
            raise ValueError(
                f"nf4.NF4Config: block_size must be one of "
                f"{', '.join(map(str, BLOCK_SIZES))}, got {self.block_size}"
            )
        if self.format not in WEIGHT_FORMATS:
            raise ValueError(
                f"nf4.NF4Config: format must be one of {', '.join(WEIGHT_FORMATS)}, "
                f"got {self.format!r}"
            )
        if isinstance(self.compute_dtype, str):
            self.compute_dtype = getattr(torch, self.compute_dtype)

    def layer_kwargs(self) -> dict[str, Any]:
        """The keyword arguments that a layer's ``from_linear`` takes."""
        return {
            "block_size": self.block_size,
            "double_quant": self.double_quant,
            "format": self.format,
            "compute_dtype": self.compute_dtype,
        }
