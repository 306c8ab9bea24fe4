"""Merging under PEFT: what stays of an adapter, and that unmerge restores every byte."""

from __future__ import annotations

import copy
import logging
import warnings
import weakref
from pathlib import Path

import pytest
import tiny
import torch
from checkpoints import load, logits, quantized, save_model
from packaging.version import Version
from safetensors.torch import load_file
from test_peft import _bytes, _layer, config, randomize
from torch import Tensor, nn

import nf4

peft = pytest.importorskip("peft")
pytest.importorskip("transformers")

from nf4.integrations import peft as integration  # noqa: E402
from nf4.integrations.peft_layer import LoraNF4  # noqa: E402

NEWEST = Version(peft.__version__) >= Version("0.21")
pytestmark = pytest.mark.usefixtures("one_thread")


def small_adapter(model: nn.Module) -> None:
    """Scale each adapter's delta to 1 % of its weight's norm."""
    randomize(model)
    with torch.no_grad():
        for _, layer in integration.lora_layers(model):
            weight = layer.base_layer.dequantize(torch.float32)
            delta = layer.get_delta_weight("default")
            layer.lora_B["default"].weight.mul_(0.01 * weight.norm() / delta.norm())


def kept(change: Tensor, delta: Tensor) -> float:
    """Which part of ``delta`` is in ``change`` (1 is all of it)."""
    return ((change * delta).sum() / (delta * delta).sum()).item()


@pytest.fixture
def pair(tmp_path: Path) -> tuple[nn.Module, nn.Module, Path]:
    """A 16-bit model, its saved folder, and the quantized one with a small adapter."""
    model16 = tiny.llama()
    model16.save_pretrained(tmp_path)
    model = nf4.prepare_model(copy.deepcopy(model16), progress=False).eval()
    model = peft.get_peft_model(model, config()).eval()
    small_adapter(model)
    return model16, model, tmp_path


def test_merge_adapter_keeps_the_adapter_and_unmerge_the_bytes(pair, caplog) -> None:
    _, model, _ = pair
    ids = tiny.token_ids()
    before, expected = _bytes(model), model(ids).logits
    plain = model.base_model.model.state_dict()
    layer = _layer(model)
    weight, delta = layer.base_layer.dequantize(torch.float32), layer.get_delta_weight("default")
    with caplog.at_level(logging.WARNING):
        model.merge_adapter()
    assert "16-bit weights" in caplog.text
    assert layer.base_layer.weight.dtype is torch.bfloat16 and layer.unfused_reason() == "merged"
    # One rounding of the sum to bfloat16: 2^-9 of each element at most.
    merged = layer.base_layer.weight.float()
    assert ((merged - (weight + delta)).abs() <= 2**-8 * (weight + delta).abs()).all()
    assert abs(kept(merged - weight, delta) - 1) < 0.1
    assert (model(ids).logits - expected).abs().max() <= 0.04 * expected.abs().max()
    model.unmerge_adapter()
    assert _bytes(model) == before and torch.equal(model(ids).logits, expected)
    assert model.base_model.model.state_dict().keys() == plain.keys()
    # A forward with adapters disabled unmerges too.
    model.merge_adapter()
    with model.disable_adapter():
        model(ids)
    assert _bytes(model) == before


def test_merge_into_nf4_from_the_16_bit_weights(pair) -> None:
    model16, model, folder = pair
    layer = _layer(model)
    before, delta = _bytes(model), layer.get_delta_weight("default")
    weight4 = layer.base_layer.dequantize(torch.float32)
    name = "model.layers.0.mlp.up_proj.weight"
    weight16 = model16.state_dict()[name].float()

    def stays(base: object) -> float:
        integration.merge_adapter(model, into="nf4", base=base)
        assert isinstance(layer.base_layer, nf4.NF4Linear)
        change = layer.base_layer.dequantize(torch.float32) - weight4
        model.unmerge_adapter()
        assert _bytes(model) == before
        return kept(change, delta)

    # Over 8192 weights the share that stays scatters: bounds at 3 times what was seen.
    assert stays(folder) > 0.5 and stays(model16.state_dict()) > 0.5
    assert abs(stays(None)) < 0.2  # requantized code points: the adapter is lost
    quantized16 = nf4.dequantize(nf4.quantize(weight16 + delta), torch.float32)
    integration.merge_adapter(model, into="nf4", base=folder)
    assert torch.equal(layer.base_layer.dequantize(torch.float32), quantized16)


def test_merge_and_unload_gives_a_plain_16_bit_model(pair, tmp_path: Path, caplog) -> None:
    from transformers import LlamaForCausalLM

    _, model, _ = pair
    ids = tiny.token_ids()
    expected = model(ids).logits
    with caplog.at_level(logging.WARNING):
        merged = model.merge_and_unload()
    assert "GB in place of" in caplog.text
    assert not any(isinstance(m, nf4.NF4Linear) for m in merged.modules())
    assert {p.dtype for p in merged.parameters()} == {torch.bfloat16}
    logits = merged(ids).logits
    assert (logits - expected).abs().max() <= 0.04 * expected.abs().max()
    merged.save_pretrained(tmp_path / "merged")
    again = LlamaForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.bfloat16)
    assert torch.equal(again(ids).logits, logits)


def test_merge_and_unload_into_nf4(pair) -> None:
    _, model, folder = pair
    targets = [name for name, _ in integration.lora_layers(model)]
    merged = integration.merge_and_unload(model, into="nf4", base=folder)
    kinds = [type(m).__name__ for m in merged.modules()]
    assert kinds.count("NF4Linear") == len(targets) and "LoraNF4" not in kinds


def test_partly_adapted_model_is_16_bit_everywhere() -> None:
    model = tiny.quantized_llama()
    model = peft.get_peft_model(model, config(target_modules=["q_proj"]))
    merged = integration.merge_and_unload(model, dtype=torch.float32)
    linears = [m for m in merged.modules() if isinstance(m, nn.Linear)]
    assert len(linears) == 15 and not any(isinstance(m, nf4.NF4Linear) for m in merged.modules())


def test_several_adapters_merge_together_and_apart() -> None:
    model = peft.get_peft_model(tiny.quantized_llama(torch.float32), config())
    model.add_adapter("other", config(r=4, use_dora=True))
    randomize(model, 0.1)
    model.base_model.set_adapter(["default", "other"])
    before, layer = _bytes(model), _layer(model)
    first = layer.base_layer
    weight = first.dequantize(torch.float32)
    delta = layer.get_delta_weight("default")
    model.merge_adapter(["default"])
    assert torch.allclose(layer.base_layer.weight, weight + delta, atol=1e-6)
    model.merge_adapter(["other"])  # adds to what is merged already
    assert layer.merged_adapters == ["default", "other"]
    magnitude = layer.lora_magnitude_vector["other"].weight
    other = layer.get_delta_weight("other")
    factor = (magnitude / (weight + other).norm(dim=1))[:, None]
    expected = factor * (weight + delta + other)
    if NEWEST:  # before 0.21 PEFT takes the norm of the weight with other adapters merged in
        assert torch.allclose(layer.base_layer.weight, expected, atol=1e-5)
    model.unmerge_adapter()
    assert layer.base_layer is first and _bytes(model) == before


def test_conv1d_layers_merge_as_conv1d(tmp_path: Path) -> None:
    from transformers import GPT2Config, GPT2LMHeadModel
    from transformers.pytorch_utils import Conv1D

    model = GPT2LMHeadModel(GPT2Config(n_embd=64, n_layer=1, n_head=2, vocab_size=128))
    state = {k: v.clone() for k, v in model.state_dict().items()}
    model = nf4.prepare_model(model.eval(), progress=False)
    model = peft.get_peft_model(model, config(target_modules=["c_attn"], fan_in_fan_out=True))
    randomize(model, 0.1)
    ids = tiny.token_ids()
    model.eval()
    expected = model(ids).logits
    before = _bytes(model)
    integration.merge_adapter(model, into="nf4", base=state)
    model.unmerge_adapter()
    assert _bytes(model) == before
    merged = model.merge_and_unload()
    assert isinstance(merged.transformer.h[0].attn.c_attn, Conv1D)
    assert torch.allclose(merged(ids).logits, expected, atol=1e-4)


def test_bias_and_broken_adapters() -> None:
    model = nf4.prepare_model(tiny.opt(torch.float32), progress=False).eval()
    model = peft.get_peft_model(model, config(target_modules=["q_proj"], lora_bias=True))
    randomize(model, 0.1)
    layers = [layer for _, layer in integration.lora_layers(model)]
    assert {layer.unfused_reason() for layer in layers} == {"lora_bias"}
    ids = tiny.token_ids()
    model.eval()
    expected = model(ids).logits
    biases = [layer.base_layer.bias.clone() for layer in layers]
    model.merge_adapter()
    assert torch.allclose(model(ids).logits, expected, atol=1e-5)
    model.unmerge_adapter()
    for layer, bias in zip(layers, biases, strict=True):
        assert torch.equal(layer.base_layer.bias, bias)
    before = _bytes(model)
    layers[-1].lora_B["default"].weight.data[0, 0] = float("nan")
    with pytest.raises(ValueError, match="NaN"):
        layers[-1].merge(safe_merge=True)
    assert not layers[-1].merged and _bytes(model) == before


def test_merging_from_the_16_bit_weight_keeps_99_percent() -> None:
    linear = nn.Linear(1024, 1024, bias=False)
    base = {"0.weight": linear.weight.detach().clone()}
    model = nn.Sequential(nf4.NF4Linear.from_linear(linear))
    model = peft.get_peft_model(model, peft.LoraConfig(r=16, target_modules=["0"]))
    small_adapter(model)
    ((_, layer),) = integration.lora_layers(model)
    delta, quantized = layer.get_delta_weight("default"), layer.base_layer.dequantize()
    shares = {}
    for name, weights in (("16bit", base), ("dequantized", None)):
        integration.merge_adapter(model, into="nf4", base=weights)
        shares[name] = kept(layer.base_layer.dequantize() - quantized, delta)
        model.unmerge_adapter()
    # Over a million weights the share scatters by about 0.01.
    assert abs(shares["16bit"] - 1) < 0.05 and abs(shares["dequantized"]) < 0.05, shares


def test_the_size_is_said_first_and_layers_merge_one_by_one(pair, caplog, monkeypatch) -> None:
    _, model, _ = pair
    float32: list[weakref.ref[nn.Module]] = []
    original = LoraNF4._dense_layer

    def watch(layer: LoraNF4, base: nf4.NF4Linear) -> nn.Linear:
        assert "GB in place of" in caplog.text
        assert all(earlier() is None for earlier in float32)
        dense = original(layer, base)
        float32.append(weakref.ref(dense.weight))
        return dense

    monkeypatch.setattr(LoraNF4, "_dense_layer", watch)
    with caplog.at_level(logging.WARNING):
        model.merge_and_unload()
    assert len(float32) == 14


@pytest.mark.parametrize("into", ["16bit", "nf4"])
def test_a_tied_head_is_untied_by_merging(into: str, tmp_path: Path) -> None:
    model = quantized(save_model("llama-tied", tmp_path / "16bit"), embeddings=True)
    head = model.lm_head
    assert isinstance(head, nf4.NF4Linear) and head.weight is model.model.embed_tokens.weight
    ids = tiny.token_ids()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT's, of tied layers
        model = peft.get_peft_model(model, config(target_modules=["lm_head", "q_proj"])).eval()
    randomize(model, 0.5)
    expected = logits(model, ids)
    base = tmp_path / "16bit" if into == "nf4" else None
    state = None
    if base is not None:  # the head's weight is stored as the table's
        state = load_file(base / "model.safetensors")
        state["lm_head.weight"] = state["model.embed_tokens.weight"]
    merged = integration.merge_and_unload(model, into=into, base=state)
    after = logits(merged, ids)
    if into == "16bit":
        assert torch.allclose(after, expected, atol=1e-3)
    assert merged.lm_head.weight is not merged.model.embed_tokens.weight
    merged.save_pretrained(tmp_path / "merged")
    assert torch.equal(logits(load(tmp_path / "merged"), ids), after)


def test_wrong_arguments(pair, tmp_path: Path) -> None:
    _, model, _ = pair
    with pytest.raises(ValueError, match="into must be '16bit' or 'nf4', got '8bit'"):
        integration.merge_and_unload(model, into="8bit")
    with pytest.raises(KeyError, match="14 missing"):
        integration.merge_adapter(model, into="nf4", base={})
    with pytest.raises(ValueError, match="must have LoRA layers"):
        integration.merge_adapter(tiny.llama())
