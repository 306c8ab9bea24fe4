"""``nf4 estimate``: the memory of full fine-tuning, LoRA and QLoRA, from a config alone."""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

from nf4.cli.memory import COMPONENTS, METHODS, Estimate, estimate
from nf4.cli.models import DTYPES, add_format_arguments, config_of

GIB = 2**30
# Sequence lengths and batches to try, roomiest first, when looking for what fits.
_LENGTHS = (4096, 2048, 1024, 512, 256)
_BATCHES = (8, 4, 2, 1)


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser("nf4 estimate", description=__doc__)
    parser.add_argument("--model", required=True, help="folder, config.json or hub name")
    parser.add_argument("--dtype", choices=DTYPES, default="bfloat16", help="of the 16-bit parts")
    add_format_arguments(parser)
    parser.add_argument("--lora-r", type=int, default=16)
    parser.add_argument("--target-modules", nargs="+", default=["all-linear"])
    parser.add_argument("--batch-size", type=int, default=1)
    parser.add_argument("--length", type=int, default=2048, help="tokens of a sequence")
    parser.add_argument("--no-checkpointing", action="store_true", help="keep all activations")
    parser.add_argument("--gpu-gb", type=float, default=24.0, help="GPU memory to fit, in GiB")
    parser.add_argument("--optim", help="optimizer's name in TrainingArguments")
    parser.add_argument("--plot", type=Path, help="write a stacked-bar PNG here")
    parser.add_argument("--json", action="store_true", help="print bytes as JSON")
    args = parser.parse_args(arguments)
    config = _config(args.model)
    estimates = [_estimate(args, config, method) for method in METHODS]
    advice = _advice(args, config, estimates[-1])
    if args.plot:
        _plot(estimates, args)
    if args.json:
        rows = [{**asdict(e), "total": e.total} for e in estimates]
        print(json.dumps({"estimates": rows, "advice": advice}))
        return 0
    _print(estimates, args)
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
    if path.is_dir() and not (path / "config.json").exists():
        raise FileNotFoundError(f"{path} holds no config.json: not a model checkpoint")
    config = AutoConfig.from_pretrained(model)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    return config


def _estimate(args: argparse.Namespace, config: Any, method: str, **changes: Any) -> Estimate:
    import torch

    import nf4

    targets = args.target_modules
    settings: dict[str, Any] = {
        "dtype": getattr(torch, args.dtype),
        "lora": nf4.LoraConfig(
            r=args.lora_r, target_modules="all-linear" if targets == ["all-linear"] else targets
        ),
        "quantization": config_of(args),
        "optim": args.optim,
        "batch": args.batch_size,
        "length": args.length,
        "checkpointing": not args.no_checkpointing,
    }
    return estimate(config, method, **{**settings, **changes})


def _advice(args: argparse.Namespace, config: Any, qlora: Estimate) -> str:
    """Whether QLoRA fits the GPU, and if not, the roomiest settings that do."""
    budget = args.gpu_gb * GIB
    question = f"QLoRA on {args.gpu_gb:g} GiB"
    if qlora.total <= budget:
        return f"{question}: fits, {(budget - qlora.total) / GIB:.1f} GiB to spare"
    static = qlora.total - qlora.activations
    if static > budget:
        return f"{question}: does not fit at any length: {static / GIB:.1f} GiB before activations"
    for length in _LENGTHS:
        for batch in _BATCHES:
            if length > args.length or batch > args.batch_size:
                continue
            tried = _estimate(args, config, "qlora", length=length, batch=batch, checkpointing=True)
            if tried.total <= budget:
                return (
                    f"{question}: fits with --batch-size {batch} --length {length} and "
                    f"checkpointing ({tried.total / GIB:.1f} GiB)"
                )
    return f"{question}: does not fit; {static / GIB:.1f} GiB are needed before activations"


def _print(estimates: list[Estimate], args: argparse.Namespace) -> None:
    from rich.console import Console
    from rich.table import Table

    checkpointing = "off" if args.no_checkpointing else "on"
    # A tiny model is shown in MiB, so that its digits can be seen.
    unit, size = ("GiB", GIB) if estimates[0].total >= GIB else ("MiB", 2**20)
    title = (
        f"{args.model}: {unit}, batch {args.batch_size} x {args.length} tokens, "
        f"checkpointing {checkpointing}"
    )
    table = Table("component", *METHODS, title=title)
    for name in (*COMPONENTS, "total"):
        cells = [f"{getattr(e, name) / size:.3f}" for e in estimates]
        table.add_row(name, *cells, end_section=name == COMPONENTS[-1])
    Console().print(table)


def _plot(estimates: list[Estimate], args: argparse.Namespace) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, ax = pyplot.subplots(figsize=(7, 3.5), layout="constrained")
    left = [0.0] * len(estimates)
    for name in COMPONENTS:
        sizes = [getattr(e, name) / GIB for e in estimates]
        ax.barh([e.method for e in estimates], sizes, left=left, label=name)
        left = [a + b for a, b in zip(left, sizes, strict=True)]
    ax.axvline(args.gpu_gb, color="black", linestyle="--", label=f"{args.gpu_gb:g} GiB")
    ax.set(xlabel="GiB", title=f"{args.model}, batch {args.batch_size} x {args.length}")
    ax.invert_yaxis()
    ax.legend(fontsize="small")
    figure.savefig(args.plot, dpi=120)
    pyplot.close(figure)
