"""The estimate against real training steps: exact bytes, and activations by saved-tensor hooks."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import nf4
import nf4.optim as optim_classes

transformers = pytest.importorskip("transformers")

from nf4.cli import estimate as command  # noqa: E402 needs transformers
from nf4.cli.memory import (  # noqa: E402
    METHODS,
    Estimate,
    build,
    decoder_layers,
    estimate,
    record_saved,
)


def _config(**changes: Any) -> Any:
    settings = {
        "hidden_size": 64,
        "intermediate_size": 100,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": 97,
    }
    return transformers.LlamaConfig(**{**settings, **changes})


def _real_model(config: Any, lora: nf4.LoraConfig) -> nn.Module:
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    return nf4.prepare_model(model, lora=lora, progress=False).train()


@pytest.mark.parametrize("optim", ["adamw_torch", "paged_adamw_8bit"])
def test_static_bytes_equal_a_real_run(optim: str) -> None:
    config, lora = _config(hidden_size=128), nf4.LoraConfig(r=32, target_modules="all-linear")
    predicted = estimate(config, "qlora", lora=lora, optim=optim, length=16)
    model = _real_model(config, lora)
    parameters = [p for p in model.parameters() if p.requires_grad]
    kinds = {"adamw_torch": torch.optim.AdamW, "paged_adamw_8bit": optim_classes.PagedAdamW8bit}
    optimizer = kinds[optim](parameters)
    ids = torch.randint(0, 97, (1, 16))
    model(ids, labels=ids).loss.backward()
    optimizer.step()
    adapters = sum(p.nbytes for p in parameters)
    layers = [m for m in model.modules() if isinstance(m, nf4.NF4Linear)]
    scales = sum(t.nbytes for m in layers for t in m.q.tensors[1:] if t is not None)
    everything = sum(t.nbytes for t in [*model.parameters(), *model.buffers()])
    assert predicted.adapters == adapters
    assert predicted.scales == scales
    assert predicted.weights == everything - adapters - scales
    assert predicted.gradients == sum(p.grad.nbytes for p in parameters)
    assert predicted.optimizer == _state_bytes(optimizer)


def _state_bytes(optimizer: torch.optim.Optimizer) -> int:
    """Bytes of the state tensors, each storage once, without the shared code tables."""
    tables = {"qmap1", "qmap2"}
    storages = {
        value.untyped_storage()._cdata: value.untyped_storage().nbytes()
        for state in optimizer.state.values()
        for name, value in state.items()
        if isinstance(value, torch.Tensor) and name not in tables
    }
    return sum(storages.values())


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("checkpointing", [False, True])
def test_activations_are_within_a_tenth_of_a_real_step(method: str, checkpointing: bool) -> None:
    config = _config()
    lora = nf4.LoraConfig(r=8, target_modules="all-linear", lora_dropout=0.05)
    batch, length = 3, 40
    predicted = estimate(
        config, method, lora=lora, batch=batch, length=length, checkpointing=checkpointing
    )
    model = build(config, method, torch.bfloat16, lora, None).to_empty(device="cpu")
    for tensor in [*model.parameters(), *model.buffers()]:
        nn.init.zeros_(tensor)
    ids = torch.randint(0, 97, (batch, length))
    layers = decoder_layers(model)
    with record_saved(model, layers) as saved:
        model(ids, labels=ids, use_cache=False)
    if checkpointing:
        inside = max(count for owner, count in saved.items() if owner is not None)
        measured = saved[None] + inside + len(layers) * batch * length * 64 * 2
    else:
        measured = sum(saved.values())
    assert abs(predicted.activations - measured) <= 0.1 * measured


def test_a_65b_model_is_counted_from_its_config(tmp_path: Path, capsys: Any) -> None:
    config = _config(
        hidden_size=8192,
        intermediate_size=22016,
        num_hidden_layers=80,
        num_attention_heads=64,
        num_key_value_heads=64,
        vocab_size=32000,
    )
    path = tmp_path / "config.json"
    path.write_text(json.dumps(config.to_dict()))
    words = ["--model", str(path), "--length", "512", "--plot", str(tmp_path / "e.png"), "--json"]
    assert command.main([*words, "--gpu-gb", "48"]) == 0
    report = json.loads(capsys.readouterr().out)
    rows = {row["method"]: row for row in report["estimates"]}
    linear = 80 * (4 * 8192**2 + 3 * 8192 * 22016)
    blocks = linear // 64
    offsets = 80 * 7
    assert rows["qlora"]["scales"] == blocks + 4 * -(-blocks // 256) + 4 * offsets
    assert rows["full"]["weights"] > 2 * linear
    assert rows["qlora"]["total"] < 48 * 2**30 < rows["lora"]["total"]
    assert "fits" in report["advice"]
    assert (tmp_path / "e.png").stat().st_size > 1000


def test_advice_finds_what_fits(tmp_path: Path, capsys: Any) -> None:
    path = tmp_path / "config.json"
    path.write_text(json.dumps(_config().to_dict()))
    words = ["--model", str(path), "--length", "4096", "--batch-size", "8", "--json"]

    def advice(gib: float) -> str:
        command.main([*words, "--gpu-gb", str(gib)])
        return json.loads(capsys.readouterr().out)["advice"]

    assert "to spare" in advice(10)
    assert "fits with --batch-size" in advice(0.02)
    assert "does not fit at any length" in advice(0.0001)


def test_total_is_the_sum() -> None:
    assert Estimate("full", 1, 2, 3, 4, 5, 6).total == 21
