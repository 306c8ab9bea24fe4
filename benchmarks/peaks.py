"""The machine's own limits, measured in the same run as the kernels that are held against them.

On a CPU they come from ``peaks.cpp``, compiled for this machine on first use; on a GPU from a large
copy and a large bf16 matrix product.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import platform
import shutil
import statistics
import subprocess
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.timing import median_seconds

SOURCE = Path(__file__).with_name("peaks.cpp")
# Large against any last-level cache, small enough to measure in a second.
STREAM_BYTES = 256 << 20
_BURST_STEPS = 1_000_000


def _cpu_identity() -> str:
    """What -march=native depends on, so that a cached library is never run on another CPU."""
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return platform.processor()
    keep = ("flags", "Features", "model name", "cpu family")
    return "".join(line for line in text.splitlines()[:40] if line.startswith(keep))


def build_library() -> Path:
    """Compile ``peaks.cpp`` into the user's cache folder; RuntimeError with the reason if not."""
    compiler = os.environ.get("CXX") or shutil.which("g++") or shutil.which("clang++")
    if compiler is None:
        raise RuntimeError("benchmarks: the CPU limits need a C++ compiler (g++ or clang++)")
    key = hashlib.sha256((SOURCE.read_text() + _cpu_identity() + compiler).encode()).hexdigest()
    cache = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "nf4-benchmarks"
    library = cache / f"peaks-{key[:16]}.so"
    if library.exists():
        return library
    cache.mkdir(parents=True, exist_ok=True)
    partial = library.with_suffix(f".{os.getpid()}.so")
    flags = ["-std=c++17", "-O3", "-march=native", "-ffp-contract=fast", "-fopenmp"]
    command = [compiler, *flags, "-shared", "-fPIC", str(SOURCE), "-o", str(partial)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"benchmarks: {SOURCE.name} does not compile: {done.stderr.strip()}")
    partial.rename(library)
    return library


@dataclass(frozen=True)
class Rate:
    """One measured limit: ``per_second`` bytes or floating-point operations."""

    name: str
    per_second: float
    unit: str

    def __str__(self) -> str:
        return f"{self.name} {self.per_second / 1e9:.0f} {self.unit}"


class CpuPeaks:
    """The limits of this CPU at one thread count; ``vector_bytes`` caps the vector width.

    Each stream exists in a few variants, and the fastest in a run is the limit: which one that is
    changes with what else the memory is doing.
    """

    # (places read at once by each thread, bytes prefetched ahead)
    READ_VARIANTS = ((2, 0), (2, 2048), (4, 2048))
    # (non-temporal stores, bytes prefetched ahead)
    MIX_VARIANTS = ((0, 0), (1, 0), (1, 4096))

    def __init__(self, threads: int, vector_bytes: int = 64) -> None:
        # torch first: its OpenMP runtime is then the one that the library binds to.
        library = ctypes.CDLL(str(build_library()))
        i, n, p = ctypes.c_int, ctypes.c_long, ctypes.c_void_p
        library.peaks_fma.argtypes, library.peaks_fma.restype = (i, n, i), ctypes.c_double
        library.peaks_dot_bf16.argtypes, library.peaks_dot_bf16.restype = (n, i), ctypes.c_double
        library.peaks_read.argtypes, library.peaks_read.restype = (p, n, n, n, i), ctypes.c_uint64
        library.peaks_mix.argtypes, library.peaks_mix.restype = (p, n, p, n, i, n, i), None
        self._library = library
        self.threads = threads
        self.vector_bytes = min(vector_bytes, library.peaks_vector_bytes())
        self.has_dot_bf16 = vector_bytes >= 64 and bool(library.peaks_has_dot_bf16())
        source = torch.ones(STREAM_BYTES, dtype=torch.uint8)
        target = torch.ones(STREAM_BYTES, dtype=torch.uint8)
        read = min(median_seconds(call, 3) for call in self.read(source))
        copy = min(median_seconds(call, 3) for call in self.mix(source, target))
        self._rates = [
            Rate("read", STREAM_BYTES / read, "GB/s"),
            Rate("copy", 2 * STREAM_BYTES / copy, "GB/s"),
        ]
        flops, burst = self.fma_burst()
        self._rates.append(Rate("fma_f32", flops / median_seconds(burst), "GFLOP/s"))
        if self.has_dot_bf16:
            flops, burst = self.dot_burst()
            self._rates.append(Rate("dot_bf16", flops / median_seconds(burst), "GFLOP/s"))

    def rates(self) -> list[Rate]:
        """The headline limits, as measured when this object was made."""
        return self._rates

    def read(self, source: Tensor) -> list[Callable[[], object]]:
        """Calls, one a variant, that read every byte of ``source``, and keep it alive."""

        def call(streams: int, ahead: int) -> Callable[[], object]:
            return lambda: self._library.peaks_read(
                source.data_ptr(), source.nbytes, streams, ahead, self.threads
            )

        return [call(*variant) for variant in self.READ_VARIANTS]

    def mix(self, source: Tensor, target: Tensor) -> list[Callable[[], object]]:
        """Calls, one a variant, that read all of ``source`` and overwrite all of ``target``."""
        aligned = target.data_ptr() % 64 == 0

        def call(nontemporal: int, ahead: int) -> Callable[[], object]:
            # The closure holds the tensors, not only their addresses.
            return lambda: self._library.peaks_mix(
                source.data_ptr(),
                source.nbytes,
                target.data_ptr(),
                target.nbytes,
                nontemporal,
                ahead,
                self.threads,
            )

        return [call(nt, ahead) for nt, ahead in self.MIX_VARIANTS if aligned or not nt]

    def fma_burst(self) -> tuple[float, Callable[[], object]]:
        """(operations, call): independent fp32 fused multiply-adds."""
        burst = self._library.peaks_fma
        return (
            burst(self.vector_bytes, _BURST_STEPS, self.threads),
            lambda: burst(self.vector_bytes, _BURST_STEPS, self.threads),
        )

    def dot_burst(self) -> tuple[float, Callable[[], object]]:
        """(operations, call): independent bf16 dot products; needs ``has_dot_bf16``."""
        burst = self._library.peaks_dot_bf16
        return burst(_BURST_STEPS, self.threads), lambda: burst(_BURST_STEPS, self.threads)


class CudaPeaks:
    """The limits of the current GPU: copy bandwidth (read plus written) and bf16 matrix rate."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        source = torch.randint(0, 255, (2 << 30,), dtype=torch.uint8, device=device)
        target = torch.empty_like(source)
        copy = self._event_seconds(lambda: target.copy_(source))
        # Random data: a product of zeros draws less power and runs above the real rate.
        a = torch.randn(8192, 8192, dtype=torch.bfloat16, device=device)
        b = torch.randn_like(a)
        product = self._event_seconds(lambda: a @ b)
        self._rates = [
            Rate("copy", 2 * source.nbytes / copy, "GB/s"),
            Rate("matmul_bf16", 2 * 8192**3 / product, "GFLOP/s"),
        ]

    @staticmethod
    def _event_seconds(call: Callable[[], object], rounds: int = 15) -> float:
        for _ in range(3):
            call()
        seconds = []
        for _ in range(rounds):
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            call()
            end.record()
            end.synchronize()
            seconds.append(start.elapsed_time(end) / 1e3)
        return statistics.median(seconds)

    def rates(self) -> list[Rate]:
        """The headline limits, as measured when this object was made."""
        return self._rates
