"""DDP and FSDP2 over two gloo processes: train, save, and agree with one process."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from test_drop_in import ENVIRONMENT

pytest.importorskip("transformers")
pytest.importorskip("peft")


@pytest.mark.skipif(not torch.distributed.is_available(), reason="torch has no distributed")
@pytest.mark.timeout(300)  # two processes, each for 120 s at most
@pytest.mark.parametrize("kind", ["ddp", "fsdp2"])
def test_two_processes(kind: str, tmp_path: Path) -> None:
    script = str(Path(__file__).parent / "two_processes.py")
    ranks = [
        subprocess.Popen(
            [sys.executable, script, kind, str(rank), str(tmp_path)],
            env={**ENVIRONMENT, "CUDA_VISIBLE_DEVICES": ""},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(2)
    ]
    outputs = ["", ""]
    try:
        for rank, process in enumerate(ranks):
            outputs[rank] = process.communicate(timeout=120)[0]
    finally:
        for process in ranks:
            process.kill()
    for rank, process in enumerate(ranks):
        assert process.returncode == 0, "\n".join(outputs)
        assert f"rank {rank} done" in outputs[rank]
    assert (tmp_path / "adapter" / "adapter_model.safetensors").exists()
