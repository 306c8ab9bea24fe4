"""The 8-bit optimizer over FSDP2 shards in two gloo processes: train, save, resume."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent


@pytest.mark.skipif(not torch.distributed.is_available(), reason="torch has no distributed")
def test_sharded_parameters_step_as_whole_ones(tmp_path: Path) -> None:
    script = str(Path(__file__).parent / "two_processes_optim.py")
    environment = os.environ | {"PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": ""}
    ranks = [
        subprocess.Popen(
            [sys.executable, script, str(rank), str(tmp_path)],
            env=environment,
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
