"""The CUDA C++ kernels of ``csrc/cuda``, registered from C++ at the CUDA dispatch key."""

from __future__ import annotations

import torch

NAME = "cuda"


def unsupported(device: torch.device) -> str | None:
    """Why this backend cannot run on ``device``, or None."""
    if device.type != "cuda":
        return "needs a CUDA tensor"
    return "the CUDA kernels are not built yet"
