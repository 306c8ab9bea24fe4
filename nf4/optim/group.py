"""Rules of a parameter group: what its hyperparameters may be, given or from a checkpoint."""

from __future__ import annotations

import math
from copy import deepcopy
from typing import Any

import torch

_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
_REALS = ("lr", "eps", "weight_decay", "min_8bit_size")


def check_group(group: dict[str, Any], paged: bool, where: str) -> None:
    """Raise ValueError, opening with ``where``, for a hyperparameter that no step can use."""
    betas = group["betas"]
    pair = isinstance(betas, (tuple, list)) and len(betas) == 2
    seed = group["seed"]
    rules: list[tuple[str, bool, str]] = [
        *(
            (key, _within(group[key], math.inf), "must be finite and not negative")
            for key in _REALS
        ),
        ("betas", pair, "must be two numbers"),
        ("betas", pair and all(_within(beta, 1) for beta in betas), "must be in [0, 1)"),
        ("optim_bits", group["optim_bits"] in (8, 32), "must be 8 or 32"),
        # The words' key is the seed above 32 bits of the step.
        ("seed", isinstance(seed, int) and -(2**31) <= seed < 2**31, "must be a 32-bit integer"),
        ("capturable", not (group["capturable"] and paged), "needs is_paged=False"),
    ]
    for key, holds, rule in rules:
        if not holds:
            raise ValueError(f"{where}: {key} {rule}, got {group[key]}")


def _within(value: Any, high: float) -> bool:
    """Whether 0 <= value < high; False for NaN and for what is no number."""
    try:
        return 0 <= float(value) < high
    except (TypeError, ValueError, RuntimeError):
        return False


def check_params(group: dict[str, Any], where: str) -> None:
    """Raise TypeError for a parameter of a dtype that no kernel steps."""
    for p in group["params"]:
        if p.dtype not in _DTYPES:
            raise TypeError(
                f"{where}: parameters must be float32, float16 or bfloat16, got {p.dtype}"
            )


def groups_from_checkpoint(
    state_dict: dict[str, Any],
    groups: list[dict[str, Any]],
    keys: tuple[str, ...],
    paged: bool,
    where: str,
) -> list[dict[str, Any]]:
    """Copies of the saved groups; ``keys`` that they lack are those of ``groups``.

    Raises ValueError where the groups do not fit each other, and as ``check_group`` does.
    """
    for key, kind in (("state", dict), ("param_groups", list)):
        if key not in state_dict:
            raise ValueError(f"{where}: {key} is missing, got {', '.join(map(str, state_dict))}")
        if not isinstance(state_dict[key], kind):
            got = type(state_dict[key]).__name__
            raise ValueError(f"{where}: {key} must be a {kind.__name__}, got {got}")
    saved_groups = deepcopy(state_dict["param_groups"])
    for i, saved in enumerate(saved_groups):
        if not isinstance(saved, dict) or not isinstance(saved.get("params"), list):
            raise ValueError(f"{where}: group {i}: must be a dict with a list params, got {saved}")
    sizes = [len(group["params"]) for group in groups]
    saved_sizes = [len(saved["params"]) for saved in saved_groups]
    if sizes != saved_sizes:
        raise ValueError(f"{where}: group sizes must be {sizes}, got {saved_sizes}")
    known = {index for saved in saved_groups for index in saved["params"]}
    strangers = [index for index in state_dict["state"] if index not in known]
    if strangers:
        raise ValueError(f"{where}: state {strangers[0]} must belong to a group, got no such one")
    for i, (group, saved) in enumerate(zip(groups, saved_groups, strict=True)):
        for key in keys:
            if key in group:
                saved.setdefault(key, group[key])
        check_group(saved, paged, f"{where}: group {i}")
    return saved_groups
