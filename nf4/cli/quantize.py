"""``nf4 quantize``: a 16-bit checkpoint in, a quantized one out, one tensor in memory at a time."""

from __future__ import annotations

from pathlib import Path

from nf4.cli.models import (
    add_model_arguments,
    config_of,
    is_quantized,
    local_folder,
    save_folder,
    size_text,
)
from nf4.cli.parser import Parser


def main(arguments: list[str]) -> int:
    parser = Parser("nf4 quantize", __doc__)
    add_model_arguments(parser)
    parser.add_argument("--output", required=True, type=Path, help="new folder for the result")
    parser.add_argument("--json", action="store_true", help="print the sizes as JSON")
    args = parser.parse_args(arguments)
    if is_quantized(args.model):
        raise ValueError(f"--model {args.model} is quantized already")

    import json

    import torch
    from tqdm.auto import tqdm

    from nf4.integrations.stream import quantize_checkpoint

    source = local_folder(args.model)
    sizes = {}

    def write(folder: Path) -> None:
        with tqdm(desc="Quantizing", unit="tensor", disable=None) as bar:
            sizes.update(
                quantize_checkpoint(
                    source,
                    folder,
                    config_of(args),
                    getattr(torch, args.dtype),
                    on_tensor=lambda name: bar.update(),
                )
            )

    save_folder(args.output, write)
    if args.json:
        print(json.dumps({"output": str(args.output), **sizes}))
    else:
        ratio = sizes["read"] / sizes["written"]
        written, read = size_text(sizes["written"]), size_text(sizes["read"])
        print(f"{args.output}: {written}, was {read} ({ratio:.2f}x smaller)")
    return 0
