"""The CUDA library without a GPU: it loads, registers every op, and is left alone where none is."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from nf4.backends import cuda

LIBRARY = cuda._library()
needs_library = pytest.mark.skipif(LIBRARY is None, reason="the CUDA library is not built here")
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
REGISTERED = """
import sys, torch, nf4
torch.ops.load_library(sys.argv[1])
for namespace in ("nf4", "nf4_cuda"):
    for op in sys.argv[2:]:
        assert torch._C._dispatch_has_kernel_for_dispatch_key(f"{namespace}::{op}", "CUDA"), op
"""


@needs_library
def test_every_op_is_registered_at_the_cuda_key() -> None:
    command = [sys.executable, "-c", REGISTERED, str(LIBRARY), *OPS]
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
    assert cuda.LOAD_ERROR == "no CUDA device"
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
