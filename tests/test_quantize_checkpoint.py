"""A checkpoint quantized tensor by tensor is the one that quantizing on load would save."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from checkpoints import (
    MODELS,
    edit_tensors,
    load_as_bitsandbytes,
    logits,
    quantized,
    reloads,
    save_model,
)
from safetensors.torch import load_file
from tiny import token_ids

import nf4

pytest.importorskip("transformers", reason="transformers is not installed")

from nf4.integrations import stream


def quantize(source: Path, target: Path, **settings: object) -> dict[str, int]:
    target.mkdir()
    config = nf4.NF4Config(**settings)
    return stream.quantize_checkpoint(source, target, config, torch.bfloat16)


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    found: dict[str, torch.Tensor] = {}
    for file in folder.glob("*.safetensors"):
        found.update(load_file(file))
    return found


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("shards", [False, True])
def test_equals_quantizing_on_load(
    kind: str, shards: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = save_model(kind, tmp_path / "16bit", torch.bfloat16)
    if shards:
        monkeypatch.setattr(stream, "SHARD_BYTES", 20_000)
    sizes = quantize(source, tmp_path / "streamed")
    on_load = quantized(source, kind)
    on_load.save_pretrained(tmp_path / "on_load")
    ours, expected = tensors(tmp_path / "streamed"), tensors(tmp_path / "on_load")
    assert ours.keys() == expected.keys()
    assert all(torch.equal(ours[key], expected[key]) for key in ours)
    assert sizes["written"] == sum(t.nbytes for t in ours.values()) < sizes["read"] / 1.5
    assert len(list((tmp_path / "streamed").glob("*.safetensors"))) > shards
    if reloads(kind):
        ids = token_ids()
        again = load_as_bitsandbytes(tmp_path / "streamed", kind)
        assert torch.equal(logits(again, ids), logits(on_load, ids))


def test_fused_experts_are_stored_one_by_one(tmp_path: Path) -> None:
    """Whether a checkpoint has a matrix per expert or all of them in one tensor."""
    source = save_model("qwen3-moe", tmp_path / "16bit", torch.bfloat16)
    quantize(source, tmp_path / "apart")
    lead = "model.layers.0.mlp.experts"

    def fuse(found: dict[str, torch.Tensor]) -> None:
        each = [
            [found.pop(f"{lead}.{e}.{m}_proj.weight") for m in ("gate", "up")] for e in range(4)
        ]
        found[f"{lead}.gate_up_proj"] = torch.stack([torch.cat(pair) for pair in each])

    edit_tensors(source, fuse)
    quantize(source, tmp_path / "fused")
    ours, expected = tensors(tmp_path / "fused"), tensors(tmp_path / "apart")
    assert ours.keys() == expected.keys()
    assert all(torch.equal(ours[key], expected[key]) for key in ours)


def test_names_without_the_model_s_prefix(tmp_path: Path) -> None:
    """GPT-2's published checkpoints leave the prefix out."""
    source = save_model("gpt2", tmp_path / "16bit", torch.bfloat16)

    def strip(found: dict[str, torch.Tensor]) -> None:
        for key in list(found):
            found[key.removeprefix("transformer.")] = found.pop(key)

    edit_tensors(source, strip)
    quantize(source, tmp_path / "4bit")
    ids = token_ids()
    streamed = load_as_bitsandbytes(tmp_path / "4bit", "gpt2")
    assert torch.equal(logits(streamed, ids), logits(quantized(source, "gpt2"), ids))


def test_what_stays_16bit_is_what_stays_on_load(tmp_path: Path) -> None:
    source = save_model("llama", tmp_path / "16bit", torch.bfloat16)
    settings = {"modules_to_not_convert": ["down_proj"], "double_quant": False, "block_size": 128}
    quantize(source, tmp_path / "4bit", **settings)
    ids = token_ids()
    on_load = quantized(source, **settings)
    streamed = load_as_bitsandbytes(tmp_path / "4bit")
    assert type(streamed.model.layers[0].mlp.down_proj) is torch.nn.Linear
    assert torch.equal(logits(streamed, ids), logits(on_load, ids))


def test_weights_that_are_not_finite_are_named(tmp_path: Path) -> None:
    source = save_model("llama", tmp_path / "16bit", torch.bfloat16)
    key = "model.layers.1.mlp.up_proj.weight"
    edit_tensors(source, lambda found: found[key].view(-1)[7].fill_(float("nan")))
    with pytest.raises(ValueError, match=rf"{key}: .*must be finite, got nan at index \[0, 7\]"):
        quantize(source, tmp_path / "4bit")
