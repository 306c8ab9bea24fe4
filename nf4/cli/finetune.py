"""``nf4 finetune``: QLoRA over transformers' Trainer (TRL's SFTTrainer).

Takes every TrainingArguments option besides its own, on the command line or in a YAML file
(``--config run.yaml``; the command line wins). Run the same command again to resume.
"""

from __future__ import annotations

import json
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from trl import SFTConfig, SFTTrainer, TrlParser

import nf4
from nf4.cli.data import load_rows, training_form
from nf4.cli.models import load_model, load_tokenizer, quiet_transformers
from nf4.cli.progress import show_status
from nf4.integrations.trainer import find_resume_checkpoint
from nf4.lora.prepare import count_parameters

PRESETS = ("auto", "small", "medium", "large")


@dataclass
class FinetuneArguments:
    """The options that are nf4's own."""

    model: str = field(metadata={"help": "folder of a checkpoint, or a hub name"})
    data: str = field(
        metadata={"help": "JSONL with text, instruction/output or messages; .txt; a dataset's name"}
    )
    eval_data: str | None = field(default=None, metadata={"help": "held-out data, same forms"})
    preset: str = field(
        default="auto", metadata={"help": "LoRA settings by model size: " + ", ".join(PRESETS)}
    )
    lora_r: int | None = field(default=None, metadata={"help": "rank, in place of the preset's"})
    lora_alpha: int | None = field(default=None, metadata={"help": "scaling numerator"})
    lora_dropout: float | None = field(default=None, metadata={"help": "of the adapter's input"})
    target_modules: list[str] | None = field(
        default=None, metadata={"help": "names of the layers to adapt, or all-linear"}
    )
    format: str = field(default="nf4", metadata={"help": "nf4, fp4 or dynamic8"})
    block_size: int = field(default=64, metadata={"help": "elements that share a scale"})
    double_quant: bool = field(default=True, metadata={"help": "quantize the scales as well"})
    model_dtype: str = field(default="bfloat16", metadata={"help": "of the 16-bit parts"})


@dataclass
class TrainingConfig(SFTConfig):
    """SFTConfig with QLoRA's defaults (arXiv:2305.14314, appendix B)."""

    learning_rate: float = 2e-4
    optim: str = "paged_adamw_8bit"
    lr_scheduler_type: str = "constant_with_warmup"
    max_grad_norm: float = 0.3
    logging_steps: float = 1
    save_steps: float = 50
    save_total_limit: int | None = 2
    report_to: str = "none"
    use_cpu: bool = not torch.cuda.is_available()
    include_num_input_tokens_seen: str = "all"
    gradient_checkpointing_kwargs: dict | str | None = field(
        default_factory=lambda: {"use_reentrant": False}
    )


def main(arguments: list[str]) -> int:
    arguments = ["--output_dir" if word == "--output" else word for word in arguments]
    kinds: Any = [FinetuneArguments, TrainingConfig]
    parser = TrlParser(kinds, prog="nf4 finetune")
    with quiet_transformers():
        own, training = parser.parse_args_and_config(arguments)
    if not training.output_dir:
        raise ValueError("--output is needed: a folder for the adapter and its checkpoints")
    if own.preset not in PRESETS:
        raise ValueError(f"--preset must be one of {', '.join(PRESETS)}, got {own.preset!r}")
    with quiet_transformers():
        return _train(own, training)


def _train(own: FinetuneArguments, training: TrainingConfig) -> int:
    output = Path(training.output_dir or "")
    resume = find_resume_checkpoint(output)
    config = nf4.NF4Config(
        block_size=own.block_size, double_quant=own.double_quant, format=own.format
    )
    rows = load_rows(own.data)
    tokenizer = load_tokenizer(own.model, chat="messages" in rows.column_names)
    model = load_model(own.model, own.model_dtype, config)
    trainer = SFTTrainer(
        model=model,
        args=training,
        train_dataset=_dataset(rows),
        eval_dataset=own.eval_data and _dataset(load_rows(own.eval_data, "validation")),
        processing_class=tokenizer,
        peft_config=_peft_config(own, model),
        optimizer_cls_and_kwargs=_optimizer(training),
    )
    show_status(trainer)
    trainable, total = count_parameters(model)  # PEFT put the adapters into it
    print(f"Training {trainable:,} of {total:,} parameters ({100 * trainable / total:.3f} %)")
    if resume is not None:
        print(f"Resuming from {resume}")
    trainer.train(resume_from_checkpoint=resume)
    log = trainer.state.log_history
    with tempfile.TemporaryDirectory(dir=output, prefix=".partial-") as name:
        whole = Path(name)
        trainer.save_model(name)
        (whole / "log.json").write_text(json.dumps(log, indent=1))
        plot_losses(log, whole / "loss.png")
        for path in whole.iterdir():  # written whole, then renamed: nothing is ever half there
            path.replace(output / path.name)
    losses = [row["loss"] for row in log if "loss" in row]
    print(f"{output}: adapter saved; loss {losses[0]:.3f} -> {losses[-1]:.3f}, curve in loss.png")
    return 0


def _dataset(rows: Any) -> Any:
    return rows.map(training_form, remove_columns=rows.column_names)


def _peft_config(own: FinetuneArguments, model: Any) -> Any:
    from peft import LoraConfig

    _, total = count_parameters(model)
    size = own.preset
    if size == "auto":
        size = "small" if total < 7e9 else "medium" if total <= 13e9 else "large"
    preset = nf4.LoraConfig.for_model_size(size)
    targets: Any = own.target_modules
    if targets == ["all-linear"]:
        targets = "all-linear"
    if targets is None:
        names = {name.rpartition(".")[2] for name, _ in model.named_modules()}
        known = set(preset.target_modules or []) <= names
        targets = preset.target_modules if known else "all-linear"  # other names than Llama's
    return LoraConfig(
        r=own.lora_r or preset.r,
        lora_alpha=own.lora_alpha or int(preset.lora_alpha),
        lora_dropout=preset.lora_dropout if own.lora_dropout is None else own.lora_dropout,
        target_modules=targets,
        task_type="CAUSAL_LM",
    )


def _optimizer(training: TrainingConfig) -> Any:
    """nf4's own optimizer for the names that transformers gives to bitsandbytes'."""
    from nf4 import optim

    classes = {
        "adamw_8bit": optim.AdamW8bit,
        "adamw_bnb_8bit": optim.AdamW8bit,
        "paged_adamw_8bit": optim.PagedAdamW8bit,
        "paged_adamw_32bit": optim.PagedAdamW32bit,
    }
    name = getattr(training.optim, "value", training.optim)
    if name not in classes:
        return None
    return classes[name], {
        "lr": training.learning_rate,
        "betas": (training.adam_beta1, training.adam_beta2),
        "eps": training.adam_epsilon,
    }


def plot_losses(log: list[dict[str, Any]], path: Path) -> None:
    """The loss curve of a Trainer log as a PNG."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, ax = pyplot.subplots(figsize=(6, 3.5), layout="constrained")
    for key, label in (("loss", "training"), ("eval_loss", "evaluation")):
        points = [(row["step"], row[key]) for row in log if key in row]
        if points:
            ax.plot(*zip(*points, strict=True), label=label)
    ax.set(xlabel="step", ylabel="loss (nats/token)")
    ax.legend()
    ax.grid(alpha=0.3)
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
