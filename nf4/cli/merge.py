"""``nf4 merge``: fold an adapter into a model's weights and save the result."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from nf4.cli.models import (
    add_model_arguments,
    config_of,
    is_quantized,
    load_model,
    load_tokenizer,
    local_folder,
    quiet_transformers,
    save_folder,
)
from nf4.cli.parser import Parser


def main(arguments: list[str]) -> int:
    parser = Parser("nf4 merge", __doc__)
    add_model_arguments(parser, adapter=True)
    parser.add_argument("--output", required=True, type=Path, help="new folder for the result")
    parser.add_argument("--into", choices=("16bit", "nf4"), default="16bit")
    parser.add_argument(
        "--base",
        choices=("original", "dequantized"),
        help="the weights to add the adapter to: the 16-bit ones of --model (the default for "
        "--into nf4), or the dequantized ones the adapter was trained over (for --into 16bit)",
    )
    args = parser.parse_args(arguments)
    if not args.adapter:
        raise ValueError("--adapter is needed: there is nothing else to merge")
    base = args.base or ("original" if args.into == "nf4" else "dequantized")
    if base == "original" and is_quantized(args.model):
        raise ValueError(
            f"--base original needs 16-bit weights, but --model {args.model} is quantized; "
            "name the 16-bit model, or take --base dequantized"
        )
    with quiet_transformers():
        save_folder(args.output, lambda folder: _merge(args, base, folder))
    print(f"{args.output}: merged into {args.into} over the {base} weights")
    return 0


def _merge(args: argparse.Namespace, base: str, folder: Path) -> None:
    import nf4

    model: Any = load_model(args.model, args.dtype, config_of(args))
    nf4.load_adapter(model, args.adapter)
    weights = local_folder(args.model) if base == "original" else None
    model = nf4.merge_and_unload(model, args.into, base=weights)
    model.save_pretrained(folder)
    load_tokenizer(args.model).save_pretrained(folder)
