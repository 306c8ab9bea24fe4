"""Launchers for the Triton kernels of ``kernels/``."""

from __future__ import annotations

import torch

NAME = "triton"


def unsupported(device: torch.device) -> str | None:
    """Why this backend cannot run on ``device``, or None."""
    if device.type != "cuda":
        return "needs a CUDA tensor"
    return "the Triton kernels are not built yet"
