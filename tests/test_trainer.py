"""transformers' Trainer and TRL over NF4 models: optimizers, evaluation, checkpoints, resume."""

from __future__ import annotations

import random
import shutil
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from test_drop_in import save_tokenizer
from test_peft import LAYERS, Calls, config, fused

import nf4
from nf4.integrations import trainer as integration

transformers = pytest.importorskip("transformers")
peft = pytest.importorskip("peft")
pytest.importorskip("accelerate")

pytestmark = pytest.mark.usefixtures("one_thread")
__all__ = ["fused"]  # a fixture that the tests below take by name


@pytest.fixture(autouse=True)
def no_bitsandbytes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have the optimizer names resolve here also where bitsandbytes is installed."""
    monkeypatch.setattr(integration, "importable", lambda name: False)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model")
    torch.manual_seed(0)
    tiny.llama().save_pretrained(path)
    return path


def quantized(folder: Path, device: str = "cpu", **kwargs: Any) -> Any:
    """The model of ``folder``, quantized while it is loaded."""
    return transformers.AutoModelForCausalLM.from_pretrained(
        folder, quantization_config=nf4.NF4Config(), device_map={"": device}, **kwargs
    )


def load(folder: Path, **kwargs: Any) -> Any:
    """The quantized model with a LoRA adapter, the same one every time."""
    torch.manual_seed(1)
    model = quantized(folder)
    return peft.get_peft_model(model, config(**{"lora_dropout": 0.05, **kwargs}))


def rows(count: int, seed: int = 0) -> list[dict[str, list[int]]]:
    generator = random.Random(seed)
    ids = [[generator.randrange(3, 40) for _ in range(10)] for _ in range(count)]
    return [{"input_ids": row, "labels": row} for row in ids]


def make(model: Any, out: Path, **kwargs: Any) -> Any:
    settings = {
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 2,
        "max_steps": 6,
        "learning_rate": 5e-3,
        "logging_steps": 1,
        "save_strategy": "steps",
        "save_steps": 3,
        "optim": "paged_adamw_8bit",
        "bf16": True,
        "use_cpu": True,
        "report_to": "none",
        "disable_tqdm": True,
        "seed": 3,
    }
    args = transformers.TrainingArguments(str(out), **{**settings, **kwargs})
    return transformers.Trainer(
        model=model, args=args, train_dataset=rows(16), eval_dataset=rows(4, seed=9)
    )


def losses(trainer: Any) -> dict[int, float]:
    return {row["step"]: row["loss"] for row in trainer.state.log_history if "loss" in row}


@pytest.mark.parametrize(("name", "kind"), integration.OPTIMIZERS.items())
def test_optimizer_names(name: str, kind: str, folder: Path, tmp_path: Path) -> None:
    trainer = make(load(folder), tmp_path, optim=name, weight_decay=0.1, adam_beta2=0.95)
    optimizer = trainer.create_optimizer()
    assert type(optimizer) is getattr(nf4.optim, kind)
    assert optimizer.defaults["betas"] == (0.9, 0.95) and optimizer.defaults["lr"] == 5e-3
    assert {group["weight_decay"] for group in optimizer.param_groups} <= {0.1, 0.0}


def test_names_stay_bitsandbytes_own_where_it_is_installed(monkeypatch, tmp_path: Path) -> None:
    assert integration.resolves_here("paged_adamw_8bit")
    assert not integration.resolves_here("adamw_torch") and not integration.resolves_here(
        "lion_8bit"
    )
    monkeypatch.setattr(integration, "importable", lambda name: True)
    assert not integration.resolves_here("paged_adamw_8bit")
    args = transformers.TrainingArguments(str(tmp_path), optim="adamw_torch", use_cpu=True)
    found, _ = transformers.Trainer.get_optimizer_cls_and_kwargs(args)
    assert found is torch.optim.AdamW


CHECKPOINTING = {
    "off": {},
    "reentrant": {"use_reentrant": True},
    "non_reentrant": {"use_reentrant": False},
}


@pytest.mark.parametrize("kind", CHECKPOINTING)
def test_resume_repeats_the_losses(kind: str, folder: Path, tmp_path: Path) -> None:
    settings: dict[str, Any] = {"eval_strategy": "steps", "eval_steps": 2}
    if CHECKPOINTING[kind]:
        settings["gradient_checkpointing"] = True
        settings["gradient_checkpointing_kwargs"] = CHECKPOINTING[kind]

    def model() -> Any:
        found = load(folder)
        if kind == "reentrant":
            found.enable_input_require_grads()
        return found

    whole = make(model(), tmp_path / "whole", **settings)
    whole.train()
    expected = losses(whole)
    assert len(expected) == 6 and min(list(expected.values())[3:]) < expected[1]

    # A newer checkpoint that is not whole does not get in the way.
    broken = tmp_path / "whole" / "checkpoint-6"
    weights = broken / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    checkpoint = integration.find_resume_checkpoint(tmp_path / "whole")
    assert checkpoint is not None and checkpoint.endswith("checkpoint-3") and not broken.exists()
    resumed = make(model(), tmp_path / "whole", **settings)
    resumed.train(resume_from_checkpoint=checkpoint)
    assert {k: v for k, v in losses(resumed).items() if k > 3} == {
        k: expected[k] for k in (4, 5, 6)
    }
    final = dict(whole.model.named_parameters())
    for name, parameter in resumed.model.named_parameters():
        assert torch.equal(parameter, final[name]), name


def own_adapters(folder: Path) -> Any:
    """The quantized model with nf4's own adapters, the same ones every time."""
    model = quantized(folder)
    torch.manual_seed(1)
    lora = nf4.LoraConfig(r=4, lora_dropout=0.05, target_modules="all-linear")
    return nf4.prepare_model(model, lora=lora, progress=False)


def test_resume_takes_a_whole_checkpoint(folder: Path, tmp_path: Path, fused: Calls) -> None:
    """Also of nf4's own adapters, where ``resume_from_checkpoint=True`` is all that is said."""
    whole = make(own_adapters(folder), tmp_path)
    whole.train()
    assert fused.count == 6 * 2 * LAYERS
    expected = losses(whole)
    weights = tmp_path / "checkpoint-6" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    resumed = make(own_adapters(folder), tmp_path)
    resumed.train(resume_from_checkpoint=True)
    assert (tmp_path / "checkpoint-6.broken").is_dir()
    assert {k: v for k, v in losses(resumed).items() if k > 3} == {
        k: expected[k] for k in (4, 5, 6)
    }
    with pytest.raises(ValueError, match="No valid checkpoint"):
        make(own_adapters(folder), tmp_path / "none").train(resume_from_checkpoint=True)


@pytest.mark.parametrize("scaled", [False, True])
def test_float16(scaled: bool, folder: Path, tmp_path: Path, fused: Calls) -> None:
    """A float16 model; with ``fp16=True``, which Trainer has for GPUs only, also scaled losses."""
    if scaled and not torch.cuda.is_available():
        pytest.skip("fp16=True: needs a CUDA device")
    torch.manual_seed(1)
    model = quantized(folder, "cuda" if scaled else "cpu", dtype=torch.float16)
    model = peft.get_peft_model(model, config(lora_dropout=0.05))
    trainer = make(model, tmp_path, bf16=False, fp16=scaled, use_cpu=not scaled, save_strategy="no")
    trainer.train()
    assert fused.count == 6 * 2 * LAYERS
    assert losses(trainer)[6] < losses(trainer)[1]


def test_evaluation_changes_nothing(folder: Path, tmp_path: Path) -> None:
    """B5: on CPUs with AVX512_BF16 bitsandbytes' first evaluation spoils every later gradient."""
    # Without dropout: starting a data loader draws a random number, whatever the model.
    quiet = make(load(folder, lora_dropout=0.0), tmp_path, save_strategy="no")
    quiet.train()
    evaluated = make(
        load(folder, lora_dropout=0.0),
        tmp_path,
        save_strategy="no",
        eval_strategy="steps",
        eval_steps=1,
    )
    evaluated.train()
    assert losses(evaluated) == losses(quiet)
    assert all(p.dtype is torch.float32 for p in quiet.model.parameters() if p.requires_grad)


def test_load_best_model_at_end(folder: Path, tmp_path: Path) -> None:
    trainer = make(
        load(folder),
        tmp_path,
        eval_strategy="steps",
        eval_steps=3,
        load_best_model_at_end=True,
        metric_for_best_model="eval_loss",
        greater_is_better=True,  # the worse one, so that it is not the last
    )
    trainer.train()
    assert trainer.state.best_model_checkpoint == str(tmp_path / "checkpoint-3")
    stored = peft.load_peft_weights(str(tmp_path / "checkpoint-3"))
    now = peft.get_peft_model_state_dict(trainer.model)
    assert stored.keys() == now.keys()
    assert all(torch.equal(stored[k].to(now[k].device), now[k]) for k in now)


@pytest.mark.timeout(300)  # compilers are started
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_torch_compile(folder: Path, tmp_path: Path, backend: str) -> None:
    if backend == "inductor" and not (torch.cuda.is_available() or shutil.which("g++")):
        pytest.skip("inductor: no C++ compiler")
    plain = make(load(folder), tmp_path, save_strategy="no", max_steps=2)
    plain.train()
    torch._dynamo.reset()
    compiled = make(
        load(folder),
        tmp_path,
        save_strategy="no",
        max_steps=2,
        torch_compile=True,
        torch_compile_backend=backend,
    )
    compiled.train()
    for step, loss in losses(plain).items():
        assert losses(compiled)[step] == pytest.approx(loss, rel=0.02)


def test_trl(folder: Path, tmp_path: Path, fused: Calls) -> None:
    trl = pytest.importorskip("trl")
    datasets = pytest.importorskip("datasets")
    save_tokenizer(tmp_path)
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path)
    tokenizer.pad_token = tokenizer.eos_token
    model = quantized(folder)
    args = trl.SFTConfig(
        str(tmp_path / "out"),
        max_steps=2,
        per_device_train_batch_size=2,
        gradient_checkpointing=False,
        optim="paged_adamw_8bit",
        use_cpu=True,
        bf16=True,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        max_length=16,
    )
    trainer = trl.SFTTrainer(
        model=model,
        args=args,
        train_dataset=datasets.Dataset.from_dict({"text": ["the cat sat on the mat"] * 8}),
        processing_class=tokenizer,
        peft_config=config(lora_dropout=0.05),
    )
    trainer.train()
    assert fused.count == 2 * LAYERS
    assert type(trainer.optimizer.optimizer) is nf4.optim.PagedAdamW8bit
