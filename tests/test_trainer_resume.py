"""``find_resume_checkpoint``: whole checkpoints only, broken ones set aside."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from nf4.integrations.trainer import find_resume_checkpoint, why_broken


def _checkpoint(folder: Path, step: int) -> Path:
    path = folder / f"checkpoint-{step}"
    path.mkdir()
    save_file({"a": torch.randn(64, 64), "b": torch.randn(3)}, path / "adapter_model.safetensors")
    torch.save({"state": torch.randn(1000)}, path / "optimizer.pt")
    (path / "trainer_state.json").write_text(json.dumps({"global_step": step}))
    return path


def _cut(path: Path, keep: int) -> None:
    path.write_bytes(path.read_bytes()[:keep])


def test_takes_the_newest_by_number(tmp_path: Path) -> None:
    assert find_resume_checkpoint(tmp_path) is None
    assert find_resume_checkpoint(tmp_path / "absent") is None
    for step in (9, 10, 100):
        _checkpoint(tmp_path, step)
    (tmp_path / "checkpoint-best").mkdir()
    assert find_resume_checkpoint(tmp_path) == str(tmp_path / "checkpoint-100")


def _no_state(path: Path) -> None:
    (path / "trainer_state.json").unlink()


def _cut_state(path: Path) -> None:
    _cut(path / "trainer_state.json", 5)


def _cut_weights(path: Path) -> None:
    _cut(path / "adapter_model.safetensors", -1)


def _cut_header(path: Path) -> None:
    _cut(path / "adapter_model.safetensors", 20)


def _empty_weights(path: Path) -> None:
    _cut(path / "adapter_model.safetensors", 0)


def _long_weights(path: Path) -> None:
    with (path / "adapter_model.safetensors").open("ab") as file:
        file.write(b"\0")


def _no_weights(path: Path) -> None:
    (path / "adapter_model.safetensors").unlink()


def _cut_optimizer(path: Path) -> None:
    _cut(path / "optimizer.pt", 2000)


def _missing_shard(path: Path) -> None:
    index = {"weight_map": {"a": "adapter_model.safetensors", "c": "model-00002.safetensors"}}
    (path / "model.safetensors.index.json").write_text(json.dumps(index))


@pytest.mark.parametrize(
    "damage",
    [
        _no_state,
        _cut_state,
        _cut_weights,
        _cut_header,
        _empty_weights,
        _long_weights,
        _no_weights,
        _cut_optimizer,
        _missing_shard,
    ],
)
def test_broken_one_is_renamed_and_the_one_before_taken(damage, tmp_path: Path, caplog) -> None:
    whole = _checkpoint(tmp_path, 5)
    broken = _checkpoint(tmp_path, 10)
    damage(broken)
    files = sorted(p.name for p in broken.iterdir())
    with caplog.at_level(logging.WARNING):
        assert find_resume_checkpoint(tmp_path) == str(whole)
    aside = tmp_path / "checkpoint-10.broken"
    assert not broken.exists() and sorted(p.name for p in aside.iterdir()) == files
    assert "checkpoint-10 is not whole" in caplog.text
    # The same step is written again and breaks again: the first one is still there.
    damage(_checkpoint(tmp_path, 10))
    assert find_resume_checkpoint(tmp_path) == str(whole)
    assert (tmp_path / "checkpoint-10.broken-2").is_dir() and aside.is_dir()


def test_all_broken_gives_none(tmp_path: Path) -> None:
    _cut_weights(_checkpoint(tmp_path, 5))
    assert find_resume_checkpoint(tmp_path) is None
    assert why_broken(tmp_path / "checkpoint-5.broken") is not None
