"""Loading and saving whole models for the commands."""

from __future__ import annotations

import argparse
import contextlib
import json
import logging as std_logging
import shutil
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import nf4
from nf4.lora.adapter import make_readable

DTYPES = ("bfloat16", "float16", "float32")
_UNITS = {"GiB": 2**30, "MiB": 2**20, "KiB": 2**10}


def add_model_arguments(parser: argparse.ArgumentParser, adapter: bool = False) -> None:
    """``--model`` and what goes with it."""
    parser.add_argument("--model", required=True, help="folder of a checkpoint, or a hub name")
    if adapter:
        parser.add_argument("--adapter", help="folder of a LoRA adapter (PEFT's files)")
    parser.add_argument("--dtype", choices=DTYPES, default="bfloat16", help="of the 16-bit parts")
    add_format_arguments(parser)


def add_format_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of ``NF4Config``."""
    parser.add_argument("--format", choices=("nf4", "fp4", "dynamic8"), default="nf4")
    parser.add_argument("--block-size", type=int, default=64)
    parser.add_argument("--no-double-quant", action="store_true", help="float32 scales")


def config_of(args: argparse.Namespace) -> nf4.NF4Config:
    """The ``NF4Config`` that the options describe."""
    return nf4.NF4Config(
        block_size=args.block_size, double_quant=not args.no_double_quant, format=args.format
    )


def checkpoint_config(model: str) -> dict[str, Any]:
    """``config.json`` of a checkpoint; FileNotFoundError if a folder has none."""
    folder = Path(model)
    if not folder.exists():  # a hub name: let the library fetch it
        from transformers import AutoConfig

        try:
            return AutoConfig.from_pretrained(model).to_dict()
        except OSError as error:
            raise FileNotFoundError(
                f"--model {model}: no such folder, and the hub did not give it"
            ) from error
    path = folder / "config.json" if folder.is_dir() else folder
    if not path.exists():
        raise FileNotFoundError(f"{folder} holds no config.json: not a model checkpoint")
    return json.loads(path.read_text())


def local_folder(model: str) -> Path:
    """The folder of a checkpoint; a hub name is downloaded."""
    if Path(model).is_dir():
        return Path(model)
    from huggingface_hub import snapshot_download

    return Path(snapshot_download(model, ignore_patterns=["*.bin", "*.pt", "*.h5", "*.msgpack"]))


def is_quantized(model: str) -> bool:
    """Whether the checkpoint holds quantized weights already."""
    return bool(checkpoint_config(model).get("quantization_config"))


def load_model(model: str, dtype: str, quantization: nf4.NF4Config | None) -> Any:
    """A causal LM in eval mode; ``quantization`` None loads the checkpoint as it is."""
    import torch
    from transformers import AutoModelForCausalLM

    from nf4.integrations.transformers import take_bitsandbytes

    if dtype not in DTYPES:
        raise ValueError(f"the dtype must be one of {', '.join(DTYPES)}, got {dtype!r}")
    take_bitsandbytes()  # this process is nf4's: bitsandbytes' checkpoints too
    checkpoint_config(model)  # a clear error for a folder that is no checkpoint
    options: dict[str, Any] = {"dtype": getattr(torch, dtype)}
    if quantization is not None and not is_quantized(model):
        options["quantization_config"] = quantization
    if torch.cuda.is_available():
        options["device_map"] = "cuda"
    return AutoModelForCausalLM.from_pretrained(model, **options).eval()


def load_tokenizer(model: str, chat: bool = False) -> Any:
    """The tokenizer of a checkpoint, with a padding token.

    ValueError if ``chat`` and it has no chat template.
    """
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model)
    if chat and tokenizer.chat_template is None:
        raise ValueError(
            f"{model} has no chat template: leave out --chat to generate, train on rows of "
            "instruction and output, or put a chat_template.jinja into its folder"
        )
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def model_bytes(model: Any) -> int:
    """Bytes of all parameters and buffers, tied ones once."""
    tensors = {t.data_ptr(): t for t in [*model.parameters(), *model.buffers()]}
    return sum(t.nbytes for t in tensors.values())


def size_text(count: float) -> str:
    """Bytes in the unit that leaves three digits: ``13.5 GiB``."""
    unit = next((u for u in _UNITS if count >= _UNITS[u]), "KiB")
    return f"{count / _UNITS[unit]:.3g} {unit}"


def save_folder(target: str | Path, write: Callable[[Path], object]) -> None:
    """Write a folder under a temporary name beside ``target``, then rename it.

    The folder is whole or not there. FileExistsError if ``target`` has contents already.
    """
    target = Path(target)
    if target.exists() and any(target.iterdir()):
        raise FileExistsError(f"--output {target} has contents already; name another folder")
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.with_name(f".{target.name}.partial")
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        temporary.mkdir()
        write(temporary)
        for path in temporary.rglob("*"):
            if path.is_file():
                make_readable(path)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    if target.exists():
        target.rmdir()
    temporary.rename(target)


@contextlib.contextmanager
def quiet_transformers(*, bars: bool | None = None) -> Iterator[None]:
    """Without transformers' advice on every load.

    ``bars``: progress bars of loading and mapping, by default only on a terminal.
    """
    from transformers.utils import logging

    hub = std_logging.getLogger("huggingface_hub")
    before, hub_before = logging.get_verbosity(), hub.level
    logging.set_verbosity_error()
    hub.setLevel("ERROR")  # it tells of every retry
    shown = sys.stderr.isatty() if bars is None else bars
    try:
        with contextlib.nullcontext() if shown else _no_bars(), warnings.catch_warnings():
            # Renames to come in transformers 6, which the user of a command can do nothing about.
            warnings.simplefilter("ignore", FutureWarning)
            yield
    finally:
        logging.set_verbosity(before)
        hub.setLevel(hub_before)


@contextlib.contextmanager
def _no_bars() -> Iterator[None]:
    """Without the progress bars of transformers and datasets; those that were on go on again."""
    from transformers.utils import logging

    with contextlib.ExitStack() as stack:
        if logging.is_progress_bar_enabled():
            logging.disable_progress_bar()
            stack.callback(logging.enable_progress_bar)
        with contextlib.suppress(ImportError):
            import datasets

            if not datasets.are_progress_bars_disabled():
                datasets.disable_progress_bars()
                stack.callback(datasets.enable_progress_bars)
        yield
