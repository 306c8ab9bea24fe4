"""``bitsandbytes.optim``: the AdamW family is nf4.optim's; the rest refuses."""

from __future__ import annotations

from typing import Any

import torch

from nf4 import optim
from nf4.optim import (
    AdamW,
    AdamW8bit,
    AdamW32bit,
    PagedAdamW,
    PagedAdamW8bit,
    PagedAdamW32bit,
)

__all__ = ["AdamW", "AdamW8bit", "AdamW32bit", "PagedAdamW", "PagedAdamW8bit", "PagedAdamW32bit"]


def _adam(name: str, base: type) -> type:
    """bitsandbytes' Adam: its AdamW (decoupled decay included) with no decay by default."""

    def __init__(self: Any, params: Any, *args: Any, **kwargs: Any) -> None:
        if len(args) < 4:  # lr, betas, eps, weight_decay
            kwargs.setdefault("weight_decay", 0.0)
        base.__init__(self, params, *args, **kwargs)  # type: ignore[misc]

    return type(name, (base,), {"__init__": __init__, "__doc__": _adam.__doc__})


Adam = _adam("Adam", optim.AdamW)
Adam8bit = _adam("Adam8bit", optim.AdamW8bit)
Adam32bit = _adam("Adam32bit", optim.AdamW32bit)
PagedAdam = _adam("PagedAdam", optim.PagedAdamW)
PagedAdam8bit = _adam("PagedAdam8bit", optim.PagedAdamW8bit)
PagedAdam32bit = _adam("PagedAdam32bit", optim.PagedAdamW32bit)

REFUSED = tuple(
    f"{prefix}{family}{bits}"
    for family in ("Adagrad", "AdEMAMix", "LAMB", "LARS", "Lion", "RMSprop", "SGD")
    for prefix in (("", "Paged") if family in ("AdEMAMix", "Lion") else ("",))
    for bits in ("", "8bit", "32bit")
)


def refused(name: str) -> type:
    """A class of that name that isinstance can ask about and that refuses to be made."""

    def __init__(self: Any, *args: Any, **kwargs: Any) -> None:
        raise NotImplementedError(
            f"nf4.drop_in: bitsandbytes.optim.{name} is not part of nf4 (its AdamW family is); "
            "install bitsandbytes for it"
        )

    return type(name, (torch.optim.Optimizer,), {"__init__": __init__})


class GlobalOptimManager:
    """Refuses overrides by parameter: give those parameters a group with ``optim_bits=32``."""

    _instance: GlobalOptimManager | None = None

    @classmethod
    def get_instance(cls) -> GlobalOptimManager:
        """The one manager."""
        cls._instance = cls._instance or cls()
        return cls._instance

    def register_parameters(self, params: Any) -> None:
        """Nothing: every parameter of an optimizer is known to it."""

    def override_config(self, *args: Any, **kwargs: Any) -> None:
        """Raises NotImplementedError."""
        raise NotImplementedError(
            "nf4.drop_in: GlobalOptimManager does not override single parameters; put them into a "
            "parameter group with optim_bits=32"
        )

    register_module_override = override_config
