"""``nf4 finetune``: train a LoRA adapter over a quantized model.

Run the same command again to resume from the last checkpoint. The adapter, its loss curve
(loss.png) and its log (log.json) go to the output folder.
"""

from __future__ import annotations

import argparse
import difflib
import json
import math
import shutil
import sys
import tempfile
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import torch
from trl import SFTConfig, SFTTrainer, TrlParser

import nf4
from nf4.cli.data import DATA_HELP, load_rows, tokenize
from nf4.cli.losses import loss_summary, plot_losses
from nf4.cli.models import (
    DTYPES,
    checkpoint_config,
    load_model,
    load_tokenizer,
    quiet_transformers,
)
from nf4.cli.parser import OneLineErrors
from nf4.cli.presets import PRESETS, describe, lora_config
from nf4.cli.progress import Status, show_status
from nf4.formats import WEIGHT_FORMATS
from nf4.integrations.trainer import OPTIMIZERS, find_resume_checkpoint, optimizer_class
from nf4.lora.adapter import make_readable
from nf4.lora.prepare import count_parameters


@dataclass
class FinetuneArguments:
    """The options that are nf4's own."""

    model: str = field(metadata={"help": "folder of a checkpoint, or a hub name"})
    data: str = field(metadata={"help": DATA_HELP})
    eval_data: str | None = field(default=None, metadata={"help": "held-out data, same forms"})
    preset: str = field(
        default="auto",
        metadata={
            "help": "LoRA settings by model size; small (< 7B): r=8, alpha=16 on the attention "
            "projections; medium (7-13B): r=16, alpha=32 on the same; large (> 13B): r=16, "
            "alpha=32 on gate, up and down as well",
            "choices": list(PRESETS),
        },
    )
    lora_r: int | None = field(default=None, metadata={"help": "rank, in place of the preset's"})
    lora_alpha: int | None = field(default=None, metadata={"help": "scaling numerator"})
    lora_dropout: float | None = field(default=None, metadata={"help": "of the adapter's input"})
    target_modules: list[str] | None = field(
        default=None, metadata={"help": "names of the layers to adapt, or all-linear"}
    )
    format: str = field(
        default="nf4", metadata={"help": "of the weights", "choices": list(WEIGHT_FORMATS)}
    )
    block_size: int = field(default=64, metadata={"help": "elements that share a scale"})
    double_quant: bool = field(default=True, metadata={"help": "quantize the scales as well"})
    model_dtype: str = field(
        default="bfloat16", metadata={"help": "of the 16-bit parts", "choices": list(DTYPES)}
    )


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

    def __post_init__(self) -> None:
        if not self.output_dir:  # transformers would make a folder "trainer_output"
            raise ValueError("--output is needed: a folder for the adapter and its checkpoints")
        super().__post_init__()


# What a checkpoint holds beside the adapter and its tokenizer.
_RESUME_ONLY = shutil.ignore_patterns(
    "optimizer.*", "scheduler.*", "scaler.*", "rng_state*", "trainer_state.json"
)

# What --help shows of the options that come from transformers and TRL.
_COMMON = (
    "max_steps",
    "num_train_epochs",
    "learning_rate",
    "per_device_train_batch_size",
    "gradient_accumulation_steps",
    "gradient_checkpointing",
    "max_length",
    "packing",
    "completion_only_loss",
    "optim",
    "lr_scheduler_type",
    "warmup_steps",
    "logging_steps",
    "save_steps",
    "save_total_limit",
    "eval_strategy",
    "eval_steps",
    "seed",
)


class _Parser(OneLineErrors, TrlParser):
    """HfArgumentParser with a ``--config`` file and errors of one line."""


def main(arguments: list[str]) -> int:
    if "-h" in arguments or "--help" in arguments:
        print(_help())
        return 0
    parser = _parser()
    if "--help-all" in arguments:
        parser.print_help()
        return 0
    words = [w.replace("--output", "--output_dir", 1) if _is_output(w) else w for w in arguments]
    with quiet_transformers():
        own, training, unknown = _parse(parser, words)
        if unknown:
            _refuse(parser, unknown[0])
        try:
            return _train(own, training)
        except KeyboardInterrupt:
            last = find_resume_checkpoint(training.output_dir or "")
            way = f"goes on from {last}" if last else "starts anew: no checkpoint was due yet"
            print(f"nf4 finetune: interrupted; the same command {way}", file=sys.stderr)
            return 130


def _is_output(word: str) -> bool:
    return word == "--output" or word.startswith("--output=")


def _parser() -> _Parser:
    kinds: Any = [FinetuneArguments, TrainingConfig]
    return _Parser(kinds, prog="nf4 finetune", allow_abbrev=False)


def _parse(
    parser: _Parser, words: list[str]
) -> tuple[FinetuneArguments, TrainingConfig, list[str]]:
    """Own and training arguments, and the words that are no option's."""
    for at, word in enumerate(words):  # the form that TrlParser does not know
        if word.startswith("--config="):
            words = [*words[:at], "--config", word.partition("=")[2], *words[at + 1 :]]
    if words[-1:] == ["--config"]:
        parser.error("--config needs a YAML file")
    own, training, unknown = parser.parse_args_and_config(words, return_remaining_strings=True)
    return own, training, unknown


def _refuse(parser: _Parser, word: str) -> None:
    options = [option for action in parser._actions for option in action.option_strings]
    word = word.partition("=")[0]
    close = difflib.get_close_matches(word, options, n=1)
    hint = f"; did you mean {close[0]}?" if close else ""
    parser.exit(2, f"{parser.prog}: no option {word}{hint} (--help-all lists them all)\n")


def _help() -> str:
    """The options of nf4 and the common ones of TrainingArguments, out of some 150."""
    shown = OneLineErrors(
        "nf4 finetune",
        usage="nf4 finetune --model M --data D --output O [options] [--config run.yaml]",
        description=(__doc__ or "").replace("``", ""),
        epilog="Every other option of transformers' TrainingArguments and TRL's SFTConfig is taken "
        "as well: nf4 finetune --help-all lists them. A YAML file holds the same names; the "
        "command line wins over it.",
    )
    # The first of a name: after it comes its --no_<name>.
    actions = {action.dest: action for action in reversed(_parser()._actions)}
    group = shown.add_argument_group("model, data and adapter")
    group.add_argument("--output", metavar="O", help="folder for the adapter and its checkpoints")
    group.add_argument("--config", metavar="FILE", help="YAML file of options")
    for name in (f.name for f in fields(FinetuneArguments)):
        _show(group, name, actions[name])
    group = shown.add_argument_group("training")
    for name in _COMMON:
        _show(group, name, actions[name])
    return shown.format_help().rstrip()


def _show(group: argparse._ArgumentGroup, name: str, action: argparse.Action) -> None:
    text = (action.help or "").partition(". ")[0]
    plain = action.default in (None, argparse.SUPPRESS)
    default = "" if plain else f" (default: {getattr(action.default, 'value', action.default)})"
    group.add_argument(
        f"--{name}", metavar=name.split("_")[-1].upper(), help=text.replace("%", "%%") + default
    )


def _train(own: FinetuneArguments, training: TrainingConfig) -> int:
    output = Path(training.output_dir or "")
    for left in output.glob(".partial-*"):  # by a process that was killed while it wrote
        shutil.rmtree(left)
    checkpoint_config(own.model)  # before data is read: a model's name is easily mistyped
    resume = find_resume_checkpoint(output)
    trainer = _trainer(own, training)
    state = {} if resume is None else json.loads((Path(resume) / "trainer_state.json").read_text())
    # Trainer would train one step more.
    finished = resume if state.get("global_step", -1) >= _steps(trainer) else None
    if finished is None:
        if resume is not None:
            print(f"Resuming from {resume}", flush=True)
        try:
            trainer.train(resume_from_checkpoint=resume)
        except KeyboardInterrupt:
            status: Any = trainer.pop_callback(Status)
            status.close()
            raise
    if trainer.is_world_process_zero():
        log = trainer.state.log_history if finished is None else state["log_history"]
        with tempfile.TemporaryDirectory(dir=output, prefix=".partial-") as name:
            whole = Path(name)
            if finished is None:
                trainer.save_model(name)
            else:
                print(f"All {state['global_step']} steps are done: {finished}")
                shutil.copytree(finished, name, ignore=_RESUME_ONLY, dirs_exist_ok=True)
            (whole / "log.json").write_text(json.dumps(log, indent=1))
            plot_losses(log, whole / "loss.png")
            # Each written whole, then renamed; the weights last, so that with them all is there.
            for path in sorted(whole.iterdir(), key=lambda p: p.suffix == ".safetensors"):
                make_readable(path)
                path.replace(output / path.name)
        print(f"{output}: adapter saved; {loss_summary(log)}, curve in loss.png")
    return 0


def _steps(trainer: SFTTrainer) -> int:
    """The optimizer steps of the whole run, by Trainer's own rule."""
    args = trainer.args
    if args.max_steps > 0:
        return args.max_steps
    batches = len(trainer.get_train_dataloader())
    in_epoch = max(math.ceil(batches / args.gradient_accumulation_steps), 1)
    return math.ceil(args.num_train_epochs * in_epoch)


def _trainer(own: FinetuneArguments, training: TrainingConfig) -> SFTTrainer:
    rows = load_rows(own.data)
    tokenizer = _tokenizer(own, training, chat="messages" in rows.column_names)
    dataset = _dataset(rows, tokenizer, training)
    held_out = None
    if own.eval_data:
        held_out = _dataset(load_rows(own.eval_data, "validation"), tokenizer, training)
    config = nf4.NF4Config(
        block_size=own.block_size, double_quant=own.double_quant, format=own.format
    )
    model = load_model(own.model, own.model_dtype, config)
    lora = lora_config(
        model,
        count_parameters(model)[1],
        own.preset,
        own.target_modules,
        r=own.lora_r,
        lora_alpha=own.lora_alpha,
        lora_dropout=own.lora_dropout,
    )
    trainer = AtomicCheckpoints(
        model=model,
        args=training,
        train_dataset=dataset,
        eval_dataset=held_out,
        processing_class=tokenizer,
        peft_config=_for_peft(lora),
        optimizer_cls_and_kwargs=_optimizer(training),
    )
    show_status(trainer)
    trainable, total = count_parameters(model)  # PEFT put the adapters into it
    share = 100 * trainable / total
    print(f"Training {trainable:,} of {total:,} parameters ({share:.3f} %): {describe(lora)}")
    left = f", {len(rows) - len(dataset)} left out" if len(dataset) < len(rows) else ""
    print(f"Data: {len(dataset)} sequences of {len(rows)} rows{left}", flush=True)
    return trainer


def _tokenizer(own: FinetuneArguments, training: TrainingConfig, chat: bool) -> Any:
    """The model's tokenizer as TRL's options change it, which TRL applies too late for us."""
    template = None
    if training.chat_template_path:
        path = Path(training.chat_template_path)
        if path.suffix not in (".jinja", ".j2"):
            raise ValueError(f"--chat_template_path must be a .jinja file, got {path}")
        template, training.chat_template_path = path.read_text(encoding="utf-8"), None
    tokenizer = load_tokenizer(own.model, chat=chat and template is None)
    if template is not None:
        tokenizer.chat_template = template
    if training.eos_token:
        tokenizer.eos_token = training.eos_token
    training.assistant_only_loss = False  # tokenize() learns nothing else of a conversation
    return tokenizer


def _dataset(rows: Any, tokenizer: Any, training: TrainingConfig) -> Any:
    return tokenize(
        rows,
        tokenizer,
        training.max_length,
        training.completion_only_loss is not False,
        training.dataset_num_proc,
    )


def _for_peft(lora: nf4.LoraConfig) -> Any:
    from peft import LoraConfig

    return LoraConfig(
        r=lora.r,
        lora_alpha=int(lora.lora_alpha),
        lora_dropout=lora.lora_dropout,
        target_modules=lora.target_modules,
        task_type="CAUSAL_LM",
    )


def _optimizer(training: TrainingConfig) -> Any:
    """nf4's own optimizer for the names that transformers gives to bitsandbytes'."""
    name = getattr(training.optim, "value", training.optim)
    if name not in OPTIMIZERS:
        return None
    return optimizer_class(name), {
        "lr": training.learning_rate,
        "betas": (training.adam_beta1, training.adam_beta2),
        "eps": training.adam_epsilon,
    }


class AtomicCheckpoints(SFTTrainer):
    """Writes a checkpoint under a temporary name and renames it when it is whole.

    Trainer writes into ``checkpoint-<step>`` itself, so that a killed process leaves half of one.
    """

    _staging: Path | None = None

    def _get_output_dir(self, trial: Any) -> str:
        return super()._get_output_dir(trial) if self._staging is None else str(self._staging)

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """PEFT writes one beside the adapter; TRL's would go to its final name bit by bit."""

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        if self.args.push_to_hub:  # uploads from the final name
            super()._save_checkpoint(model, trial)
            return
        output = Path(self._get_output_dir(trial))
        name = f"checkpoint-{self.state.global_step}"
        best = self.state.best_model_checkpoint
        self._staging = output / f".partial-{name}"
        try:
            super()._save_checkpoint(model, trial)
            self.accelerator.wait_for_everyone()
            if self.args.should_save:
                staged, final = self._staging / name, output / name
                if self.state.best_model_checkpoint != best:  # it is this one: by its final name
                    self.state.best_model_checkpoint = str(final)
                    self.state.save_to_json(str(staged / "trainer_state.json"))
                if final.exists():  # of an earlier run in this folder
                    shutil.rmtree(final)
                staged.rename(final)
                shutil.rmtree(self._staging)
        finally:
            self._staging = None
        self.accelerator.wait_for_everyone()
        if self.args.should_save:
            self._delete_old(output)

    def _delete_old(self, output: Path) -> None:
        """Keep ``save_total_limit`` checkpoints, the newest and the best among them."""
        found = sorted(output.glob("checkpoint-*[0-9]"), key=lambda p: int(p.name.split("-")[-1]))
        keep = {str(found[-1]), self.state.best_model_checkpoint} - {None}
        extra = len(found) - max(self.args.save_total_limit or len(found), len(keep))
        for old in [p for p in found if str(p) not in keep][: max(extra, 0)]:
            hidden = output / f".partial-{old.name}"
            old.rename(hidden)  # a kill between two files leaves no half of a checkpoint
            shutil.rmtree(hidden)
