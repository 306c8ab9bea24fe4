"""LoRA settings by model size, for the commands that train and that plan training."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import nf4

PRESETS = ("auto", "small", "medium", "large")


def size_name(parameters: int) -> str:
    """ "small" (< 7B), "medium" (7-13B) or "large" (> 13B), by the size that a model is named for.

    Llama's 7B has 6.74 billion parameters and its 13B 13.02: the count is rounded to billions.
    """
    billions = round(parameters / 1e9)
    return "small" if billions < 7 else "medium" if billions <= 13 else "large"


def lora_config(
    model: Any,
    parameters: int,
    preset: str = "auto",
    target_modules: list[str] | None = None,
    **changes: Any,
) -> nf4.LoraConfig:
    """The preset of a model of so many parameters, with the ``changes`` that are not None.

    Where the model has none of the preset's layers (other names than Llama's), every linear layer
    is a target. ValueError for an unknown preset.
    """
    if preset not in PRESETS:
        raise ValueError(f"--preset must be one of {', '.join(PRESETS)}, got {preset!r}")
    chosen = nf4.LoraConfig.for_model_size(size_name(parameters) if preset == "auto" else preset)
    targets: Any = target_modules
    if targets is None:
        names = {name.rpartition(".")[2] for name, _ in model.named_modules()}
        known = set(chosen.target_modules or []) <= names
        targets = chosen.target_modules if known else "all-linear"
    elif targets == ["all-linear"]:
        targets = "all-linear"
    given = {name: value for name, value in changes.items() if value is not None}
    return replace(chosen, target_modules=targets, **given)


def describe(lora: nf4.LoraConfig) -> str:
    """The settings in a few words."""
    targets = lora.target_modules
    shown = targets if isinstance(targets, str) else ", ".join(targets or [])
    return f"r={lora.r}, alpha={lora.lora_alpha:g} on {shown}"
