"""The CUDA C++ kernels of ``csrc/cuda``, registered from C++ at the CUDA dispatch key.

``nf4/_C_cuda.abi3.so`` is loaded where a CUDA device is and the library was built for the
architecture of every device; else the key stays free, Triton takes the calls, and ``unsupported``
says why. It is loaded when first asked for, by a call on a CUDA tensor or a question for the
backends, not at import: to ask for devices is to initialize CUDA, after which a process that forks
leaves its child without.
"""

from __future__ import annotations

import mmap
from functools import cache
from pathlib import Path

import torch

NAME = "cuda"
# The ops that the library registers.
OPS = (
    "quantize",
    "double_quantize",
    "dequantize",
    "dequantize_out",
    "linear",
    "linear_backward",
    "linear_lora",
    "linear_lora_backward",
    "linear_lora_group",
    "adamw_step",
)


def _library() -> Path | None:
    directory = Path(__file__).resolve().parent.parent
    return next(iter(sorted(directory.glob("_C_cuda.*.so"))), None)


def runs_on(capability: tuple[int, int], architectures: tuple[str, ...]) -> bool:
    """Whether code built for ``architectures`` runs on a compute capability.

    Machine code runs on its own minor version and later ones; that of an architecture with a
    letter only on exactly its own.
    """
    for name in architectures:
        number = int(name.rstrip("af"))
        built = divmod(number, 10)
        if built == capability:
            return True
        if name.isdigit() and built[0] == capability[0] and built[1] < capability[1]:
            return True
    return False


def architectures(library: Path) -> tuple[str, ...]:
    """What a built library runs on, as in ("80", "90a"), from the text that it carries.

    Read without loading, because loading would register the ops for every device.
    """
    marker = b"nf4_cuda_architectures="
    with library.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as text:
        start = text.find(marker)
        if start < 0:
            return ()
        start += len(marker)
        return tuple(text[start : text.find(b";", start)].decode().split("_"))


@cache
def load_error() -> str | None:
    """Load the native library, once; the reason why not, or None."""
    if not torch.cuda.is_available():
        return "no CUDA device"
    library = _library()
    if library is None:
        return "nf4 was installed without its CUDA library (no nvcc at build time)"
    built = architectures(library)
    for index in range(torch.cuda.device_count()):
        capability = torch.cuda.get_device_capability(index)
        if not runs_on(capability, built):
            return (
                f"{torch.cuda.get_device_name(index)} is sm_{capability[0]}{capability[1]}, and "
                f"the CUDA library was built for {', '.join(built)} (NF4_CUDA_ARCHS chooses)"
            )
    try:
        torch.ops.load_library(str(library))
    except OSError as error:
        return f"the CUDA library does not load: {error}"
    return None


def unsupported(device: torch.device) -> str | None:
    """Why this backend cannot run on ``device``, or None."""
    if device.type != "cuda" and torch.cuda.is_available():
        return "needs a CUDA tensor"
    return load_error()
