"""``nf4 eval``: perplexity on a text, of the 16-bit model, of NF4 and of NF4 with an adapter."""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Iterator
from typing import Any

from nf4.cli.data import read_texts
from nf4.cli.models import (
    add_model_arguments,
    config_of,
    is_quantized,
    load_model,
    load_tokenizer,
    model_bytes,
    quiet_transformers,
)
from nf4.cli.parser import Parser


def main(arguments: list[str]) -> int:
    parser = Parser("nf4 eval", __doc__)
    add_model_arguments(parser, adapter=True)
    parser.add_argument("--data", required=True, help="a .txt or .jsonl file, or a dataset's name")
    parser.add_argument("--split", default="test", help="split of a named dataset")
    parser.add_argument("--max-length", type=int, default=1024, help="tokens of a window")
    parser.add_argument("--max-windows", type=int, help="stop after so many windows")
    parser.add_argument("--json", action="store_true", help="print the rows as JSON")
    args = parser.parse_args(arguments)
    with quiet_transformers():
        rows = list(_rows(args))
    if args.json:
        print(json.dumps(rows))
        return 0
    from rich.console import Console
    from rich.table import Table

    table = Table("model", "memory (MiB)", "loss (nats/token)", "perplexity")
    for row in rows:
        table.add_row(
            row["model"],
            f"{row['bytes'] / 2**20:.1f}",
            f"{row['loss']:.4f}",
            f"{row['perplexity']:.3f}",
        )
    Console().print(table)
    return 0


def _rows(args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    import nf4

    tokenizer = load_tokenizer(args.model)
    windows = _windows(tokenizer, args)
    if not is_quantized(args.model):
        yield _row("16-bit", load_model(args.model, args.dtype, None), windows)
    model = load_model(args.model, args.dtype, config_of(args))
    name = args.format.upper() if args.format != "dynamic8" else "8-bit"
    yield _row(name, model, windows)
    if args.adapter:
        yield _row(f"{name} + adapter", nf4.load_adapter(model, args.adapter), windows)


def _windows(tokenizer: Any, args: argparse.Namespace) -> list[list[int]]:
    """Token windows of at most ``--max-length``, none of which crosses a document."""
    windows = []
    for text in read_texts(args.data, args.split):
        ids = tokenizer(text, verbose=False)["input_ids"]
        cut = [ids[i : i + args.max_length] for i in range(0, len(ids), args.max_length)]
        windows += [window for window in cut if len(window) > 1]
    if not windows:
        raise ValueError(f"--data {args.data} holds no text of two tokens or more")
    return windows[: args.max_windows]


def _row(name: str, model: Any, windows: list[list[int]]) -> dict[str, Any]:
    import torch
    from tqdm.auto import tqdm

    total = count = 0.0
    with torch.inference_mode():
        for window in tqdm(windows, desc=name, unit="window", disable=None):
            ids = torch.tensor([window], device=model.device)
            total += model.eval()(ids, labels=ids).loss.item() * (len(window) - 1)
            count += len(window) - 1
    return {
        "model": name,
        "bytes": model_bytes(model),
        "loss": total / count,
        "perplexity": math.exp(min(total / count, 700.0)),
        "tokens": int(count),
    }
