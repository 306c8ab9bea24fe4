"""PEFT's LoRA on the weights of quantized experts, against PEFT on the dequantized model."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import load, logits, quantized, reloads, save_model
from tiny import randomize_adapters, token_ids
from torch import nn

import nf4

peft = pytest.importorskip("peft", reason="PEFT is not installed")
pytest.importorskip("transformers", reason="transformers is not installed")

TARGETS = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]


def config(**settings: Any) -> Any:
    return peft.LoraConfig(
        **{"r": 4, "lora_alpha": 8, "target_modules": ["q_proj"], "target_parameters": TARGETS}
        | settings
    )


@pytest.fixture(params=["qwen3-moe", "mixtral"])
def base(request: pytest.FixtureRequest, tmp_path: Path) -> Any:
    """A tiny quantized model, and the same with its weights dequantized."""
    if not reloads(request.param):
        pytest.skip("this release of transformers has no hook for quantized experts")
    model = quantized(save_model(request.param, tmp_path / "16bit"), request.param)
    dense = copy.deepcopy(model).dequantize()
    assert not any(isinstance(m, nf4.nn.NF4Experts) for m in dense.modules())
    return model.eval(), dense.eval()


def adapted(model: nn.Module, **settings: Any) -> Any:
    model = peft.get_peft_model(model, config(**settings)).eval()
    randomize_adapters(model, 0.2)
    return model


def adapter_gradients(model: Any, ids: torch.Tensor) -> dict[str, torch.Tensor]:
    model(ids, labels=ids).loss.backward()
    return {n: p.grad for n, p in model.named_parameters() if p.requires_grad}


def test_outputs_and_gradients(base: Any, tmp_path: Path) -> None:
    """The same adapter file over both: PEFT's tensors have one meaning."""
    model, dense = base
    ids = token_ids()
    plain = logits(model, ids)
    model = adapted(model)
    model.save_pretrained(tmp_path / "adapter")
    dense = peft.PeftModel.from_pretrained(dense, tmp_path / "adapter", is_trainable=True).eval()
    assert torch.allclose(logits(model, ids), logits(dense, ids), atol=1e-4)
    assert not torch.allclose(logits(model, ids), plain, atol=1e-2)
    ours, theirs = adapter_gradients(model, ids), adapter_gradients(dense, ids)
    assert ours.keys() == theirs.keys() and sum("experts" in key for key in ours) == 2 * 2 * 2
    for key in ours:
        assert torch.allclose(ours[key], theirs[key], atol=1e-5), key
    with model.disable_adapter():
        assert torch.equal(logits(model, ids), plain)


def test_every_expert_s_matmul_is_fused(base: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    model, _ = base
    calls = {"linear": 0, "linear_lora": 0}
    for name in calls:
        original = getattr(nf4.functional, name)

        def counted(*args: Any, name: str = name, original: Any = original, **kw: Any) -> Any:
            calls[name] += args[1].shape[0] in (32, 64, 128) and args[1].shape[1] in (32, 64, 128)
            return original(*args, **kw)

        monkeypatch.setattr(nf4.functional, name, counted)
    model = adapted(model, target_modules=[])
    logits(model, token_ids())
    assert calls["linear_lora"] > 0 and calls["linear_lora"] % 3 == 0


@pytest.mark.skipif(
    tuple(map(int, peft.__version__.split(".")[:2])) < (0, 20),
    reason="PEFT before 0.20 takes one adapter with target_parameters",
)
def test_several_adapters(base: Any) -> None:
    model, dense = (peft.get_peft_model(m, config()).eval() for m in base)
    for one in (model, dense):
        one.add_adapter("other", config(r=2))
    randomize_adapters(model, 0.2)
    adapters = {k: v for k, v in model.state_dict().items() if "lora_" in k}
    assert not dense.load_state_dict(adapters, strict=False).unexpected_keys
    ids = token_ids()
    for active in (["default"], ["other"], ["default", "other"]):
        for one in (model, dense):
            one.base_model.set_adapter(active)
        assert torch.allclose(logits(model, ids), logits(dense, ids), atol=1e-4), active


def test_merging(base: Any, tmp_path: Path) -> None:
    model, _ = base
    ids = token_ids()
    model = adapted(model)
    before = logits(model, ids)
    with pytest.raises(ValueError, match="cannot be merged in place"):
        model.merge_adapter()
    assert not any(getattr(m, "merged", False) for m in model.modules())
    with pytest.raises(ValueError, match="into 16 bits over the dequantized weights only"):
        nf4.integrations.peft.merge_and_unload(model, into="nf4")
    assert not any(getattr(m, "merged", False) for m in model.modules())
    merged = model.merge_and_unload()
    assert torch.allclose(logits(merged, ids), before, atol=1e-4)
    merged.save_pretrained(tmp_path / "merged")
    assert torch.allclose(logits(load(tmp_path / "merged"), ids), before, atol=1e-4)


def test_unloading_gives_the_quantized_model_back(base: Any) -> None:
    model, _ = base
    ids = token_ids()
    before = logits(model, ids)
    model = adapted(model).unload()
    assert torch.equal(logits(model, ids), before)
    assert any(isinstance(m, nf4.nn.NF4Experts) for m in model.modules())


def test_parameters_are_counted_as_before(base: Any) -> None:
    model, dense = base
    ours, theirs = (adapted(m).get_nb_trainable_parameters() for m in (model, dense))
    assert ours == theirs
