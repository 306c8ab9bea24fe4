"""The native CPU kernels of ``csrc/cpu``, registered from C++ at the CPU dispatch key.

Importing this module loads ``nf4/_C.abi3.so``. There are no Python implementations here: with the
library loaded, ``nf4::<op>`` and ``nf4_cpu::<op>`` reach C++ without passing through Python.
"""

from __future__ import annotations

from pathlib import Path

import torch

NAME = "cpu"


def _load() -> str | None:
    """Load the native library; the reason why not, or None."""
    directory = Path(__file__).resolve().parent.parent
    candidates = sorted(directory.glob("_C.*"))
    if not candidates:
        return "nf4 was installed without its native CPU library (no C++ compiler at build time)"
    try:
        torch.ops.load_library(str(candidates[0]))
    except OSError as error:
        return f"the native CPU library does not load: {error}"
    return None


LOAD_ERROR = _load()


def unsupported(device: torch.device) -> str | None:
    """Why this backend cannot run on ``device``, or None."""
    if device.type != "cpu":
        return "needs a CPU tensor"
    return LOAD_ERROR
