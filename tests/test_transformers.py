"""Models of transformers: quantized while loading, saved, loaded again, dequantized."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import (
    MODELS,
    ON_CPU,
    SIZES,
    assert_same_files,
    auto_class,
    edit_tensors,
    load,
    logits,
    quantized,
    save_model,
)
from safetensors.torch import load_file
from tiny import token_ids

import nf4
from nf4.nn import NF4Experts

pytest.importorskip("transformers", reason="transformers is not installed")
from torch import nn
from transformers.pytorch_utils import Conv1D

_ROOT = Path(__file__).resolve().parent.parent

# bitsandbytes may be installed here; NF4Config says that nf4 is to load what nf4 saved.
OURS: dict[str, Any] = {"quantization_config": nf4.NF4Config()}


@pytest.mark.parametrize("kind", MODELS)
def test_quantize_save_load_save(kind: str, tmp_path: Path) -> None:
    model = quantized(save_model(kind, tmp_path / "16bit"), kind)
    ids = token_ids()
    before = logits(model, ids)
    model.save_pretrained(tmp_path / "first")
    again = load(tmp_path / "first", kind, **OURS)
    assert torch.equal(logits(again, ids), before)
    again.save_pretrained(tmp_path / "second")
    assert_same_files(tmp_path / "first", tmp_path / "second")


@pytest.mark.parametrize("kind", MODELS)
def test_quantizes_what_it_should(kind: str, tmp_path: Path) -> None:
    saved = save_model(kind, tmp_path)
    original, model = load(saved, kind), quantized(saved, kind)
    originals = dict(original.named_modules())
    heads = ("lm_head", "score")
    for name, module in model.named_modules():
        if isinstance(module, nf4.NF4Linear):
            weight = originals[name].weight.detach()
            weight = weight.T if isinstance(originals[name], Conv1D) else weight
            q = nf4.quantize(weight)
            assert torch.equal(module.q.packed, q.packed), name
            assert torch.equal(module.dequantize(), nf4.dequantize(q)), name
        elif isinstance(module, (nn.Linear, Conv1D)):
            assert name.endswith(heads), name
        elif isinstance(module, NF4Experts):
            for parameter in ("gate_up_proj", "down_proj"):
                expected = NF4Experts.from_experts(originals[name]).dequantize(parameter)
                assert torch.equal(module.dequantize(parameter), expected), name
    assert sum(isinstance(m, (nf4.NF4Linear, NF4Experts)) for m in model.modules()) >= 8


@pytest.mark.parametrize("kind", MODELS)
def test_dequantize(kind: str, tmp_path: Path) -> None:
    """The model it came from, Conv1D and experts included, over the 4-bit values (B4)."""
    saved = save_model(kind, tmp_path / "16bit")
    model = quantized(saved, kind)
    ids = token_ids()
    before = logits(model, ids)
    model.dequantize()
    assert torch.allclose(logits(model, ids), before, atol=1e-5)
    original = load(saved, kind)
    assert [type(m) for m in model.modules()] == [type(m) for m in original.modules()]
    model.save_pretrained(tmp_path / "dequantized")
    weights, originals = (
        load_file(path / "model.safetensors") for path in (tmp_path / "dequantized", saved)
    )
    assert {k: v.shape for k, v in weights.items()} == {k: v.shape for k, v in originals.items()}
    again = load(tmp_path / "dequantized", kind)
    assert torch.equal(logits(again, ids), logits(model, ids))


@pytest.mark.parametrize("kind", ["llama", "gpt2", "qwen3-moe"])
def test_dequantize_after_saving(kind: str, tmp_path: Path) -> None:
    """save_pretrained leaves a dtype's name in the config, where dequantize() meets it (B2)."""
    saved = save_model(kind, tmp_path / "16bit", torch.bfloat16)
    model = quantized(saved, kind)
    model.save_pretrained(tmp_path / "4bit")
    model.dequantize()
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    loaded = load(tmp_path / "4bit", kind, **OURS)
    loaded.save_pretrained(tmp_path / "again")
    loaded.dequantize()
    loaded.save_pretrained(tmp_path / "dequantized")  # B1: no step of the loader is to be reversed
    assert torch.equal(
        logits(load(tmp_path / "dequantized", kind), ids := token_ids()), logits(model, ids)
    )


@pytest.mark.parametrize("kind", ["llama", "llama-tied", "gpt2", "opt"])
@pytest.mark.parametrize("settings", [{"embeddings": True}, {"embeddings": True, "lm_head": True}])
def test_embeddings_and_head(kind: str, settings: dict[str, Any], tmp_path: Path) -> None:
    model = quantized(save_model(kind, tmp_path / "16bit"), kind, **settings)
    table, head = model.get_input_embeddings(), model.get_output_embeddings()
    tied = kind != "llama"
    assert isinstance(table, nf4.NF4Embedding)
    assert isinstance(head, nf4.NF4Linear) == (tied or "lm_head" in settings)
    assert (head.weight is table.weight) == tied
    ids = token_ids()
    before = logits(model, ids)
    model.save_pretrained(tmp_path / "first")
    again = load(tmp_path / "first", kind)
    assert torch.equal(logits(again, ids), before)
    again.save_pretrained(tmp_path / "second")
    assert_same_files(tmp_path / "first", tmp_path / "second")
    again.dequantize()
    assert (again.get_output_embeddings().weight is again.get_input_embeddings().weight) == tied
    assert torch.allclose(logits(again, ids), before, atol=1e-5)


def test_head_of_its_own(tmp_path: Path) -> None:
    model = quantized(save_model("llama", tmp_path / "16bit"), lm_head=True)
    assert isinstance(model.lm_head, nf4.NF4Linear)
    assert type(model.get_input_embeddings()) is nn.Embedding
    model.save_pretrained(tmp_path / "4bit")
    ids = token_ids()
    assert torch.equal(logits(load(tmp_path / "4bit", **OURS), ids), logits(model, ids))


def test_tied_head_needs_its_table(tmp_path: Path) -> None:
    saved = save_model("llama-tied", tmp_path)
    with pytest.raises(ValueError, match="lm_head needs embeddings=True"):
        quantized(saved, lm_head=True)


@pytest.mark.parametrize(
    "settings",
    [
        {"format": "fp4"},
        {"format": "dynamic8"},
        {"double_quant": False},
        {"block_size": 256},
        {"compute_dtype": torch.bfloat16},
        {"modules_to_not_convert": ["q_proj", "model.layers.1"]},
    ],
    ids=str,
)
def test_settings(settings: dict[str, Any], tmp_path: Path) -> None:
    model = quantized(save_model("llama", tmp_path / "16bit"), **settings)
    layer = model.model.layers[0].mlp.up_proj
    for name in ("format", "block_size", "compute_dtype"):
        assert getattr(layer, name) == settings.get(name, getattr(nf4.NF4Config(), name))
    assert layer.q.nested == settings.get("double_quant", True)
    if "modules_to_not_convert" in settings:
        assert type(model.model.layers[0].self_attn.q_proj) is nn.Linear
        assert type(model.model.layers[1].mlp.up_proj) is nn.Linear
        assert type(model.lm_head) is nn.Linear
    ids = token_ids()
    model.save_pretrained(tmp_path / "first")
    given = {k: v for k, v in settings.items() if k == "compute_dtype"}
    again = load(tmp_path / "first", quantization_config=nf4.NF4Config(**given))
    assert torch.equal(logits(again, ids), logits(model, ids))
    again.save_pretrained(tmp_path / "second")
    assert_same_files(tmp_path / "first", tmp_path / "second")


def test_config_is_transformers_own() -> None:
    from transformers import BitsAndBytesConfig
    from transformers.quantizers import AutoQuantizationConfig
    from transformers.utils.quantization_config import QuantizationConfigMixin

    config = nf4.NF4Config(block_size=128, compute_dtype=torch.bfloat16)
    assert isinstance(config, QuantizationConfigMixin)
    assert AutoQuantizationConfig.from_dict(config.to_dict()) == config
    assert json.loads(config.to_json_string(use_diff=False))["compute_dtype"] == "bfloat16"
    with pytest.raises(ValueError, match="got blocksize"):
        nf4.NF4Config.from_dict({"quant_method": "nf4", "blocksize": 64})
    # QLoRA's settings are the defaults; bitsandbytes' are fp4, float32, no double quant (B14).
    ours, theirs = nf4.NF4Config(), BitsAndBytesConfig(load_in_4bit=True)
    assert (ours.format, ours.double_quant, ours.compute_dtype) == ("nf4", True, None)
    assert theirs.bnb_4bit_quant_type == "fp4" and not theirs.bnb_4bit_use_double_quant
    assert theirs.bnb_4bit_compute_dtype is torch.float32


@pytest.mark.parametrize("first", ["nf4", "transformers"])
def test_either_import_order(first: str, tmp_path: Path) -> None:
    saved = save_model("llama", tmp_path)
    second = "transformers" if first == "nf4" else "nf4"
    code = f"""
import {first}
config = {first}.NF4Config() if {first == "nf4"} else None
import {second}, nf4, transformers
model = transformers.AutoModelForCausalLM.from_pretrained(
    {str(saved)!r}, quantization_config=config or nf4.NF4Config()
)
assert isinstance(model.model.layers[0].mlp.up_proj, nf4.NF4Linear)
assert isinstance(nf4.NF4Config(), transformers.utils.quantization_config.QuantizationConfigMixin)
"""
    subprocess.run([sys.executable, "-c", code], cwd=_ROOT, check=True)


@pytest.mark.parametrize("automatic", [True, False])
def test_no_config_given(automatic: bool, tmp_path: Path) -> None:
    """quantization_config=None is as good as none (B3: the Auto classes dropped the file's own)."""
    from transformers import LlamaForCausalLM

    model = quantized(save_model("llama", tmp_path / "16bit"), format="dynamic8")
    model.save_pretrained(tmp_path / "4bit")
    cls = auto_class("llama") if automatic else LlamaForCausalLM
    again = cls.from_pretrained(tmp_path / "4bit", quantization_config=None, **ON_CPU)
    ids = token_ids()
    assert torch.equal(logits(again, ids), logits(model, ids))


def test_dtype_is_that_asked_for(tmp_path: Path) -> None:
    saved = save_model("llama", tmp_path / "16bit", torch.float32)
    model = load(saved, dtype=torch.bfloat16, **OURS)
    assert model.model.layers[0].mlp.up_proj.weight_dtype is torch.bfloat16
    model.save_pretrained(tmp_path / "4bit")
    half = load(tmp_path / "4bit", dtype=torch.float16, **OURS)
    kept = {p.dtype for p in half.parameters() if p.is_floating_point()}
    assert kept == {torch.float16}
    assert logits(half, token_ids()).dtype is torch.float16


def test_resize_token_embeddings(tmp_path: Path) -> None:
    model = quantized(save_model("llama-tied", tmp_path / "16bit"))
    model.resize_token_embeddings(SIZES["vocab_size"] + 8)
    ids = token_ids()
    assert logits(model, ids).shape[-1] == SIZES["vocab_size"] + 8
    model.save_pretrained(tmp_path / "4bit")
    assert torch.equal(logits(load(tmp_path / "4bit", **OURS), ids), logits(model, ids))


def test_new_layers_stay_16bit(tmp_path: Path) -> None:
    """A layer that the checkpoint lacks is initialized as ever: packed bytes would be garbage."""
    saved = save_model("llama", tmp_path)
    edit_tensors(saved, lambda tensors: tensors.pop("model.layers.1.mlp.up_proj.weight"))
    model, info = auto_class("llama").from_pretrained(saved, output_loading_info=True, **OURS)
    assert info["missing_keys"] == {"model.layers.1.mlp.up_proj.weight"}
    assert type(model.model.layers[1].mlp.up_proj) is nn.Linear
    assert isinstance(model.model.layers[0].mlp.up_proj, nf4.NF4Linear)


def test_sharded_checkpoint(tmp_path: Path) -> None:
    """A weight and its scales may lie in different files."""
    model = quantized(save_model("llama", tmp_path / "16bit"))
    model.save_pretrained(tmp_path / "4bit", max_shard_size="20KB")
    assert len(list((tmp_path / "4bit").glob("*.safetensors"))) > 3
    ids = token_ids()
    assert torch.equal(logits(load(tmp_path / "4bit", **OURS), ids), logits(model, ids))


@pytest.mark.parametrize("offload_buffers", [False, True])
@pytest.mark.parametrize("kind", ["llama", "qwen3-moe"])
def test_part_on_disk(kind: str, offload_buffers: bool, tmp_path: Path) -> None:
    """A layer on disk computes and saves the same; dequantize() asks for it in memory."""
    model = quantized(save_model(kind, tmp_path / "16bit"), kind)
    model.save_pretrained(tmp_path / "4bit")
    parts = ("model.embed_tokens", "model.layers.0", "model.norm", "model.rotary_emb", "lm_head")
    offloaded = load(
        tmp_path / "4bit",
        kind,
        device_map={**dict.fromkeys(parts, "cpu"), "model.layers.1": "disk"},
        offload_folder=tmp_path / "offload",
        offload_buffers=offload_buffers,
        **OURS,
    )
    layer = offloaded.model.layers[1].self_attn.q_proj
    assert layer.weight.is_meta and layer.weight_absmax.is_meta == offload_buffers
    ids = token_ids()
    assert torch.equal(logits(offloaded, ids), logits(model, ids))
    offloaded.save_pretrained(tmp_path / "again")
    assert_same_files(tmp_path / "4bit", tmp_path / "again")
    with pytest.raises(ValueError, match=r"needs all weights in memory, model\.layers\.1"):
        offloaded.dequantize()


def test_automatic_device_map(tmp_path: Path) -> None:
    """Sizes are those of the packed weights once they are packed, and foreseen before."""
    saved = save_model("llama", tmp_path / "16bit")
    ids = token_ids()
    model = load(saved, device_map="auto", max_memory={"cpu": "1GB"}, **OURS)
    model.save_pretrained(tmp_path / "4bit")
    size = model.get_memory_footprint()
    # All of it fits into its own size (transformers keeps a tenth of a device free), 16-bit not.
    fits = load(saved, device_map="auto", max_memory={"cpu": int(size / 0.85)}, **OURS)
    assert not any(p.is_meta for p in fits.parameters())
    split = load(
        tmp_path / "4bit",
        device_map="auto",
        max_memory={"cpu": int(0.8 * size)},
        offload_folder=tmp_path / "offload",
        **OURS,
    )
    assert any(p.is_meta for p in split.parameters())
    assert torch.equal(logits(split, ids), logits(model, ids))


@pytest.mark.parametrize("form", ["bin", "state dict"])
def test_weights_from_elsewhere(form: str, tmp_path: Path) -> None:
    """Old .bin files, and tensors in memory, which have no headers to read."""
    from transformers import AutoConfig, LlamaForCausalLM

    model = quantized(save_model("llama", tmp_path / "16bit"))
    model.save_pretrained(tmp_path / "4bit")
    ids = token_ids()
    for source in ("16bit", "4bit"):
        tensors = load_file(tmp_path / source / "model.safetensors")
        if form == "bin":
            (tmp_path / source / "model.safetensors").unlink()
            torch.save(tensors, tmp_path / source / "pytorch_model.bin")
            loaded = load(tmp_path / source, **OURS)
        else:
            config = AutoConfig.from_pretrained(tmp_path / source)
            loaded = LlamaForCausalLM.from_pretrained(
                None, config=config, state_dict=tensors, **OURS, **ON_CPU
            )
        assert torch.equal(logits(loaded, ids), logits(model, ids))
