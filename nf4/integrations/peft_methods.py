"""PEFT's methods beside LoRA over ``NF4Linear``: those that it has for bitsandbytes' 4-bit layers.

AdaLoRA, (IA)^3, OFT, RandLoRA, RoAd and VeRA compute ``base_layer(x)`` and what they change of x or
of the result apart, so what PEFT makes for an ``nn.Linear`` serves. It is shown one while it makes
its layer (``_StandIn``), and merges into a 16-bit copy.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from peft.tuners import tuners_utils
from torch import Tensor, nn

from nf4.integrations.peft_merging import OverNF4
from nf4.integrations.private_names import resolve
from nf4.nn.linear import Linear4bitLoRA, NF4Linear


class OtherMethod(OverNF4):
    """``OverNF4`` of the methods beside LoRA, some of which return their own parameters' dtype."""

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        y: Tensor = super().forward(x, *args, **kwargs)  # type: ignore[misc]
        return y if torch.is_autocast_enabled(x.device.type) else y.to(x.dtype)


# The class over NF4Linear of each of PEFT's layer classes.
_CLASSES: dict[type, type] = {}


def serve(package: str, layer: str) -> None:
    """Make the class that stands over ``NF4Linear`` for the ``layer`` of a method's package.

    Raises ImportError, with the release, where PEFT has no such layer.
    """
    owner, name = resolve((f"peft.tuners.{package}.layer", layer))
    theirs = getattr(owner, name)
    ours = f"{package.capitalize()}NF4"
    if ours not in globals():
        globals()[ours] = type(ours, (OtherMethod, theirs), {"__module__": __name__})
    _CLASSES[theirs] = globals()[ours]  # pickle looks for it in this module


class _StandIn(nn.Linear):
    """An ``nn.Linear`` of a layer's sizes, over its packed codes."""

    def __init__(self, layer: NF4Linear) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features = layer.in_features, layer.out_features
        # An integer dtype, so PEFT leaves its own parameters in float32.
        self.weight = layer.weight
        self.register_parameter("bias", layer.bias)


def check_target(layer: NF4Linear, where: str = "") -> None:
    """Refuse a ``Linear4bitLoRA``, which has an adapter of its own."""
    if isinstance(layer, Linear4bitLoRA):
        raise ValueError(
            "nf4: PEFT needs an NF4Linear without an adapter of its own (prepare_model without "
            f"lora makes them), got Linear4bitLoRA{where}"
        )


def create_new_module(original: Callable[..., nn.Module]) -> Callable[..., nn.Module]:
    """``_create_new_module`` of a method's model, for targets that are ``NF4Linear`` too."""

    def create(*args: Any, **kwargs: Any) -> nn.Module:
        base = next((a for a in args if isinstance(a, NF4Linear)), None)
        if base is None:
            return original(*args, **kwargs)
        check_target(base)
        layer = original(*(_StandIn(base) if a is base else a for a in args), **kwargs)
        layer.base_layer = base
        layer.__class__ = _CLASSES[type(layer)]
        return layer

    return create


def find_dim(original: Callable[..., tuple[int, int]]) -> Callable[..., tuple[int, int]]:
    """``_find_dim`` of VeRA and RandLoRA: the largest ``(out, in)`` of all targets."""

    def find(self: Any, config: Any) -> tuple[int, int]:
        settings = self._prepare_adapter_config(config, self.get_model_config(self.model))
        settings = tuners_utils._maybe_include_all_linear_layers(settings, self.model)
        shapes = [
            tuple(module.weight_shape)
            for name, module in self.model.named_modules()
            if isinstance(module, NF4Linear) and self._check_target_module_exists(settings, name)
        ]
        try:
            shapes.append(original(self, config))
        except ValueError:  # no target is an nn.Linear
            if not shapes:
                raise
        return max(out for out, _ in shapes), max(in_ for _, in_ in shapes)

    return find
