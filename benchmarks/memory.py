"""Peak memory that an op takes beyond its inputs, on the CPU, beside bitsandbytes and torch.

Each figure is the rise of the process's peak resident size over one call, in a process of its own
(Linux only: the peak is reset through /proc/self/clear_refs). A result that the call returns
counts; it is stated beside the figure, so that the difference is the scratch.
"""

from __future__ import annotations

import csv
import ctypes
import gc
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

import nf4
from benchmarks import peers, results, workload
from benchmarks.peaks import CudaPeaks

N, K, M, RANK = 14336, 4096, 512, 16
FILE_LAYERS = 6
MIB = 1 << 20
Call = Callable[[], object]


def _status(key: str) -> int:
    """A size in /proc/self/status, in bytes."""
    text = Path("/proc/self/status").read_text()
    found = re.search(rf"^{key}:\s+(\d+) kB", text, flags=re.MULTILINE)
    if found is None:
        raise RuntimeError(f"benchmarks.memory: /proc/self/status must have {key}")
    return int(found.group(1)) * 1024


def peak_rise(call: Call) -> tuple[int, int]:
    """(bytes that the peak rose by, bytes of the tensors that the call returned)."""
    gc.collect()
    # Freed heap pages that the C library still holds would hide what the call takes.
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")
    before = _status("VmRSS")
    result = call()
    rise = _status("VmHWM") - before
    values = result if isinstance(result, tuple) else (result,)
    return rise, sum(t.nbytes for t in values if isinstance(t, Tensor))


def _layer() -> workload.Layer:
    class NoPeaks(CudaPeaks):
        """Nothing is timed here, so no limit is measured."""

        def __init__(self) -> None:
            self._rates = []

    bench = workload.Bench(
        torch.device("cpu"),
        torch.get_num_threads(),
        "avx512_bf16",
        NoPeaks(),
        ["default"],
        [name for name in peers.installed() if name != "torchao"],
        0,
    )
    return workload.Layer(bench, N, K)


def _quantize(contender: str, dtype: torch.dtype) -> Call:
    w = torch.randn(N, K).to(dtype)
    if contender == "nf4":
        return lambda: tuple(t for t in nf4.quantize(w).tensors if t is not None)
    import bitsandbytes.functional as bnb

    return lambda: bnb.quantize_4bit(w, blocksize=64, compress_statistics=True, quant_type="nf4")


def _linear(contender: str, dtype: torch.dtype) -> Call:
    layer = _layer()
    case = workload.Case("linear", N, K, M, dtype)
    x = torch.randn(M, K).to(dtype)
    if contender == "nf4":
        q = layer.q
        return lambda: nf4.linear(x, q)
    if contender == "torch_dense":
        w = layer.w32.to(dtype)
        return lambda: torch.nn.functional.linear(x, w)
    calls = {c.name: c.calls[0] for c in peers.linear(case, layer, x, layer.bench)}
    return calls[contender]


def _training_step(contender: str, dtype: torch.dtype) -> Call:
    layer = _layer()
    case = workload.Case("linear_lora", N, K, M, dtype, RANK)
    inputs = workload.LoraInputs(
        torch.randn(M, K).to(dtype).requires_grad_(),
        torch.randn(M, N).to(dtype),
        torch.randn(RANK, K).requires_grad_(),
        torch.randn(N, RANK).requires_grad_(),
    )
    x, a, b = inputs.x, inputs.a, inputs.b
    if contender == "nf4":
        q = layer.q
        return lambda: inputs.step(lambda: nf4.linear_lora(x, q, a, b, 2.0), x, a, b)
    calls = {c.name: c.calls[0] for c in peers.linear_lora(case, layer, inputs, layer.bench)}
    return calls[contender]


def _quantize_file(contender: str, dtype: torch.dtype) -> Call:
    """A checkpoint quantized tensor by tensor, as a loader does."""
    from safetensors import safe_open
    from safetensors.torch import save_file

    path = Path(tempfile.mkdtemp(prefix="nf4-memory-")) / "weights.safetensors"
    save_file({f"{i}.weight": torch.randn(N, K).to(dtype) for i in range(FILE_LAYERS)}, path)
    quantize = _quantize_one(contender)

    def load() -> object:
        kept: list[Tensor] = []
        with safe_open(path, "pt") as file:
            for name in file.keys():  # noqa: SIM118 - a safetensors file is no mapping
                kept += quantize(file.get_tensor(name))
        path.unlink()
        path.parent.rmdir()
        return tuple(kept)

    return load


def _quantize_one(contender: str) -> Callable[[Tensor], list[Tensor]]:
    if contender == "nf4":
        return lambda w: [t for t in nf4.quantize(w).tensors if t is not None]
    import bitsandbytes.functional as bnb

    def run(w: Tensor) -> list[Tensor]:
        packed, state = bnb.quantize_4bit(w, compress_statistics=True, quant_type="nf4")
        return [packed, state.absmax, state.state2.absmax, state.offset]

    return run


MAKERS: dict[str, Callable[[str, torch.dtype], Call]] = {
    "quantize": _quantize,
    "quantize_file": _quantize_file,
    "linear": _linear,
    "linear_lora_step": _training_step,
}
CASES = (
    ("quantize", "bfloat16", ("nf4", "bitsandbytes")),
    ("quantize", "float32", ("nf4", "bitsandbytes")),
    ("quantize_file", "bfloat16", ("nf4", "bitsandbytes")),
    ("linear", "bfloat16", ("nf4", "bitsandbytes", "bitsandbytes_eval", "torch_dense")),
    ("linear", "float32", ("nf4", "bitsandbytes", "torch_dense")),
    ("linear_lora_step", "bfloat16", ("nf4", "peft_bitsandbytes")),
    ("linear_lora_step", "float32", ("nf4", "peft_bitsandbytes")),
)


def _worker(op: str, dtype: str, contender: str) -> None:
    # One small call first: what a library allocates once is not what the op takes.
    nf4.linear(torch.randn(2, 64), nf4.quantize(torch.randn(64, 64)))
    rise, returned = peak_rise(MAKERS[op](contender, getattr(torch, dtype)))
    print(f"{rise} {returned}")


def run(path: Path | None) -> None:
    """Print every figure, and write them to ``path`` if one is given."""
    env = results.environment(torch.device("cpu"), "", torch.get_num_threads())
    print(f"{env.hardware}; weights [{N}, {K}], M={M}, r={RANK}; nf4 at {env.commit}")
    rows = []
    for op, dtype, contenders in CASES:
        for contender in contenders:
            if contender not in ("nf4", "torch_dense") and "bitsandbytes" not in peers.installed():
                continue
            command = [sys.executable, "-m", "benchmarks.memory", op, dtype, contender]
            done = subprocess.run(command, cwd=results.ROOT, capture_output=True, text=True)
            if done.returncode:
                print(f"{op} {dtype} {contender}: {done.stderr.strip().splitlines()[-1]}")
                continue
            rise, returned = map(int, done.stdout.split()[-2:])
            figures = (round(rise / MIB, 1), round(returned / MIB, 1))
            print(f"{op:<18}{dtype:<10}{contender:<20}{figures[0]:8.1f} MiB, {figures[1]} returned")
            rows.append((env.date, env.commit, env.hardware, op, dtype, contender, *figures))
    if path:
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("w", newline="") as file:
            writer = csv.writer(file, lineterminator="\n")
            header = "date commit hardware op dtype contender peak_rise_mib returned_mib"
            writer.writerow(header.split())
            writer.writerows(rows)


if __name__ == "__main__":
    _worker(*sys.argv[1:])
