"""Whole models where users run them: on a GPU where there is one, held against the CPU."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from checkpoints import assert_same_files, load, logits, quantized, save_model
from torch import Tensor, nn

import nf4

pytest.importorskip("transformers", reason="transformers is not installed")
peft = pytest.importorskip("peft", reason="PEFT is not installed")

from nf4.integrations import peft as integration  # noqa: E402

TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def at_home(directory: Path, kind: str = "llama") -> Any:
    """The checkpoint quantized while it is loaded, wherever nf4 puts it."""
    return load(directory, kind, device_map=None, quantization_config=nf4.NF4Config()).eval()


def gradients(model: nn.Module, ids: Tensor) -> dict[str, Tensor]:
    model.train()
    model(ids, labels=ids).loss.backward()
    return {n: p.grad.cpu() for n, p in model.named_parameters() if p.requires_grad}


def assert_close(ours: dict[str, Tensor], theirs: dict[str, Tensor], tolerance: float) -> None:
    assert ours.keys() == theirs.keys() and ours
    for name, tensor in theirs.items():
        assert (ours[name] - tensor).norm() <= tolerance * tensor.norm(), name


@pytest.mark.parametrize("kind", ["llama", "llama-short-blocks", "gpt2", "qwen3-moe"])
def test_loading(kind: str, device_of_choice: torch.device, tmp_path: Path) -> None:
    """Straight onto the device, with the bytes that a CPU makes, and the same logits."""
    saved = save_model(kind, tmp_path / "16bit")
    model, on_cpu = at_home(saved, kind), quantized(saved, kind).eval()
    assert {p.device.type for p in model.parameters()} == {device_of_choice.type}
    ids = tiny.token_ids()
    expected = logits(on_cpu, ids)
    assert torch.allclose(logits(model, ids.to(device_of_choice)).cpu(), expected, atol=1e-4)
    for one, name in ((model, "device"), (on_cpu, "cpu")):
        one.save_pretrained(tmp_path / name)
    assert_same_files(tmp_path / "device", tmp_path / "cpu")
    again = at_home(tmp_path / "cpu", kind)
    assert torch.allclose(logits(again, ids.to(device_of_choice)).cpu(), expected, atol=1e-4)
    again.dequantize()
    assert torch.allclose(logits(again, ids.to(device_of_choice)).cpu(), expected, atol=1e-4)


def test_generate(device_of_choice: torch.device, tmp_path: Path) -> None:
    """Each token is the likeliest by the logits without a cache, up to rounding."""
    model = at_home(save_model("llama", tmp_path))
    ids = tiny.token_ids(3, 5).to(device_of_choice)
    settings = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    got = model.generate(ids, **settings)
    assert got.shape == (3, 11)
    rows = logits(model, got)[:, 4:-1]
    chosen = rows.gather(-1, got[:, 5:, None])[..., 0]
    assert (chosen >= rows.amax(-1) - 1e-4).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_peft(dtype: torch.dtype, device_of_choice: torch.device, tmp_path: Path) -> None:
    """One training step, the adapter file, and merging there and back."""
    saved = save_model("llama", tmp_path / "16bit", dtype)
    config = peft.LoraConfig(r=8, target_modules=TARGETS, task_type="CAUSAL_LM")
    on_cpu = peft.get_peft_model(quantized(saved), config)
    tiny.randomize_adapters(on_cpu)
    on_cpu.save_pretrained(tmp_path / "adapter")
    base = at_home(saved)
    model = peft.PeftModel.from_pretrained(base, tmp_path / "adapter", is_trainable=True)
    assert integration.unfused_layers(model) == {}
    assert {p.device.type for p in model.parameters()} == {device_of_choice.type}
    ids = tiny.token_ids()
    there = ids.to(device_of_choice)
    assert_close(
        gradients(model, there), gradients(on_cpu, ids), 1e-4 if dtype is torch.float32 else 0.05
    )
    model.eval()
    packed = {n: p.clone() for n, p in model.named_parameters() if p.dtype is torch.uint8}
    before = logits(model, there)
    model.merge_adapter()
    assert (logits(model, there) - before).abs().max() <= 0.04 * before.abs().max()
    model.unmerge_adapter()
    assert torch.equal(logits(model, there), before)
    assert all(torch.equal(model.get_parameter(n), p) for n, p in packed.items())
    merged = integration.merge_and_unload(model, into="nf4", base=saved)
    assert {p.device.type for p in merged.parameters()} == {device_of_choice.type}


@pytest.mark.parametrize("fuse", [False, True])
def test_own_adapters(fuse: bool, device_of_choice: torch.device, tmp_path: Path) -> None:
    """prepare_model on the device, checkpointing, the adapter file."""
    lora = nf4.LoraConfig(r=4, target_modules=TARGETS, lora_dropout=0.0)
    models = []
    for device in (device_of_choice, torch.device("cpu")):
        torch.manual_seed(3)
        model = tiny.llama(torch.float32).to(device)
        models.append(nf4.prepare_model(model, lora=lora, progress=False, fuse=fuse))
    model, on_cpu = models
    tiny.randomize_adapters(on_cpu)
    nf4.save_adapter(on_cpu, tmp_path / "adapter")
    nf4.load_adapter(model, tmp_path / "adapter")
    ids = tiny.token_ids()
    there = ids.to(device_of_choice)
    plain = gradients(model, there)
    assert_close(plain, gradients(on_cpu, ids), 1e-4)
    model.zero_grad()
    nf4.prepare_for_qlora(model)
    assert_close(gradients(model, there), plain, 1e-5)
    nf4.save_adapter(model, tmp_path / "again")
    assert_same_files(tmp_path / "adapter", tmp_path / "again")


@pytest.mark.parametrize("optim", ["paged_adamw_8bit", "adamw_torch"])
def test_trainer(
    optim: str, device_of_choice: torch.device, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("accelerate")
    from test_trainer import losses, make

    from nf4.integrations import trainer as names

    monkeypatch.setattr(names, "importable", lambda name: False)
    model = at_home(save_model("llama", tmp_path / "16bit", torch.bfloat16))
    model = peft.get_peft_model(model, peft.LoraConfig(r=8, target_modules=TARGETS))
    cpu = device_of_choice.type == "cpu"
    trainer = make(model, tmp_path / "out", optim=optim, use_cpu=cpu, gradient_checkpointing=True)
    trainer.train()
    found = losses(trainer)
    assert len(found) == 6 and min(found[4], found[5], found[6]) < found[1]
    assert {p.device.type for p in model.parameters()} == {device_of_choice.type}
    assert (tmp_path / "out/checkpoint-6/adapter_model.safetensors").exists()
