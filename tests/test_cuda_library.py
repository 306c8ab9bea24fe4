"""The CUDA library without a GPU: it loads, registers every op, and is left alone where none is."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from nf4 import backends
from nf4.backends import cuda

LIBRARY = cuda._library()
needs_library = pytest.mark.skipif(LIBRARY is None, reason="the CUDA library is not built here")
REGISTERED = """
import sys, torch, nf4
torch.ops.load_library(sys.argv[1])
for namespace in ("nf4", "nf4_cuda"):
    for op in sys.argv[2:]:
        assert torch._C._dispatch_has_kernel_for_dispatch_key(f"{namespace}::{op}", "CUDA"), op
"""
FIRST_CALL = """
import os, torch, nf4
native = lambda: torch._C._dispatch_has_kernel_for_dispatch_key("nf4::quantize", "CUDA")
assert not native() and not torch.cuda.is_initialized()
child = os.fork()
if child == 0:
    torch.zeros(1, device="cuda")
    os._exit(0)
assert os.waitpid(child, 0)[1] == 0
for namespace in ("nf4_cuda", "nf4"):
    packed, _ = getattr(torch.ops, namespace).quantize(torch.ones(64, device="cuda"), 64, 0)
    assert native() and int(packed[0]) == 0xFF
"""


@needs_library
def test_every_op_is_registered_at_the_cuda_key() -> None:
    command = [sys.executable, "-c", REGISTERED, str(LIBRARY), *cuda.OPS]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


@needs_library
def test_the_library_names_its_architectures() -> None:
    assert LIBRARY is not None
    names = cuda.architectures(LIBRARY)
    assert names and all(name.rstrip("af").isdigit() for name in names)


def test_without_a_device_nothing_is_loaded() -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a CUDA device")
    assert cuda.unsupported(torch.device("cuda")) == "no CUDA device"


def test_a_foreign_library_has_no_architectures(tmp_path: Path) -> None:
    path = tmp_path / "foreign.so"
    path.write_bytes(b"something else")
    assert cuda.architectures(path) == ()


@pytest.mark.parametrize(
    "capability, built, runs",
    [
        ((9, 0), ("90a",), True),
        ((8, 0), ("80",), True),
        ((8, 9), ("80",), True),
        ((8, 6), ("89",), False),
        ((9, 0), ("80",), False),
        ((10, 3), ("100",), True),
        ((10, 3), ("100a",), False),
        ((12, 0), ("75", "80", "90a", "120"), True),
        ((7, 0), ("75",), False),
        ((9, 0), (), False),
    ],
)
def test_which_devices_a_build_serves(
    capability: tuple[int, int], built: tuple[str, ...], runs: bool
) -> None:
    assert cuda.runs_on(capability, built) is runs


def test_the_call_that_loads_the_library_runs_on_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """Python got it for want of a kernel; the dispatcher has one when ``unsupported`` returns."""
    x = torch.randn(64)
    expected = torch.ops.nf4_reference.quantize(x, 64, 0)
    registered: list[str] = []
    library = torch.library.Library("nf4_cuda", "IMPL")

    def quantize(x: torch.Tensor, block_size: int, format: int):
        return torch.ops.nf4_reference.quantize(x, block_size, format)

    def unsupported(device: torch.device) -> None:
        if not registered:
            library.impl("quantize", quantize, "CPU")
            registered.append("quantize")

    monkeypatch.setattr(backends, "_device", lambda args: torch.device("cuda"))
    monkeypatch.setattr(cuda, "unsupported", unsupported)
    try:
        got = torch.ops.nf4_cuda.quantize(x, 64, 0)
    finally:
        library._destroy()
    assert registered and all(map(torch.equal, got, expected))


@needs_library
def test_the_first_call_loads_the_library() -> None:
    """And the import of nf4 does not, so that a process may still fork."""
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    if cuda.load_error() is not None:
        pytest.skip(f"backend cuda: {cuda.load_error()}")
    result = subprocess.run([sys.executable, "-c", FIRST_CALL], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
