"""``nf4 quantize``: a 16-bit checkpoint in, a quantized one out, one tensor in memory at a time."""

from __future__ import annotations

import argparse
from pathlib import Path

from nf4.cli.models import add_model_arguments, config_of, is_quantized, save_folder


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser("nf4 quantize", description=__doc__)
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

    source = _local(args.model)
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
        print(
            f"{args.output}: {sizes['written'] / 2**20:.1f} MiB, was "
            f"{sizes['read'] / 2**20:.1f} MiB ({ratio:.2f}x smaller)"
        )
    return 0


def _local(model: str) -> Path:
    """The folder of a checkpoint; a hub name is downloaded."""
    if Path(model).is_dir():
        return Path(model)
    from huggingface_hub import snapshot_download

    return Path(snapshot_download(model, ignore_patterns=["*.bin", "*.pt", "*.h5", "*.msgpack"]))
