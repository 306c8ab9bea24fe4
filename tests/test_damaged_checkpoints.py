"""A checkpoint that cannot be loaded gives one error that says why."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import edit_tensors, load, load_as_bitsandbytes, quantized, save_model

import nf4

pytest.importorskip("transformers", reason="transformers is not installed")

KEY = "model.layers.1.mlp.up_proj.weight"
STATE = f"{KEY}.quant_state.bitsandbytes__"


def _drop(key: str) -> Any:
    return lambda tensors: tensors.pop(key)


def _rename(old: str, new: str) -> Any:
    return lambda tensors: tensors.update({new: tensors.pop(old)})


def _double_state(tensors: dict[str, torch.Tensor]) -> None:
    tensors[f"{STATE}fp4"] = tensors[f"{STATE}nf4"].clone()


def _drop_companions(tensors: dict[str, torch.Tensor]) -> None:
    for key in [key for key in tensors if key.startswith(f"{KEY}.")]:
        del tensors[key]


def _shorten(tensors: dict[str, torch.Tensor]) -> None:
    tensors[KEY] = tensors[KEY][:-1].clone()


def _other_table(tensors: dict[str, torch.Tensor]) -> None:
    tensors[f"{KEY}.quant_map"] += 0.1


def _single_scales(tensors: dict[str, torch.Tensor]) -> None:
    """Scales as of a weight that is quantized once, beside the state of one quantized twice."""
    tensors[f"{KEY}.absmax"] = tensors[f"{KEY}.absmax"].float()


def _nested_scales(tensors: dict[str, torch.Tensor]) -> None:
    """The reverse: 8-bit scales, and a state that says nothing of their table."""
    state = json.loads(bytes(tensors[f"{STATE}nf4"].tolist()))
    kept = {key: value for key, value in state.items() if not key.startswith("nested")}
    tensors[f"{STATE}nf4"] = torch.tensor(list(json.dumps(kept).encode()), dtype=torch.uint8)


def _no_json(tensors: dict[str, torch.Tensor]) -> None:
    tensors[f"{STATE}nf4"][0] = ord("?")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        pytest.param(_drop(f"{STATE}nf4"), "missing key .*up_proj.*nf4", id="no state"),
        pytest.param(_drop(f"{KEY}.absmax"), "missing key .*up_proj.*absmax", id="no absmax"),
        pytest.param(_drop(f"{KEY}.nested_absmax"), "missing key .*nested_absmax", id="no nested"),
        pytest.param(_drop(KEY), "missing key .*up_proj.weight'", id="no weight"),
        pytest.param(_drop_companions, "up_proj.weight is packed .*state is missing", id="bare"),
        pytest.param(_double_state, "one quantization state, got fp4 and nf4", id="two states"),
        pytest.param(_rename(f"{STATE}nf4", f"{STATE}nf3"), "format .* got 'nf3'", id="unknown"),
        pytest.param(_shorten, "packed must have 4096 elements .* got 4095", id="short"),
        pytest.param(_other_table, "up_proj.*must be the nf4 table", id="table"),
        pytest.param(_single_scales, "up_proj.*absmax must be uint8 .*float32", id="single"),
        pytest.param(
            _nested_scales, "up_proj.*absmax must be float32, got torch.uint8", id="nested"
        ),
        pytest.param(_no_json, "must hold JSON", id="no JSON"),
    ],
)
def test_damaged_checkpoint(change: Any, message: str, tmp_path: Path) -> None:
    quantized(save_model("llama", tmp_path / "16bit")).save_pretrained(tmp_path / "4bit")
    edit_tensors(tmp_path / "4bit", change)
    with pytest.raises(ValueError, match=message):
        load_as_bitsandbytes(tmp_path / "4bit")


def test_truncated_file(tmp_path: Path) -> None:
    quantized(save_model("llama", tmp_path / "16bit")).save_pretrained(tmp_path / "4bit")
    file = tmp_path / "4bit" / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(ValueError, match=r"model.safetensors is truncated or damaged"):
        load_as_bitsandbytes(tmp_path / "4bit")


def test_another_model_s_weights(tmp_path: Path) -> None:
    saved = save_model("llama-short-blocks", tmp_path / "16bit")
    quantized(saved).save_pretrained(tmp_path / "4bit")
    file = tmp_path / "4bit" / "config.json"
    file.write_text(file.read_text().replace('"intermediate_size": 100', '"intermediate_size": 96'))
    with pytest.raises(ValueError, match=r"must have shape \[96, 64\], got \[100, 64\]"):
        load_as_bitsandbytes(tmp_path / "4bit")


def test_weights_that_are_not_finite(tmp_path: Path) -> None:
    saved = save_model("llama", tmp_path)

    def spoil(tensors: dict[str, torch.Tensor]) -> None:
        tensors[KEY][3, 5] = float("nan")
        tensors["model.layers.0.mlp.down_proj.weight"][0, 0] = float("inf")

    edit_tensors(saved, spoil)
    with pytest.raises(ValueError, match=r"2 weights could not be loaded") as error:
        quantized(saved)
    assert f"{KEY}: nf4.quantize: weight must be finite, got nan at index [3, 5]" in str(
        error.value
    )


def test_quantizing_to_disk_is_refused(tmp_path: Path) -> None:
    saved = save_model("llama", tmp_path)
    with pytest.raises(ValueError, match="device_map must not send modules to disk"):
        load(
            saved,
            quantization_config=nf4.NF4Config(),
            device_map={"model": "disk", "lm_head": "cpu"},
            offload_folder=tmp_path / "offload",
        )
