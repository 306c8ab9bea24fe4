"""Runs scripts written for bitsandbytes with nf4 instead: ``import nf4.drop_in`` as first line.

Or, with no line changed, ``python -m nf4.drop_in train.py [arguments]``. Importing this package
calls ``install()``.

Where bitsandbytes is not installed, ``import bitsandbytes`` then gives nf4's modules of its names
(4-bit layers and functions, the AdamW family; 8-bit layers and other optimizers refuse). Where it
is installed, ``import bitsandbytes`` stays the real one. In both cases transformers' 4-bit
``BitsAndBytesConfig``, PEFT's LoRA layers and Trainer's optimizer names go to nf4.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from types import ModuleType

from nf4.drop_in import face
from nf4.integrations.hooks import importable, on_import

# Imported before install(), they have settled whether bitsandbytes is there, and scripts hold
# names of theirs that nf4 would replace.
_DECIDE_EARLY = ("transformers", "peft", "trl")

_active = False


@dataclass(frozen=True)
class Status:
    """``active``: installed and not uninstalled. ``bitsandbytes``: what ``import bitsandbytes``
    gives: "nf4", "real" or "nothing"."""

    active: bool
    bitsandbytes: str


def status() -> Status:
    """What is in force in this process."""
    if face.installed():
        return Status(_active, "nf4")
    return Status(_active, "real" if importable("bitsandbytes") else "nothing")


def install() -> None:
    """Take bitsandbytes' place; nothing if it is taken already.

    Raises RuntimeError, naming them, if transformers, PEFT or TRL have been imported before.
    """
    global _active
    if _active:
        return
    early = [name for name in _DECIDE_EARLY if name in sys.modules]
    if early:
        raise RuntimeError(
            f"nf4.drop_in: must be imported before {', '.join(early)}: make `import nf4.drop_in` "
            "the first line, or run `python -m nf4.drop_in script.py`"
        )
    if not importable("bitsandbytes"):
        face.install()
    _active = True
    on_import("transformers.quantizers.auto", _take_quantizer)


def _take_quantizer(auto: ModuleType) -> None:
    from nf4.integrations.transformers import take_bitsandbytes

    if _active:
        take_bitsandbytes()


def uninstall() -> None:
    """Give bitsandbytes' place back. Names that a script has imported already stay nf4's."""
    global _active
    if not _active:
        return
    _active = False
    face.uninstall()
    if "transformers.quantizers.auto" in sys.modules:
        from nf4.integrations.transformers import give_back_bitsandbytes

        # Without bitsandbytes nf4 serves its configuration anyway.
        if importable("bitsandbytes"):
            give_back_bitsandbytes()


install()
