"""Quantized models of transformers at work: generation, compilation, training, memory, versions."""

from __future__ import annotations

import re
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import load, logits, quantized, save_model
from tiny import token_ids
from torch import nn

import nf4
from nf4.nn import NF4Experts

pytest.importorskip("transformers", reason="transformers is not installed")

import transformers

from nf4.integrations import transformers as integration


@pytest.mark.parametrize("kind", ["llama", "gpt2", "qwen3-moe"])
def test_generate(kind: str, tmp_path: Path) -> None:
    model = quantized(save_model(kind, tmp_path), kind)
    ids = token_ids(2, 5)
    settings = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    got = model.generate(ids, **settings)
    expected = ids
    for _ in range(6):  # without a cache
        expected = torch.cat((expected, logits(model, expected)[:, -1:].argmax(-1)), dim=1)
    assert torch.equal(got, expected)


def test_generate_compiled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The path that generate takes by itself on a GPU: a static cache and a compiled forward."""
    model = quantized(save_model("llama", tmp_path))
    assert model.hf_quantizer.is_compileable
    ids = token_ids(1, 5)
    settings = {"max_new_tokens": 4, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    plain = model.generate(ids, **settings)
    compiled = []
    original = torch.compile

    def compile(*args: Any, **kwargs: Any) -> Any:
        compiled.append(kwargs)
        return original(*args, **{**kwargs, "backend": "aot_eager", "mode": None})

    monkeypatch.setattr(torch, "compile", compile)
    config = transformers.CompileConfig(fullgraph=True)
    config._compile_all_devices = True
    got = model.generate(ids, cache_implementation="static", compile_config=config, **settings)
    assert torch.equal(got, plain)
    assert compiled


def test_experts_are_not_compiled_whole(tmp_path: Path) -> None:
    assert not quantized(save_model("qwen3-moe", tmp_path), "qwen3-moe").hf_quantizer.is_compileable


@pytest.mark.parametrize("kind", ["llama", "qwen3-moe", "mixtral"])
def test_train_around_frozen_weights(kind: str, tmp_path: Path) -> None:
    """Gradients reach what lies below the quantized layers, in both modes of checkpointing."""
    model = quantized(save_model(kind, tmp_path), kind).train()
    ids = token_ids()
    packed = {n: p.clone() for n, p in model.named_parameters() if p.dtype is torch.uint8}
    grads = []
    for reentrant in (None, False, True):
        if reentrant is not None:
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        model(ids, labels=ids, use_cache=False).loss.backward()
        grads.append(model.get_input_embeddings().weight.grad.clone())
        model.zero_grad()
    assert grads[0].abs().sum() > 0
    assert torch.allclose(grads[0], grads[1], atol=1e-6)
    assert torch.allclose(grads[0], grads[2], atol=1e-6)
    for name, value in packed.items():
        assert torch.equal(value, model.get_parameter(name)), name


def test_adapters_make_it_trainable_for_the_trainer(tmp_path: Path) -> None:
    model = quantized(save_model("llama", tmp_path))
    assert model.hf_quantizer.is_trainable and not model.hf_quantizer.is_qat_trainable
    nf4.prepare_model(model, lora=nf4.LoraConfig(r=4, target_modules=["q_proj"]), progress=False)
    assert model.hf_quantizer.is_qat_trainable
    with pytest.raises(ValueError, match="merge_and_unload"):
        model.dequantize()


def test_casts_leave_codes_and_scales(tmp_path: Path) -> None:
    model = quantized(save_model("llama", tmp_path))
    ids = token_ids()
    before = logits(model, ids)
    layer = model.model.layers[0].mlp.up_proj
    model.to(torch.bfloat16)
    assert layer.weight.dtype is torch.uint8 and layer.weight_offset.dtype is torch.float32
    model.to(torch.float32)
    for module in model.modules():  # the norms and embeddings were rounded, the weights not
        assert not isinstance(module, nf4.NF4Linear) or module.weight_absmax.dtype is torch.uint8
    assert torch.allclose(logits(model, ids), before, atol=0.05)


def test_experts_that_stay_16bit_are_named(tmp_path: Path) -> None:
    from transformers import GptOssConfig, GptOssForCausalLM

    config = GptOssConfig(
        hidden_size=64, intermediate_size=32, num_hidden_layers=1, num_attention_heads=4,
        num_key_value_heads=2, head_dim=16, vocab_size=128, num_local_experts=4,
        num_experts_per_tok=2,
    )  # fmt: skip
    GptOssForCausalLM(config).save_pretrained(tmp_path)
    with pytest.warns(UserWarning, match=r"model.layers.0.mlp.experts stays 16-bit: experts must"):
        model = quantized(tmp_path)
    assert isinstance(model.model.layers[0].self_attn.q_proj, nf4.NF4Linear)
    assert not isinstance(model.model.layers[0].mlp.experts, NF4Experts)


def test_quantizes_while_streaming(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """At no time do two layers exist in 16 bits."""
    saved = save_model("llama", tmp_path)
    from nf4.integrations import loading

    read: list[weakref.ref[torch.Tensor]] = []
    original = loading.quantize_for

    def watch(module: nn.Module, weight: torch.Tensor) -> Any:
        assert all(earlier() is None for earlier in read)
        read.append(weakref.ref(weight))
        return original(module, weight)

    monkeypatch.setattr(loading, "quantize_for", watch)
    quantized(saved)
    assert len(read) == 14


def test_one_progress_bar(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    saved = save_model("llama", tmp_path)
    capfd.readouterr()
    quantized(saved)
    shown = capfd.readouterr().err
    assert len(set(re.findall(r"([\w ]+):\s+\d+%", shown))) == 1
    assert "Quantizing" not in shown


def test_default_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """The GPU of this process, under torchrun too, where the current device is always the first."""
    from nf4.integrations.quantizer import NF4Quantizer

    quantizer = NF4Quantizer(nf4.NF4Config(), pre_quantized=False)
    assert quantizer.update_device_map("auto") == "auto"
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert quantizer.update_device_map(None) == {"": "cpu"}
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    assert quantizer.update_device_map(None) == {"": 0}
    monkeypatch.setenv("LOCAL_RANK", "2")
    assert quantizer.update_device_map(None) == {"": 2}


def test_old_transformers_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(integration, "_version", lambda: "4.57.6")
    saved = save_model("llama", tmp_path)
    with pytest.raises(ImportError, match=r"needs transformers 5.0 or newer .* got 4.57.6"):
        load(saved, quantization_config=nf4.NF4Config())
