"""bitsandbytes' configuration and checkpoints without bitsandbytes, and ours with it.

The tests named ``test_b<number>`` show a defect of bitsandbytes under transformers and that nf4
does not have it.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import (
    assert_same_files,
    auto_class,
    load,
    load_as_bitsandbytes,
    logits,
    quantized,
    save_model,
)
from safetensors.torch import load_file
from tiny import token_ids

import nf4
from nf4.nn import NF4Experts

pytest.importorskip("transformers", reason="transformers is not installed")
pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")

import bitsandbytes as bnb
from torch import nn
from transformers import AutoConfig, BitsAndBytesConfig
from transformers.pytorch_utils import Conv1D

from nf4.integrations.transformers import give_back_bitsandbytes, take_bitsandbytes

_ROOT = Path(__file__).resolve().parent.parent

LAYOUTS = [
    pytest.param({"bnb_4bit_quant_type": form, "bnb_4bit_use_double_quant": nested}, id=name)
    for name, form, nested in (
        ("nf4", "nf4", False),
        ("nf4-double", "nf4", True),
        ("fp4", "fp4", False),
        ("fp4-double", "fp4", True),
    )
]
NF4_DOUBLE: dict[str, Any] = {"bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True}


def config(**settings: Any) -> BitsAndBytesConfig:
    return BitsAndBytesConfig(load_in_4bit=True, **settings)


@pytest.fixture
def in_place() -> Iterator[None]:
    """nf4 in place of bitsandbytes' 4-bit quantizer."""
    take_bitsandbytes()
    yield
    give_back_bitsandbytes()


def theirs(directory: Path, kind: str = "llama", **kwargs: Any) -> Any:
    """The checkpoint loaded by bitsandbytes itself."""
    model = load(directory, kind, **kwargs)
    assert any(isinstance(m, bnb.nn.Linear4bit) for m in model.modules())
    return model


def their_logits(model: Any, ids: torch.Tensor) -> torch.Tensor:
    """Logits of a bitsandbytes model, in train mode: on CPUs with AVX512_BF16 its eval mode rounds
    inputs and repacks the weights, for good."""
    return logits(model.train(), ids)


@pytest.mark.parametrize("storage", ["uint8", "bfloat16", "float16"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_reads_and_writes_their_checkpoints(
    layout: dict[str, Any], storage: str, tmp_path: Path
) -> None:
    saved = save_model("llama-short-blocks", tmp_path / "16bit")
    given = config(**layout, bnb_4bit_quant_storage=storage)
    original = theirs(saved, quantization_config=given)
    original.save_pretrained(tmp_path / "theirs")
    model = load_as_bitsandbytes(tmp_path / "theirs")
    ids = token_ids()
    # Both compute in float32 from equal bytes; only the order of sums differs.
    assert torch.allclose(logits(model, ids), their_logits(original, ids), atol=1e-5)
    model.save_pretrained(tmp_path / "ours")
    assert_same_files(tmp_path / "theirs", tmp_path / "ours")
    again = theirs(tmp_path / "ours")
    assert torch.equal(their_logits(again, ids), their_logits(original, ids))


@pytest.mark.parametrize("kind", ["llama", "llama-tied", "gpt2", "opt", "classifier"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_they_read_what_we_quantize(kind: str, layout: dict[str, Any], tmp_path: Path) -> None:
    """Every weight that they decode from our file is the one that we decode."""
    settings = {"format": layout["bnb_4bit_quant_type"]}
    settings["double_quant"] = layout["bnb_4bit_use_double_quant"]
    model = quantized(save_model(kind, tmp_path / "16bit"), kind, **settings)
    model.save_pretrained(tmp_path / "ours")
    loaded = theirs(tmp_path / "ours", kind)
    count = 0
    for name, module in loaded.named_modules():
        if isinstance(module, bnb.nn.Linear4bit):
            weight = bnb.functional.dequantize_4bit(module.weight.data, module.weight.quant_state)
            assert torch.equal(weight, model.get_submodule(name).dequantize()), name
            count += 1
    assert count == sum(isinstance(m, nf4.NF4Linear) for m in model.modules()) > 0
    ids = token_ids()
    assert torch.allclose(logits(model, ids), their_logits(loaded, ids), atol=1e-5)


def test_single_quantization_gives_their_bytes(tmp_path: Path) -> None:
    saved = save_model("llama-short-blocks", tmp_path / "16bit")
    given = config(bnb_4bit_quant_type="nf4")
    theirs(saved, quantization_config=given).save_pretrained(tmp_path / "theirs")
    load_as_bitsandbytes(saved, quantization_config=given).save_pretrained(tmp_path / "ours")
    assert_same_files(tmp_path / "theirs", tmp_path / "ours")


def test_nf4config_chooses_nf4_for_their_checkpoint(tmp_path: Path) -> None:
    """With bitsandbytes installed, an NF4Config loads its checkpoint with nf4 all the same."""
    saved = save_model("llama", tmp_path / "16bit", torch.bfloat16)
    theirs(saved, quantization_config=config(**NF4_DOUBLE)).save_pretrained(tmp_path / "theirs")
    model = load(tmp_path / "theirs", quantization_config=nf4.NF4Config())
    layer = model.model.layers[0].mlp.up_proj
    assert isinstance(layer, nf4.NF4Linear)
    assert layer.compute_dtype is None  # not the float32 of the checkpoint's configuration (B14)
    model.save_pretrained(tmp_path / "ours")
    assert_same_files(tmp_path / "theirs", tmp_path / "ours")


def test_skip_lists_do_not_decide(tmp_path: Path) -> None:
    """Whether a weight is quantized is read off the checkpoint: lists in the wild name paths of
    other releases of transformers."""
    saved = save_model("llama", tmp_path / "16bit")
    given = config(**NF4_DOUBLE, llm_int8_skip_modules=["lm_head", "model.layers.0.mlp"])
    original = theirs(saved, quantization_config=given)
    original.save_pretrained(tmp_path / "theirs")
    file = tmp_path / "theirs" / "config.json"
    file.write_text(file.read_text().replace("model.layers.0.mlp", "language_model.layers.0.mlp"))
    model = load_as_bitsandbytes(tmp_path / "theirs")
    assert type(model.model.layers[0].mlp.up_proj) is nn.Linear
    assert isinstance(model.model.layers[1].mlp.up_proj, nf4.NF4Linear)
    ids = token_ids()
    assert torch.allclose(logits(model, ids), their_logits(original, ids), atol=1e-5)


def test_our_skip_list_reaches_them(tmp_path: Path) -> None:
    kept = ["q_proj", "model.layers.1"]
    model = quantized(save_model("llama", tmp_path / "16bit"), modules_to_not_convert=kept)
    model.save_pretrained(tmp_path / "ours")
    loaded = theirs(tmp_path / "ours")
    for name, module in loaded.named_modules():
        own = isinstance(model.get_submodule(name), nf4.NF4Linear)
        assert isinstance(module, bnb.nn.Linear4bit) == own, name


def test_without_bitsandbytes(tmp_path: Path) -> None:
    """Where bitsandbytes cannot be imported, its configuration and checkpoints load with nf4."""
    saved = save_model("llama", tmp_path / "16bit")
    original = theirs(saved, quantization_config=config(**NF4_DOUBLE))
    original.save_pretrained(tmp_path / "theirs")
    ids = token_ids()
    torch.save((ids, their_logits(original, ids)), tmp_path / "expected.pt")
    code = f"""
import sys
class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "bitsandbytes":
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)
sys.meta_path.insert(0, Absent())
import torch, nf4
from transformers import AutoModelForCausalLM, BitsAndBytesConfig
ids, expected = torch.load({str(tmp_path / "expected.pt")!r})
model = AutoModelForCausalLM.from_pretrained({str(tmp_path / "theirs")!r}, device_map={{"": "cpu"}})
assert torch.allclose(model(ids).logits, expected, atol=1e-5)
model.num_parameters()  # imports bitsandbytes where is_loaded_in_4bit is set
model.save_pretrained({str(tmp_path / "ours")!r})
config = BitsAndBytesConfig(
    load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True
)
fresh = AutoModelForCausalLM.from_pretrained({str(saved)!r}, quantization_config=config)
assert isinstance(fresh.model.layers[0].mlp.up_proj, nf4.NF4Linear)
assert "bitsandbytes" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", code], cwd=_ROOT, check=True)
    assert_same_files(tmp_path / "theirs", tmp_path / "ours")


def test_flag_that_scripts_look_at(tmp_path: Path) -> None:
    """is_loaded_in_4bit is set for bitsandbytes' configuration, where bitsandbytes is importable:
    transformers imports it wherever the flag is set."""
    saved = save_model("llama", tmp_path)
    model = load_as_bitsandbytes(saved, quantization_config=config(**NF4_DOUBLE))
    assert model.is_loaded_in_4bit
    assert model.num_parameters() > 0
    assert not hasattr(quantized(saved), "is_loaded_in_4bit")


def test_experts_stored_one_by_one(in_place: None, tmp_path: Path) -> None:
    """Checkpoints of transformers 4 hold a Linear4bit per expert, which 5 cannot load (B11)."""
    model = quantized(save_model("qwen3-moe", tmp_path / "16bit"), "qwen3-moe")
    model.save_pretrained(tmp_path / "4bit")
    keys = load_file(tmp_path / "4bit" / "model.safetensors")
    name = "model.layers.1.mlp.experts.3.down_proj.weight"
    assert f"{name}.quant_state.bitsandbytes__nf4" in keys
    assert "model.layers.1.mlp.experts.down_proj" not in keys
    model.config.quantization_config = config(**NF4_DOUBLE)
    model.config.save_pretrained(tmp_path / "4bit")
    again = load(tmp_path / "4bit", "qwen3-moe")
    assert isinstance(again.model.layers[1].mlp.experts, NF4Experts)
    ids = token_ids()
    assert torch.equal(logits(again, ids), logits(model, ids))


# Defects of bitsandbytes under transformers.


def test_b1_save_what_was_loaded(tmp_path: Path) -> None:
    saved = save_model("llama", tmp_path / "16bit")
    theirs(saved, quantization_config=config(**NF4_DOUBLE)).save_pretrained(tmp_path / "theirs")
    loaded = theirs(tmp_path / "theirs")
    with pytest.raises(NotImplementedError):
        loaded.save_pretrained(tmp_path / "again")
    load_as_bitsandbytes(tmp_path / "theirs").save_pretrained(tmp_path / "ours")
    assert_same_files(tmp_path / "theirs", tmp_path / "ours")


def test_b2_dequantize_after_saving(tmp_path: Path) -> None:
    saved = save_model("llama", tmp_path / "16bit", torch.bfloat16)
    given = config(**NF4_DOUBLE)
    loaded = theirs(saved, quantization_config=given)
    loaded.save_pretrained(tmp_path / "theirs")
    with pytest.raises(RuntimeError, match="Invalid device string"):
        loaded.dequantize()
    model = load_as_bitsandbytes(saved, quantization_config=given)
    model.save_pretrained(tmp_path / "ours")
    model.dequantize()
    assert type(model.model.layers[0].mlp.up_proj) is nn.Linear
    assert not hasattr(model, "is_loaded_in_4bit")


def test_b3_no_config_given(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    saved = save_model("llama", tmp_path / "16bit")
    original = theirs(saved, quantization_config=config(**NF4_DOUBLE))
    original.save_pretrained(tmp_path / "theirs")
    ids = token_ids()
    model = load_as_bitsandbytes(tmp_path / "theirs", quantization_config=None)
    assert torch.allclose(logits(model, ids), their_logits(original, ids), atol=1e-5)
    assert theirs(tmp_path / "theirs", quantization_config=None)  # also for them, with nf4 imported
    as_without_nf4 = AutoConfig.from_pretrained.__func__.__wrapped__
    monkeypatch.setattr(AutoConfig, "from_pretrained", classmethod(as_without_nf4))
    with pytest.raises(RuntimeError, match="mismatch"):
        theirs(tmp_path / "theirs", quantization_config=None)


def test_b4_conv1d_comes_back(tmp_path: Path) -> None:
    saved = save_model("gpt2", tmp_path / "16bit")
    given = config(**NF4_DOUBLE)
    loaded = theirs(saved, "gpt2", quantization_config=given)
    loaded.dequantize()
    assert type(loaded.transformer.h[0].attn.c_attn) is nn.Linear  # which no reload accepts
    model = load_as_bitsandbytes(saved, "gpt2", quantization_config=given)
    model.dequantize()
    assert type(model.transformer.h[0].attn.c_attn) is Conv1D


def test_b11_experts_are_quantized(tmp_path: Path) -> None:
    saved = save_model("qwen3-moe", tmp_path / "16bit")
    given = config(**NF4_DOUBLE)
    loaded = theirs(saved, "qwen3-moe", quantization_config=given)
    assert loaded.model.layers[0].mlp.experts.down_proj.is_floating_point()
    model = load_as_bitsandbytes(saved, "qwen3-moe", quantization_config=given)
    experts = model.model.layers[0].mlp.experts
    assert isinstance(experts, NF4Experts)
    assert not experts.down_proj.is_floating_point()
    assert model.get_memory_footprint() < 0.75 * loaded.get_memory_footprint()


def test_b12_meta_device(tmp_path: Path) -> None:
    saved = save_model("llama", tmp_path / "16bit")
    with pytest.raises(RuntimeError):
        theirs(saved, quantization_config=config(**NF4_DOUBLE)).to("meta")
    assert all(p.is_meta for p in quantized(saved).to("meta").parameters())


@pytest.mark.parametrize("device", ["cpu", "disk"])
def test_b13_offload(device: str, tmp_path: Path) -> None:
    """A part of a quantized model may live on disk (or on the CPU, beside a GPU)."""
    saved = save_model("llama", tmp_path / "16bit")
    original = theirs(saved, quantization_config=config(**NF4_DOUBLE))
    original.save_pretrained(tmp_path / "theirs")
    parts = {"model.embed_tokens": "cpu", "model.layers.0": "cpu", "model.layers.1": device}
    device_map = {**parts, "model.norm": "cpu", "model.rotary_emb": "cpu", "lm_head": "cpu"}
    kwargs = {"device_map": device_map, "offload_folder": tmp_path / "offload"}
    if device == "disk":
        with pytest.raises(ValueError, match="dispatched on the CPU or the disk"):
            theirs(tmp_path / "theirs", **kwargs)
    model = load_as_bitsandbytes(tmp_path / "theirs", **kwargs)
    weight = model.model.layers[1].mlp.up_proj.weight
    assert weight.is_meta == (device == "disk")
    ids = token_ids()
    assert torch.allclose(logits(model, ids), their_logits(original, ids), atol=1e-5)
    model.save_pretrained(tmp_path / "ours")
    assert_same_files(tmp_path / "theirs", tmp_path / "ours")


def test_8bit_is_left_to_bitsandbytes(in_place: None, tmp_path: Path) -> None:
    saved = save_model("llama", tmp_path)
    model = auto_class("llama").from_pretrained(
        saved, quantization_config=BitsAndBytesConfig(load_in_8bit=True)
    )
    assert isinstance(model.model.layers[0].mlp.up_proj, bnb.nn.Linear8bitLt)
