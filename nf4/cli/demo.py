"""``nf4 demo``: the whole QLoRA story on a small model, on any machine, in a few minutes.

Stages, each resumed from its last checkpoint when the command is run again:

1. train a small Llama from scratch on Python's own documentation and sources,
2. quantize it to NF4 with double quantization and fine-tune LoRA adapters on ten pairs,
3. save the adapter, load it into a freshly quantized model, generate, merge, compare.
"""

from __future__ import annotations

import json
import shutil
import time
from pathlib import Path
from typing import Any

from nf4.cli.models import model_bytes, quiet_transformers, save_folder
from nf4.cli.parser import Parser
from nf4.lora.adapter import write_atomically

OUTPUT = "demo_output"
VOCAB_SIZE, WINDOW, BATCH = 2048, 128, 16
PRETRAIN_STEPS, FINETUNE_STEPS = 300, 160
MERGED_16BIT, MERGED_NF4 = "merged into 16 bits", "merged into NF4, from the 16-bit base"


def main(arguments: list[str]) -> int:
    parser = Parser("nf4 demo", __doc__.partition("\n\n")[0])
    parser.add_argument("--output", type=Path, default=Path(OUTPUT), help="folder for the results")
    parser.add_argument("--fresh", action="store_true", help="delete earlier results first")
    parser.add_argument("--pretrain-steps", type=int, default=PRETRAIN_STEPS)
    parser.add_argument("--finetune-steps", type=int, default=FINETUNE_STEPS)
    args = parser.parse_args(arguments)
    # What the last stage needs is missed now, not after minutes of training.
    import matplotlib  # noqa: F401
    import rich  # noqa: F401
    import transformers

    if args.fresh and args.output.exists():
        shutil.rmtree(args.output)
    args.output.mkdir(parents=True, exist_ok=True)
    print(f"This takes a few minutes; stopped, it goes on where it was. Results: {args.output}/")
    transformers.set_seed(0)
    started = time.monotonic()
    with quiet_transformers(bars=False):  # loading takes no time here
        base = _pretrain(args.output, args.pretrain_steps)
        adapter, finetuning = _finetune(args.output, base, args.finetune_steps)
        print("3/3 Everything again from disk: quantize, load the adapter, generate, merge")
        compared = _compare(base, adapter)
    results = {**compared, "fine-tuning tokens/s": finetuning["tokens_per_second"]}
    results["seconds"] = time.monotonic() - started
    _plot(args.output, results)
    text = json.dumps(results, indent=2, ensure_ascii=False)
    write_atomically(
        {args.output / "results.json": lambda path: Path(path).write_text(text, encoding="utf-8")}
    )
    print_table(results, args.output)
    return 0


def _train(
    model: Any, dataset: Any, output: Path, steps: int, collator: Any = None, **options: Any
) -> float:
    """Run Trainer in ``output``, from its last sound checkpoint if there is one.

    Returns the tokens a second.
    """
    import torch
    from transformers import Trainer, TrainingArguments

    from nf4.cli.progress import show_status
    from nf4.integrations.trainer import find_resume_checkpoint

    optimizer = options.pop("optimizer", None)
    arguments = TrainingArguments(
        output_dir=str(output),
        max_steps=steps,
        logging_steps=5,
        save_steps=max(steps // 8, 1),
        save_total_limit=2,
        report_to=[],
        dataloader_pin_memory=torch.cuda.is_available(),
        warmup_steps=steps // 20,
        lr_scheduler_type="cosine",
        include_num_input_tokens_seen="non_padding" if collator else "all",
        **options,
    )
    trainer = Trainer(
        model=model,
        args=arguments,
        train_dataset=dataset,
        data_collator=collator,
        optimizer_cls_and_kwargs=optimizer,
    )
    status = show_status(trainer)
    resume = find_resume_checkpoint(output)
    if resume is not None:
        print(f"Resuming from {resume}")
    trainer.train(resume_from_checkpoint=resume)
    trainer.save_state()
    return status.speed


def _pretrain(output: Path, steps: int) -> Path:
    """Train the base model; the folder of the finished 16-bit model."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from nf4.cli.demo_corpus import TextWindows, corpus_text, train_tokenizer

    final = output / "base"
    if final.exists():
        print(f"1/3 Base model: {final} is there already")
        return final
    text = corpus_text()
    print(f"1/3 Base model: a small Llama from scratch on {len(text) / 1e6:.1f} MB of Python text")
    tokenizer = train_tokenizer(text, VOCAB_SIZE)
    config = LlamaConfig(
        vocab_size=VOCAB_SIZE,
        hidden_size=256,
        intermediate_size=704,
        num_hidden_layers=4,
        num_attention_heads=4,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        # 1/sqrt(hidden): with the usual 0.02 the head, tied to embeddings that small, cannot give
        # a high logit to tokens that only the pairs hold, and fine-tuning stalls at a loss of 1.3.
        initializer_range=0.0625,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    model: Any = LlamaForCausalLM(config)
    _train(
        model,
        TextWindows(tokenizer, text, WINDOW),
        output / "pretrain",
        steps,
        per_device_train_batch_size=BATCH,
        learning_rate=2e-3,
        weight_decay=0.1,
    )
    model.to(torch.bfloat16)
    save_folder(final, lambda path: (model.save_pretrained(path), tokenizer.save_pretrained(path)))
    return final


def _load(base: Path, lora: Any = None, quantize: bool = True) -> tuple[Any, Any]:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    import nf4

    tokenizer = AutoTokenizer.from_pretrained(base)
    model: Any = AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16)
    if torch.cuda.is_available():
        model = model.to("cuda")
    if quantize:
        nf4.prepare_model(model, nf4.NF4Config(double_quant=True), lora)
    return model.eval(), tokenizer


def _finetune(output: Path, base: Path, steps: int) -> tuple[Path, dict[str, Any]]:
    """QLoRA on the pairs: the adapter's folder and the run's figures."""
    from transformers import DataCollatorForSeq2Seq

    import nf4
    from nf4.cli.demo_corpus import Pairs
    from nf4.optim import PagedAdamW8bit

    final, notes = output / "adapter", output / "finetune.json"
    if final.exists() and notes.exists():
        print(f"2/3 Adapter: {final} is there already")
        return final, json.loads(notes.read_text())
    lora = nf4.LoraConfig(r=16, lora_alpha=32, lora_dropout=0.05, target_modules="all-linear")
    model, tokenizer = _load(base, lora)
    dataset = Pairs(tokenizer)
    print(f"2/3 QLoRA: LoRA adapters over the model in NF4, on {len(dataset)} instruction pairs")
    nf4.print_trainable_parameters(model)
    speed = _train(
        model,
        dataset,
        output / "finetune",
        steps,
        DataCollatorForSeq2Seq(tokenizer, label_pad_token_id=-100),
        per_device_train_batch_size=len(dataset),
        optimizer=(PagedAdamW8bit, {"lr": 5e-3, "weight_decay": 0.0}),
    )
    nf4.save_adapter(model, final)
    figures = {"tokens_per_second": speed}
    text = json.dumps(figures)
    write_atomically({notes: lambda path: Path(path).write_text(text)})
    return final, figures


def _pairs_loss(model: Any, dataset: Any) -> float:
    """Mean loss over the answers' tokens."""
    import torch

    training = model.training
    model.eval()
    total = count = 0.0
    with torch.no_grad():
        for row in dataset.rows:
            ids = torch.tensor([row["input_ids"]], device=model.device)
            labels = torch.tensor([row["labels"]], device=model.device)
            n = int((labels[:, 1:] != -100).sum())
            total += model(ids, labels=labels).loss.item() * n
            count += n
    model.train(training)
    return total / count


def _answers(model: Any, tokenizer: Any, length: int) -> tuple[list[str], float]:
    """Greedy answers of at most ``length`` tokens, and the tokens generated a second."""
    import torch
    from tqdm.auto import tqdm

    from nf4.cli.demo_corpus import pairs, prompt

    answers, tokens, started = [], 0, time.monotonic()
    for pair in tqdm(pairs(), desc="Generating", unit="answer", disable=None, leave=False):
        inputs = tokenizer(prompt(pair["instruction"]), return_tensors="pt").to(model.device)
        inputs.pop("token_type_ids", None)
        with torch.no_grad():
            ids = model.generate(**inputs, max_new_tokens=length, do_sample=False)
        new = ids[0, inputs["input_ids"].shape[1] :]
        tokens += len(new)
        answers.append(tokenizer.decode(new, skip_special_tokens=True))
    return answers, tokens / (time.monotonic() - started)


def _compare(base: Path, adapter: Path) -> dict[str, Any]:
    """Reload everything from disk and measure each stage."""
    import nf4
    from nf4.cli.demo_corpus import Pairs, pairs

    model, tokenizer = _load(base, quantize=False)
    dataset = Pairs(tokenizer)
    stages: dict[str, Any] = {"16-bit base": _stage(model, dataset)}
    model, _ = _load(base)
    stages["NF4 base"] = _stage(model, dataset)
    before, _ = _answers(model, tokenizer, length=16)
    nf4.load_adapter(model, adapter)
    stages["NF4 + adapter, reloaded"] = _stage(model, dataset)
    after, speed = _answers(model, tokenizer, length=64)
    bytes_16bit, bytes_nf4 = _linear_bytes(model)
    stages[MERGED_16BIT] = _stage(nf4.merge_and_unload(model, into="16bit"), dataset)
    model, _ = _load(base)
    nf4.load_adapter(model, adapter)
    stages[MERGED_NF4] = _stage(nf4.merge_and_unload(model, into="nf4", base=base), dataset)
    instructions = [pair["instruction"] for pair in pairs()]
    return {
        "stages": stages,
        "adapter bytes": (adapter / "adapter_model.safetensors").stat().st_size,
        "linear layers": {"16-bit bytes": bytes_16bit, "NF4 bytes": bytes_nf4},
        "answers": list(zip(instructions, before, after, strict=True)),
        "generation tokens/s": speed,
    }


def _stage(model: Any, dataset: Any) -> dict[str, float]:
    return {"bytes": model_bytes(model), "loss": _pairs_loss(model, dataset)}


def _linear_bytes(model: Any) -> tuple[int, int]:
    from nf4 import NF4Linear

    quantized = [m.q for m in model.modules() if isinstance(m, NF4Linear)]
    return 2 * sum(q.numel() for q in quantized), sum(q.nbytes for q in quantized)


def _plot(output: Path, results: dict[str, Any]) -> None:
    """The loss curves of both trainings, from Trainer's own state files."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (left, right) = pyplot.subplots(1, 2, figsize=(10, 4), layout="constrained")
    left.plot(*_loss_curve(output / "pretrain"))
    left.set(title="Base model, from scratch on Python's own text", ylim=(0, None))
    right.semilogy(*_loss_curve(output / "finetune"), label="training")
    for color, (name, stage) in zip(("C3", "C2"), _before_and_after(results), strict=True):
        right.axhline(stage["loss"], color=color, linestyle="--", linewidth=1, label=name)
    right.set(title="QLoRA on ten instruction pairs (log scale)")
    right.legend()
    for axes in (left, right):
        axes.set(xlabel="step", ylabel="loss (nats/token)")
        axes.grid(alpha=0.3)
    write_atomically(
        {output / "loss.png": lambda path: figure.savefig(path, dpi=120, format="png")}
    )
    pyplot.close(figure)


def _loss_curve(folder: Path) -> tuple[list[int], list[float]]:
    log = json.loads((folder / "trainer_state.json").read_text())["log_history"]
    rows = [row for row in log if "loss" in row]
    return [row["step"] for row in rows], [row["loss"] for row in rows]


def _before_and_after(results: dict[str, Any]) -> list[tuple[str, dict[str, float]]]:
    stages = results["stages"]
    return [(name, stages[name]) for name in ("NF4 base", "NF4 + adapter, reloaded")]


def print_table(results: dict[str, Any], output: Path) -> None:
    """The story in one table: memory and loss of each stage, speeds, answers."""
    from rich import box
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    def mib(count: float) -> str:
        return f"{count / 2**20:.2f} MiB"

    def header(*cells: str) -> None:
        table.add_section()
        table.add_row(*(Text(cell, style="bold") for cell in cells))
        table.add_section()

    table = Table(title="nf4 demo", show_header=False, box=box.ROUNDED)
    for _ in range(3):
        table.add_column(overflow="fold")  # Chinese has no spaces to break at
    header("stage", "memory", "loss on the pairs")
    for name, stage in results["stages"].items():
        table.add_row(name, mib(stage["bytes"]), f"{stage['loss']:.4f}")
    table.add_row("the adapter's file", mib(results["adapter bytes"]), "")
    linear = results["linear layers"]
    smaller = linear["16-bit bytes"] / linear["NF4 bytes"]
    sizes = f"{mib(linear['16-bit bytes'])} -> {mib(linear['NF4 bytes'])}"
    table.add_row("linear layers alone", sizes, f"{smaller:.2f} times smaller")
    header("speed", "tokens a second", "")
    table.add_row("QLoRA fine-tuning", f"{results['fine-tuning tokens/s']:.0f}", "")
    table.add_row("generation, NF4 + adapter", f"{results['generation tokens/s']:.0f}", "")
    header("instruction", "NF4 base says", "NF4 + adapter says")
    for instruction, before, after in results["answers"]:
        said = " ".join(before.split())[:24] or "(blank lines)"
        table.add_row(instruction, Text(said, style="dim"), Text(after))
    console = Console(highlight=False)
    console.print(table)
    minutes, seconds = divmod(round(results["seconds"]), 60)
    console.print(f"Loss curves: {output / 'loss.png'}   All figures: {output / 'results.json'}")
    console.print(f"This run took {minutes} min {seconds} s.")
