"""The native CPU kernels of ``csrc/cpu``, registered from C++ at the CPU dispatch key.

Importing this module loads ``nf4/_C.abi3.so``. There are no Python implementations here: with the
library loaded, ``nf4::<op>`` and ``nf4_cpu::<op>`` reach C++ without passing through Python.
"""

from __future__ import annotations

import ctypes
import sys
from pathlib import Path

import torch

NAME = "cpu"


def _library() -> Path | None:
    directory = Path(__file__).resolve().parent.parent
    return next(iter(sorted(directory.glob("_C.*.so"))), None)


def _load() -> str | None:
    """Load the native library; the reason why not, or None."""
    library = _library()
    if library is None and sys.platform != "linux":
        return f"the native CPU library is for Linux, this is {sys.platform}"
    if library is None:
        return "nf4 was installed without its native CPU library (no C++ compiler at build time)"
    try:
        torch.ops.load_library(str(library))
    except OSError as error:
        return f"the native CPU library does not load: {error}"
    return None


LOAD_ERROR = _load()


def unsupported(device: torch.device) -> str | None:
    """Why this backend cannot run on ``device``, or None."""
    if LOAD_ERROR is None and device.type != "cpu":
        return "needs a CPU tensor"
    return LOAD_ERROR


def isa() -> str | None:
    """The instruction set in use: ``portable``, ``avx2``, ``avx512`` or ``avx512_bf16``.

    None without the native library. It is the best that this machine has, at most what the
    environment variables ``NF4_CPU_ISA`` and ``ATEN_CPU_CAPABILITY`` allow.
    """
    library = _library()
    if LOAD_ERROR is not None or library is None:
        return None
    name = ctypes.CDLL(str(library)).nf4_cpu_isa
    name.restype = ctypes.c_char_p
    return name().decode()
