"""nf4 as a backend of bitsandbytes: off by default, and right where its switch is on."""

from __future__ import annotations

import importlib
import subprocess
import sys
from pathlib import Path

import pytest
from test_drop_in import ENVIRONMENT

from nf4.backends import available_backends
from nf4.integrations import bitsandbytes_backend as integration

ON = """
import torch, bitsandbytes as bnb, nf4
from nf4.integrations import bitsandbytes_backend as integration
from importlib.metadata import entry_points
if any(point.name == "nf4" for point in entry_points(group="bitsandbytes.backends")):
    assert integration._library is not None, "importing bitsandbytes must have registered nf4"
else:  # nf4 is on the path, not installed
    integration.register()
calls = []
for name in ("quantize", "dequantize", "linear"):
    op = getattr(torch.ops.nf4, name)
    setattr(torch.ops.nf4, name, lambda *a, op=op, name=name: (calls.append(name), op(*a))[1])
from bitsandbytes import functional as F
for quant_type in ("nf4", "fp4"):
    for nested in (False, True):
        # 80 columns: bitsandbytes' own CPU kernel decodes blocks that cross rows wrongly.
        weight, x = torch.randn(96, 80), torch.randn(5, 80)
        codes, state = F.quantize_4bit(weight, quant_type=quant_type, compress_statistics=nested)
        q = nf4.quantize(weight, double_quant=nested, format=quant_type)
        assert torch.equal(codes, q.packed)
        dense = F.dequantize_4bit(codes, state)
        assert (dense - nf4.dequantize(q)).abs().max() < 0.03
        with torch.no_grad():
            y = bnb.matmul_4bit(x, codes, state)
        assert torch.allclose(y, x @ dense.t(), atol=1e-4)
        y = bnb.matmul_4bit(x.requires_grad_(), codes, state, bias=torch.zeros(96))
        assert torch.allclose(y, x @ dense.t(), atol=1e-4)
        (grad,) = torch.autograd.grad(y.sum(), x)
        assert torch.allclose(grad, dense.sum(0).expand(5, -1), atol=1e-4)
        out = torch.empty_like(dense)
        F.dequantize_4bit(codes, state, out=out)
        assert torch.equal(out, dense)
half, state = F.quantize_4bit(torch.randn(64, 64), quant_type="nf4", quant_storage=torch.bfloat16)
assert half.dtype is torch.bfloat16 and half.shape == (1024, 1)
assert F.dequantize_4bit(half, state).shape == (64, 64)
assert set(calls) == {"quantize", "dequantize", "linear"}, calls
assert integration.register() == []  # once
print("ok")
"""


def test_off_by_default(monkeypatch: pytest.MonkeyPatch) -> None:
    for value in (None, "", "0"):
        monkeypatch.delenv(integration.SWITCH, raising=False)
        if value is not None:
            monkeypatch.setenv(integration.SWITCH, value)
        assert not integration.enabled() and integration.register() == []
    assert integration._library is None


def test_on_it_serves_bitsandbytes() -> None:
    pytest.importorskip("bitsandbytes")
    if not available_backends()["cpu"]:
        pytest.skip("backend cpu is not built: nf4 has no native kernels to offer")
    environment = {**ENVIRONMENT, integration.SWITCH: "1"}
    process = subprocess.run(
        [sys.executable, "-c", ON],
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert process.returncode == 0 and "ok" in process.stdout, process.stderr


def test_the_entry_point_is_declared() -> None:
    tomllib = pytest.importorskip("tomllib")
    text = (Path(__file__).parent.parent / "pyproject.toml").read_text()
    points = tomllib.loads(text)["project"]["entry-points"]["bitsandbytes.backends"]
    module, _, name = points["nf4"].partition(":")
    assert getattr(importlib.import_module(module), name) is integration.register
