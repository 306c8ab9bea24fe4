"""``nf4 tune``: measure the Triton kernels' configurations on this GPU for one model's layers.

The fastest of each op, shape and row count go to a table that the Triton backend reads before its
built-in rules. Rows between two tuned counts take the larger one's entry.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import torch

from nf4.backends import triton, tune, tuning_table
from nf4.cli.models import DTYPES, checkpoint_config
from nf4.cli.parser import Parser
from nf4.formats import BLOCK_SIZES

DEVICE = torch.device("cuda")
TOKENS = (1, 8, 16, 32, 64, 256, 2048, 8192)


def main(arguments: list[str]) -> int:
    parser = Parser("nf4 tune", __doc__)
    where = parser.add_mutually_exclusive_group(required=True)
    where.add_argument("--model", help="folder, config.json or hub name, for its layers' shapes")
    where.add_argument("--shapes", nargs="+", type=shape, help="weights as NxK: 14336x4096 ...")
    parser.add_argument("--tokens", nargs="+", type=int, default=list(TOKENS), help="row counts")
    parser.add_argument("--dtype", choices=DTYPES, default="bfloat16", help="of the activations")
    parser.add_argument("--block-size", type=int, default=64, choices=BLOCK_SIZES)
    parser.add_argument("--no-double-quant", action="store_true", help="float32 scales")
    parser.add_argument("--output", type=Path, help="table to write; default: the one that is read")
    parser.add_argument("--json", action="store_true", help="print the results as JSON lines")
    args = parser.parse_args(arguments)
    if min(args.tokens) < 1:
        raise ValueError(f"--tokens must be positive, got {min(args.tokens)}")
    reason = triton.unsupported(DEVICE)
    if reason is not None:
        raise RuntimeError(f"needs a GPU that Triton runs on: {reason}")
    output = args.output or tuning_table.path()
    if output is None:
        raise ValueError(f"{tuning_table.VARIABLE} is empty: name a table with --output")

    name = torch.cuda.get_device_name(DEVICE)
    shapes = args.shapes or layer_shapes(args.model)
    todo = list(
        tune.problems(
            sorted(set(shapes)),
            sorted(set(args.tokens)),
            getattr(torch, args.dtype),
            args.block_size,
            not args.no_double_quant,
            DEVICE,
        )
    )
    start = time.monotonic()
    for number, problem in enumerate(todo, 1):
        result = tune.search(problem, DEVICE, tune.gpu_clock)
        # After each, so that an interrupted run keeps what it measured.
        tuning_table.write(output, name, [result.entry])
        print(json.dumps(row(result)) if args.json else line(result), flush=True)
        if not args.json and number % 10 == 0:
            print(f"{number} of {len(todo)}, {time.monotonic() - start:.0f} s", flush=True)
    if not args.json:
        print(f"{output}: {len(todo)} entries for {name}")
        if output != tuning_table.path():
            print(f"use it with {tuning_table.VARIABLE}={output}")
    return 0


def shape(text: str) -> tuple[int, int]:
    """``NxK`` as (n, k)."""
    n, _, k = text.lower().partition("x")
    if not (n.isdigit() and k.isdigit() and int(n) and int(k)):
        raise argparse.ArgumentTypeError(f"a shape is NxK, such as 14336x4096, got {text!r}")
    return int(n), int(k)


def layer_shapes(model: str) -> list[tuple[int, int]]:
    """(n, k) of the linear layers that quantization takes: all but the head."""
    from transformers import AutoConfig, AutoModelForCausalLM

    values = checkpoint_config(model)
    values.pop("quantization_config", None)
    config = AutoConfig.for_model(values.pop("model_type"), **values)
    with torch.device("meta"):
        built = AutoModelForCausalLM.from_config(config)
    head = built.get_output_embeddings()
    return [
        (module.out_features, module.in_features)
        for module in built.modules()
        if isinstance(module, torch.nn.Linear) and module is not head
    ]


def row(result: tune.Result) -> dict[str, Any]:
    """A result as one JSON object."""
    entry = tuning_table.row(result.entry)
    times = {"ms": result.seconds * 1e3, "builtin_ms": result.builtin_seconds * 1e3}
    return {**entry, **times, "tried": result.tried, "dropped": list(result.dropped)}


def line(result: tune.Result) -> str:
    """A result for people."""
    p, c = result.problem, result.config
    gain = result.builtin_seconds / result.seconds
    chosen = "workspace"
    if c is not None:
        chosen = f"{c.block_m}x{c.block_n}x{c.block_k} warps {c.num_warps} stages {c.num_stages}"
        chosen += f" split {c.split}" if c.split > 1 else ""
        chosen += " permuted" if c.permute else ""
    return (
        f"{p.op + (' masked' if p.dropout else ''):<22} {p.n}x{p.k} M={p.m:<5} "
        f"{result.builtin_seconds * 1e6:9.1f} -> {result.seconds * 1e6:9.1f} us ({gain:.2f}x)  "
        f"{chosen}; {result.tried} tried, {len(result.dropped)} dropped"
    )
