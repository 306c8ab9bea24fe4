"""The Triton backend: the ops, launched on the kernels of ``kernels/``."""

from __future__ import annotations

from nf4.backends.triton_launch import unsupported
from nf4.backends.triton_linear import (
    linear,
    linear_backward,
    linear_lora,
    linear_lora_backward,
    linear_lora_group,
    linear_lora_group_backward,
)
from nf4.backends.triton_optim import adamw_step
from nf4.backends.triton_quantize import dequantize, dequantize_out, double_quantize, quantize

__all__ = [
    "NAME",
    "adamw_step",
    "dequantize",
    "dequantize_out",
    "double_quantize",
    "linear",
    "linear_backward",
    "linear_lora",
    "linear_lora_backward",
    "linear_lora_group",
    "linear_lora_group_backward",
    "quantize",
    "unsupported",
]

NAME = "triton"
