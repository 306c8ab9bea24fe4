"""Finds the layers of a model that share their input, for one grouped call each."""

from __future__ import annotations

import warnings

from torch import nn

from nf4.nn.linear import Linear4bitLoRA
from nf4.nn.shared import SharedInput

# Model types whose attention and MLP call these layers with one tensor.
MODEL_TYPES = ("llama", "mistral", "qwen2", "qwen3")
GROUPS = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))


def fuse_shared_inputs(model: nn.Module) -> list[SharedInput]:
    """Group the q/k/v and gate/up adapters of every block of ``model``; the groups made.

    Layers without an adapter stay out of a group, and a group has at least two layers. Warns where
    there is nothing to group.
    """
    made = []
    for module in list(model.modules()):
        kind = getattr(getattr(module, "config", None), "model_type", None)
        if kind not in MODEL_TYPES:
            continue
        for names in GROUPS:
            members = [n for n in names if _groupable(getattr(module, n, None))]
            if len(members) > 1:
                made.append(SharedInput(module, members))
    if not made:
        kind = getattr(getattr(model, "config", None), "model_type", type(model).__name__)
        warnings.warn(
            f"nf4.prepare_model: fuse=True finds no adapters that share an input (it knows "
            f"{', '.join(MODEL_TYPES)}; this model is {kind})",
            stacklevel=3,
        )
    return made


def _groupable(module: object) -> bool:
    return isinstance(module, Linear4bitLoRA) and module.shared is None
