"""``nf4 demo``: the whole QLoRA story on a small model, on any machine, in a few minutes.

Stages, each resumed from its last checkpoint when the command is run again:

1. train a small Llama from scratch on Python's own documentation and sources,
2. quantize it to NF4 with double quantization and fine-tune LoRA adapters on ten pairs,
3. save the adapter, load it into a freshly quantized model, generate, merge, compare.
"""

from __future__ import annotations

import argparse
import json
import shutil
import time
from pathlib import Path
from typing import Any

from nf4.cli.models import model_bytes, save_folder
from nf4.lora.adapter import write_atomically

OUTPUT = "demo_output"
VOCAB_SIZE, WINDOW, BATCH = 2048, 128, 16
PRETRAIN_STEPS, FINETUNE_STEPS = 300, 240


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser("nf4 demo", description=__doc__.partition("\n\n")[0])
    parser.add_argument("--output", type=Path, default=Path(OUTPUT), help="folder for the results")
    parser.add_argument("--fresh", action="store_true", help="delete earlier results first")
    parser.add_argument("--pretrain-steps", type=int, default=PRETRAIN_STEPS)
    parser.add_argument("--finetune-steps", type=int, default=FINETUNE_STEPS)
    args = parser.parse_args(arguments)
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.set_seed(0)
    if args.fresh and args.output.exists():
        shutil.rmtree(args.output)
    args.output.mkdir(parents=True, exist_ok=True)

    started = time.monotonic()
    base = _pretrain(args.output, args.pretrain_steps)
    adapter, before, finetune_log = _finetune(args.output, base, args.finetune_steps)
    results = {"pairs loss before": before, **_compare(base, adapter)}
    results["seconds"] = time.monotonic() - started
    results["QLoRA tokens/s"] = finetune_log["tokens_per_second"]
    _plot(args.output)
    text = json.dumps(results, indent=2, ensure_ascii=False)
    write_atomically(
        args.output / "results.json", lambda path: Path(path).write_text(text, encoding="utf-8")
    )
    _print_table(results, args.output)
    return 0


def _train(
    model: Any, dataset: Any, output: Path, steps: int, collator: Any = None, **options: Any
) -> dict[str, Any]:
    """Run Trainer in ``output``, from its last sound checkpoint if there is one."""
    import torch
    from transformers import Trainer, TrainingArguments

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
        **options,
    )
    trainer = Trainer(
        model=model,
        args=arguments,
        train_dataset=dataset,
        data_collator=collator,
        optimizer_cls_and_kwargs=optimizer,
    )
    resume = find_resume_checkpoint(output)
    if resume is not None:
        print(f"Resuming from {resume}")
    started = time.monotonic()
    trainer.train(resume_from_checkpoint=resume)
    trainer.save_state()
    elapsed = time.monotonic() - started
    return {"seconds": elapsed, "log": trainer.state.log_history}


def _pretrain(output: Path, steps: int) -> Path:
    """Train the base model; the folder of the finished 16-bit model."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from nf4.cli.demo_corpus import TextWindows, corpus_text, train_tokenizer

    final = output / "base"
    if final.exists():
        print(f"Base model: {final} is there already")
        return final
    text = corpus_text()
    print(f"Base model: a small Llama from scratch on {len(text) / 1e6:.1f} MB of Python text")
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


def _finetune(output: Path, base: Path, steps: int) -> tuple[Path, float, dict[str, Any]]:
    """QLoRA on the pairs: the adapter's folder, the loss before, and the run's figures."""
    from transformers import DataCollatorForSeq2Seq

    import nf4
    from nf4.cli.demo_corpus import Pairs
    from nf4.optim import PagedAdamW8bit

    final, notes = output / "adapter", output / "finetune.json"
    if final.exists() and notes.exists():
        print(f"Adapter: {final} is there already")
        saved = json.loads(notes.read_text())
        return final, saved["before"], saved
    lora = nf4.LoraConfig(r=16, lora_alpha=32, lora_dropout=0.05, target_modules="all-linear")
    model, tokenizer = _load(base, lora)
    nf4.print_trainable_parameters(model)
    dataset = Pairs(tokenizer)
    before = _pairs_loss(model, dataset)
    figures = _train(
        model,
        dataset,
        output / "finetune",
        steps,
        DataCollatorForSeq2Seq(tokenizer, label_pad_token_id=-100),
        per_device_train_batch_size=len(dataset),
        optimizer=(PagedAdamW8bit, {"lr": 5e-3, "weight_decay": 0.0}),
    )
    speed = next(e for e in reversed(figures["log"]) if "train_steps_per_second" in e)
    tokens = sum(len(row["input_ids"]) for row in dataset.rows)
    figures = {
        "before": before,
        "tokens_per_second": speed["train_steps_per_second"] * tokens,
        "seconds": figures["seconds"],
    }
    nf4.save_adapter(model, final)
    text = json.dumps(figures)
    write_atomically(notes, lambda path: Path(path).write_text(text))
    return final, before, figures


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


def _answers(model: Any, tokenizer: Any) -> tuple[list[tuple[str, str]], float]:
    """Greedy answers to every instruction, and the tokens generated a second."""
    import torch
    from tqdm.auto import tqdm

    from nf4.cli.demo_corpus import pairs, prompt

    answers, tokens, started = [], 0, time.monotonic()
    for pair in tqdm(pairs(), desc="Generating", unit="answer", disable=None):
        inputs = tokenizer(prompt(pair["instruction"]), return_tensors="pt").to(model.device)
        inputs.pop("token_type_ids", None)
        with torch.no_grad():
            ids = model.generate(**inputs, max_new_tokens=64, do_sample=False)
        new = ids[0, inputs["input_ids"].shape[1] :]
        tokens += len(new)
        answers.append((pair["instruction"], tokenizer.decode(new, skip_special_tokens=True)))
    return answers, tokens / (time.monotonic() - started)


def _compare(base: Path, adapter: Path) -> dict[str, Any]:
    """Reload everything from disk and measure each stage."""
    import nf4
    from nf4.cli.demo_corpus import Pairs

    results: dict[str, Any] = {}
    plain, tokenizer = _load(base, quantize=False)
    results["16-bit bytes"] = model_bytes(plain)
    del plain
    model, tokenizer = _load(base)
    dataset = Pairs(tokenizer)
    results["NF4 bytes"] = model_bytes(model)
    nf4.load_adapter(model, adapter)
    results["adapter bytes"] = (adapter / "adapter_model.safetensors").stat().st_size
    results["pairs loss after (NF4 + adapter, reloaded)"] = _pairs_loss(model, dataset)
    results["answers"], results["generated tokens/s"] = _answers(model, tokenizer)
    results["linear bytes 16-bit"], results["linear bytes NF4"] = _linear_bytes(model)
    merged = nf4.merge_and_unload(model, into="16bit")
    results["pairs loss merged into 16 bits"] = _pairs_loss(merged, dataset)
    model, _ = _load(base)
    nf4.load_adapter(model, adapter)
    merged = nf4.merge_and_unload(model, into="nf4", base=base)
    results["pairs loss merged into NF4 (16-bit base)"] = _pairs_loss(merged, dataset)
    return results


def _linear_bytes(model: Any) -> tuple[int, int]:
    from nf4 import NF4Linear

    quantized = [m.q for m in model.modules() if isinstance(m, NF4Linear)]
    return 2 * sum(q.numel() for q in quantized), sum(q.nbytes for q in quantized)


def _plot(output: Path) -> None:
    """The loss curves of both trainings, from Trainer's own state files."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 2, figsize=(10, 3.5), layout="constrained")
    titles = {"pretrain": "Base model, from scratch", "finetune": "QLoRA on ten pairs"}
    for ax, (folder, title) in zip(axes, titles.items(), strict=True):
        log = json.loads((output / folder / "trainer_state.json").read_text())["log_history"]
        points = [(row["step"], row["loss"]) for row in log if "loss" in row]
        ax.plot(*zip(*points, strict=True))
        ax.set(title=title, xlabel="step", ylabel="loss (nats/token)", ylim=(0, None))
        ax.grid(alpha=0.3)
    write_atomically(output / "loss.png", lambda path: figure.savefig(path, dpi=120, format="png"))
    pyplot.close(figure)


def _print_table(results: dict[str, Any], output: Path) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(title="nf4 demo", show_header=False)
    sizes = ("16-bit bytes", "NF4 bytes", "linear bytes 16-bit", "linear bytes NF4")
    for name, value in results.items():
        if name in sizes or name == "adapter bytes":
            table.add_row(name.replace("bytes", "memory").strip(), f"{value / 2**20:.2f} MiB")
        elif name != "answers":
            table.add_row(name, f"{value:.4g}")
    console = Console()
    console.print(table)
    answers = Table("instruction", "answer of NF4 + adapter", title="Generated")
    for instruction, answer in results["answers"]:
        answers.add_row(instruction, answer)
    console.print(answers)
    console.print(f"Loss curves: {output / 'loss.png'}   All figures: {output / 'results.json'}")
