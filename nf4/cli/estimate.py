"""``nf4 estimate``: the memory of full fine-tuning, LoRA and QLoRA, from a config alone.

Counts a step of ``nf4 finetune`` with the LoRA settings it would take for the model's size.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

from nf4.cli.memory import COMPONENTS, METHODS, Estimate, estimate
from nf4.cli.models import (
    DTYPES,
    add_format_arguments,
    checkpoint_config,
    config_of,
    quiet_transformers,
)
from nf4.cli.parser import Parser
from nf4.cli.presets import PRESETS, describe, lora_config
from nf4.lora.adapter import write_atomically
from nf4.lora.prepare import count_parameters

GIB = 2**30
# Sequence lengths and batches to try, roomiest first, when looking for what fits.
_LENGTHS = (8192, 4096, 2048, 1024, 512, 256)
_BATCHES = (32, 16, 8, 4, 2, 1)
# Memory of the GPUs that are sold, in GiB.
_GPUS = (8, 12, 16, 24, 32, 40, 48, 80, 96, 141, 192, 288)


def main(arguments: list[str]) -> int:
    parser = Parser("nf4 estimate", __doc__)
    parser.add_argument("--model", required=True, help="folder, config.json or hub name")
    parser.add_argument("--batch-size", type=int, default=1, help="sequences at once")
    parser.add_argument("--length", type=int, default=2048, help="tokens of a sequence")
    parser.add_argument("--no-checkpointing", action="store_true", help="keep all activations")
    parser.add_argument("--gpu-gb", type=float, default=24.0, help="GPU memory to fit, in GiB")
    parser.add_argument("--preset", choices=PRESETS, default="auto", help="LoRA settings by size")
    parser.add_argument("--lora-r", type=int, help="rank, in place of the preset's")
    parser.add_argument("--target-modules", nargs="+", help="layers to adapt, or all-linear")
    parser.add_argument(
        "--optim", help="TrainingArguments' name; default: paged_adamw_8bit for QLoRA, else AdamW"
    )
    parser.add_argument("--dtype", choices=DTYPES, default="bfloat16", help="of the 16-bit parts")
    add_format_arguments(parser)
    parser.add_argument("--plot", type=Path, help="write a stacked-bar PNG here")
    parser.add_argument("--json", action="store_true", help="print bytes as JSON")
    args = parser.parse_args(arguments)
    for name in ("batch_size", "length", "gpu_gb"):
        if getattr(args, name) <= 0:
            raise ValueError(f"--{name.replace('_', '-')} must be positive")
    with quiet_transformers():
        config = _config(args.model)
        lora = _lora(args, config)
        estimates = [_estimate(args, config, lora, method) for method in METHODS]
        advice = _advice(args, config, lora, estimates[-1])
    if args.plot:
        write_atomically({args.plot: lambda path: _plot(estimates, args, Path(path))})
    if args.json:
        rows = [{**asdict(e), "total": e.total} for e in estimates]
        print(json.dumps({"lora": describe(lora), "estimates": rows, "advice": advice}))
        return 0
    _print(estimates, lora, args)
    for one in estimates[:-1]:
        verdict = "fits" if one.total <= args.gpu_gb * GIB else "does not fit"
        print(f"{one.method} on {args.gpu_gb:g} GiB: {verdict}")
    print(advice)
    return 0


def _config(model: str) -> Any:
    from transformers import AutoConfig

    path = Path(model)
    if path.is_file():
        values = json.loads(path.read_text())
        kind = values.get("model_type")
        if kind is None:
            raise ValueError(f"{path} names no model_type: not a model's config.json")
        values.pop("quantization_config", None)
        return AutoConfig.for_model(**values)
    checkpoint_config(model)  # a clear error for a folder that is no checkpoint
    config = AutoConfig.from_pretrained(model)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    return config


def _lora(args: argparse.Namespace, config: Any) -> Any:
    """The settings that ``nf4 finetune`` would take."""
    import torch
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    parameters = count_parameters(model)[1]
    return lora_config(model, parameters, args.preset, args.target_modules, r=args.lora_r)


def _estimate(
    args: argparse.Namespace, config: Any, lora: Any, method: str, **changes: Any
) -> Estimate:
    import torch

    settings: dict[str, Any] = {
        "dtype": getattr(torch, args.dtype),
        "lora": lora,
        "quantization": config_of(args),
        "optim": args.optim,
        "batch": args.batch_size,
        "length": args.length,
        "checkpointing": not args.no_checkpointing,
    }
    return estimate(config, method, **{**settings, **changes})


def _advice(args: argparse.Namespace, config: Any, lora: Any, qlora: Estimate) -> str:
    """Whether QLoRA fits the GPU, and if not, the roomiest settings that do, for finetune."""
    budget = args.gpu_gb * GIB
    question = f"qlora on {args.gpu_gb:g} GiB"
    if qlora.total <= budget:
        return f"{question}: fits, {(budget - qlora.total) / GIB:.1f} GiB to spare"
    if qlora.static > budget:
        return f"{question}: does not fit: {_needs(qlora.static)} before any activation"
    smallest = qlora
    for length in sorted({args.length, *(n for n in _LENGTHS if n < args.length)}, reverse=True):
        batches = {args.batch_size, *(n for n in _BATCHES if n < args.batch_size)}
        for batch in sorted(batches, reverse=True):
            changes = {"length": length, "batch": batch, "checkpointing": True}
            smallest = _estimate(args, config, lora, "qlora", **changes)
            if smallest.total <= budget:
                steps = -(-args.batch_size // batch)
                options = f"--per_device_train_batch_size {batch} --max_length {length}"
                if steps > 1:
                    options += f" --gradient_accumulation_steps {steps}"
                used = smallest.total / GIB
                return (
                    f"{question}: fits with nf4 finetune {options} "
                    f"--gradient_checkpointing True ({used:.3g} GiB)"
                )
    return f"{question}: does not fit: {_needs(smallest.total)} at the smallest batch"


def _needs(size: int) -> str:
    """A size, and the GPU that has it."""
    gpu = next((g for g in _GPUS if g * GIB >= size), None)
    return f"{size / GIB:.3g} GiB" + (f" (a GPU of {gpu} GiB)" if gpu else "")


def _unit(estimates: list[Estimate]) -> tuple[str, int]:
    """A tiny model is shown in MiB, so that its digits can be seen."""
    return ("GiB", GIB) if max(e.total for e in estimates) >= GIB else ("MiB", 2**20)


def _title(args: argparse.Namespace) -> str:
    checkpointing = "off" if args.no_checkpointing else "on"
    tokens = f"batch {args.batch_size} x {args.length} tokens"
    return f"{args.model}: {tokens}, checkpointing {checkpointing}"


def _print(estimates: list[Estimate], lora: Any, args: argparse.Namespace) -> None:
    from rich.console import Console
    from rich.table import Table

    unit, size = _unit(estimates)
    print(f"{_title(args)}\nadapters: {describe(lora)}")
    table = Table(f"{unit}")
    for method in METHODS:
        table.add_column(method, justify="right")
    for name in (*COMPONENTS, "total"):
        cells = [f"{getattr(e, name) / size:.3f}" for e in estimates]
        table.add_row(name, *cells, end_section=name == COMPONENTS[-1])
    Console().print(table)


def _plot(estimates: list[Estimate], args: argparse.Namespace, path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    unit, size = _unit(estimates)
    figure, ax = pyplot.subplots(figsize=(8, 3.5), layout="constrained")
    left = [0.0] * len(estimates)
    for name in COMPONENTS:
        sizes = [getattr(e, name) / size for e in estimates]
        ax.barh([e.method for e in estimates], sizes, left=left, label=name)
        left = [a + b for a, b in zip(left, sizes, strict=True)]
    longest = max(left)
    for row, total in enumerate(left):
        ax.text(total + longest / 100, row, f"{total:.3g}", va="center", fontsize="small")
    gpu = args.gpu_gb * GIB / size
    if gpu <= 2 * longest:  # a line far out would leave no room for the bars
        ax.axvline(gpu, color="black", linestyle="--", label=f"{args.gpu_gb:g} GiB")
    ax.set(xlabel=unit, title=_title(args), xlim=(0, max(1.1 * longest, min(gpu, 2 * longest))))
    ax.invert_yaxis()
    figure.legend(loc="outside right center", fontsize="small")
    figure.savefig(path, dpi=120, format="png")
    pyplot.close(figure)
