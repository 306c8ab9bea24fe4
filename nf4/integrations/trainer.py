"""transformers' Trainer: optimizer names that resolve to nf4.optim, and checkpoints to resume from.

Importing this module imports neither transformers nor nf4.optim.
"""

from __future__ import annotations

import functools
import importlib
import json
import logging
import os
import re
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from nf4.integrations.hooks import importable
from nf4.nn.experts import NF4Experts
from nf4.nn.weight import QuantizedWeight

logger = logging.getLogger(__name__)

# Names that TrainingArguments(optim=...) takes, with the class in nf4.optim that they resolve to.
OPTIMIZERS = {
    "adamw_8bit": "AdamW8bit",
    "adamw_bnb_8bit": "AdamW8bit",
    "paged_adamw_8bit": "PagedAdamW8bit",
    "paged_adamw_32bit": "PagedAdamW32bit",
}

_CHECKPOINT = re.compile(r"checkpoint-(\d+)")
# An 8-byte length comes first in a safetensors file; a header above 100 MB is refused by readers.
_MAX_HEADER = 100_000_000


def resolves_here(optim: str) -> bool:
    """Whether ``TrainingArguments(optim=optim)`` gives an optimizer of nf4 in this process.

    So it is for the names in ``OPTIMIZERS`` where bitsandbytes cannot be imported or
    ``nf4.drop_in`` is active.
    """
    return optim in OPTIMIZERS and (_drop_in_active() or not importable("bitsandbytes"))


def _drop_in_active() -> bool:
    # Not imported here: importing it installs it.
    drop_in = sys.modules.get("nf4.drop_in")
    return drop_in is not None and drop_in.status().active


def optimizer_class(optim: str) -> type:
    """The class in nf4.optim for a Trainer name; KeyError for a name not in ``OPTIMIZERS``."""
    from nf4 import optim as optimizers

    return getattr(optimizers, OPTIMIZERS[optim])


def install() -> None:
    """Have ``Trainer.get_optimizer_cls_and_kwargs``, a public static method, resolve our names.

    Other names, and ours where ``resolves_here`` is False, go to the original. Also have
    ``Trainer.train(resume_from_checkpoint=True)`` take the newest whole checkpoint of a quantized
    model, as ``find_resume_checkpoint`` does.
    """
    trainer: Any = importlib.import_module("transformers.trainer").Trainer
    original: Callable[..., tuple[Any, Any]] = trainer.get_optimizer_cls_and_kwargs
    if getattr(original, "_nf4", False):
        return

    @functools.wraps(original)
    def get_optimizer_cls_and_kwargs(args: Any, model: Any = None) -> tuple[Any, dict[str, Any]]:
        name = str(getattr(args.optim, "value", args.optim))
        if not resolves_here(name):
            return original(args, model)
        kwargs = {
            "lr": args.learning_rate,
            "betas": (args.adam_beta1, args.adam_beta2),
            "eps": args.adam_epsilon,
        }
        return optimizer_class(name), kwargs

    get_optimizer_cls_and_kwargs._nf4 = True  # type: ignore[attr-defined]
    trainer.get_optimizer_cls_and_kwargs = staticmethod(get_optimizer_cls_and_kwargs)
    train_original: Callable[..., Any] = trainer.train

    @functools.wraps(train_original)
    def train(self: Any, resume_from_checkpoint: Any = None, *args: Any, **kwargs: Any) -> Any:
        if resume_from_checkpoint is True and _is_quantized(self.model):
            with self.args.main_process_first(local=False):  # it renames what is broken
                found = find_resume_checkpoint(self.args.output_dir)
            resume_from_checkpoint = found or True  # Trainer says that there is none
        return train_original(self, resume_from_checkpoint, *args, **kwargs)

    trainer.train = train


def _is_quantized(model: Any) -> bool:
    return any(isinstance(module, (QuantizedWeight, NF4Experts)) for module in model.modules())


def find_resume_checkpoint(output_dir: str | os.PathLike[str]) -> str | None:
    """The newest whole ``checkpoint-<step>`` folder in ``output_dir``, or None.

    Whole means: trainer_state.json parses, every safetensors file has the size that its header
    tells, every shard that an index names is there, and every file that torch.save wrote is
    complete. A newer folder that is not whole (a full disk, a killed process) is renamed to
    ``checkpoint-<step>.broken``, never deleted, so that neither this function nor Trainer takes it
    again; a warning says why. Call it before Trainer, on one process.
    """
    folder = Path(output_dir)
    if not folder.is_dir():
        return None
    steps = []
    for entry in folder.iterdir():
        match = _CHECKPOINT.fullmatch(entry.name)
        if match and entry.is_dir():
            steps.append((int(match.group(1)), entry))
    for _, checkpoint in sorted(steps, reverse=True):
        reason = why_broken(checkpoint)
        if reason is None:
            return str(checkpoint)
        moved = _set_aside(checkpoint)
        logger.warning(
            "nf4: checkpoint %s is not whole (%s); renamed to %s", checkpoint, reason, moved.name
        )
    return None


def why_broken(checkpoint: str | os.PathLike[str]) -> str | None:
    """What keeps a Trainer checkpoint from being resumed; None for a whole one."""
    folder = Path(checkpoint)
    try:
        state = json.loads((folder / "trainer_state.json").read_text())
    except (OSError, ValueError) as error:
        return f"trainer_state.json: {error}"
    if not isinstance(state, dict) or "global_step" not in state:
        return "trainer_state.json: no global_step"
    weights = 0
    for path in sorted(p for p in folder.rglob("*") if p.is_file()):
        reason = None
        name = path.relative_to(folder)
        if path.suffix == ".safetensors":
            weights += 1
            reason = _why_safetensors_broken(path)
        elif path.name.endswith(".safetensors.index.json"):
            reason = _why_index_broken(path)
        elif path.suffix in (".bin", ".pt", ".pth"):
            weights += path.suffix == ".bin"
            # torch.save writes a zip, whose directory comes last: a cut file has none.
            reason = None if path.stat().st_size and _torch_file_whole(path) else "truncated"
        if reason is not None:
            return f"{name}: {reason}"
    return None if weights else "no weights"


def _torch_file_whole(path: Path) -> bool:
    with path.open("rb") as file:
        legacy = file.read(2) != b"PK"  # training_args.bin of old versions is a bare pickle
    return legacy or zipfile.is_zipfile(path)


def _why_safetensors_broken(path: Path) -> str | None:
    size = path.stat().st_size
    with path.open("rb") as file:
        prefix = file.read(8)
        length = int.from_bytes(prefix, "little")
        if len(prefix) < 8 or length > min(size - 8, _MAX_HEADER):
            return f"truncated in its header at {size} bytes"
        try:
            header = json.loads(file.read(length))
            ends = [v["data_offsets"][1] for k, v in header.items() if k != "__metadata__"]
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            return f"unreadable header: {error}"
    expected = 8 + length + max(ends, default=0)
    return None if size == expected else f"must have {expected} bytes, got {size}"


def _why_index_broken(path: Path) -> str | None:
    try:
        shards = set(json.loads(path.read_text())["weight_map"].values())
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        return f"unreadable index: {error}"
    missing = sorted(name for name in shards if not (path.parent / name).is_file())
    return f"missing shard {missing[0]}" if missing else None


def _set_aside(checkpoint: Path) -> Path:
    """Rename a folder to the first free ``<name>.broken``, ``<name>.broken-2``, ..."""
    target = checkpoint.with_name(f"{checkpoint.name}.broken")
    number = 2
    while target.exists():
        target = checkpoint.with_name(f"{checkpoint.name}.broken-{number}")
        number += 1
    checkpoint.rename(target)
    return target
