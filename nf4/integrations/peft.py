"""PEFT over quantized models: the fused LoRA layer, merging, LoftQ, and what PEFT counts.

``import nf4`` has ``install`` called once PEFT is imported. What it wraps is listed in
private_names.py.
"""

from __future__ import annotations

import functools
import importlib
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import peft.tuners.lora.layer as peft_layers
import torch
from torch import nn

from nf4.integrations.peft_experts import ParamWrapper, check_merge
from nf4.integrations.peft_layer import LoraNF4
from nf4.integrations.peft_merging import MergeSettings, OverNF4
from nf4.integrations.peft_methods import check_target, create_new_module, find_dim, serve
from nf4.integrations.private_names import PEFT_HOOKS, PEFT_METHODS, Name, resolve
from nf4.lora.merge import Base, base_reader
from nf4.lora.merge import merge_and_unload as to_16bit
from nf4.nn import NF4Embedding, NF4Experts
from nf4.nn.linear import NF4Linear
from nf4.nn.weight import QuantizedWeight

logger = logging.getLogger(__name__)


def install() -> None:
    """Wrap what ``PEFT_HOOKS`` lists, once, and the models of ``PEFT_METHODS``.

    Raises ImportError, with the release, if a hook of LoRA moved; warns of another method's.
    """
    wrappers = (
        _create_new_module,
        _unload_and_optionally_merge,
        _merge_adapter,
        _include_all_linear,
        _count_parameters,
        _prepare_for_kbit_training,
    )
    for hook, wrap in zip(PEFT_HOOKS, wrappers, strict=True):
        wrapped = _wrap(hook, wrap)
        if hook[1] == "prepare_model_for_kbit_training":  # re-exported by name
            for holder in ("peft.utils", "peft"):
                setattr(importlib.import_module(holder), hook[1], wrapped)
    of_methods = {
        "_create_new_module": create_new_module,
        "_unload_and_optionally_merge": _unload_and_optionally_merge,
        "_find_dim": find_dim,
    }
    for package, model, layer, names in PEFT_METHODS:
        try:
            serve(package, layer)
            for name in names:
                _wrap((f"peft.tuners.{package}.model", f"{model}.{name}"), of_methods[name])
        except ImportError as error:  # LoRA works without the others
            logger.warning("nf4: PEFT's %s cannot stand over NF4Linear: %s", package, error)


def _wrap(hook: Name, wrap: Callable[..., Any]) -> Any:
    """Put ``wrap`` of what ``hook`` names in its place, once; returns what is there then."""
    owner, name = resolve(hook)
    original = getattr(owner, name)
    if getattr(original, "_nf4", False):
        return original
    wrapped = functools.wraps(original)(wrap(original))
    wrapped._nf4 = True  # type: ignore[attr-defined]
    is_static = isinstance(vars(owner).get(name), staticmethod)
    setattr(owner, name, staticmethod(wrapped) if is_static else wrapped)
    return wrapped


# dispatch


def _create_new_module(original: Callable[..., nn.Module]) -> Callable[..., nn.Module]:
    def create(lora_config: Any, adapter_name: str, target: Any, **kwargs: Any) -> nn.Module:
        base = target.get_base_layer() if hasattr(target, "get_base_layer") else target
        if isinstance(base, NF4Experts) and kwargs.get("parameter_name") is not None:
            layers: Any = peft_layers
            theirs = layers.ParamWrapper
            layers.ParamWrapper = ParamWrapper  # what its dispatcher makes of a parameter
            try:
                return original(lora_config, adapter_name, target, **kwargs)
            finally:
                layers.ParamWrapper = theirs
        if not isinstance(base, NF4Linear) or kwargs.get("parameter_name") is not None:
            return original(lora_config, adapter_name, target, **kwargs)
        check_target(base, f" at {kwargs.get('target_name')}")
        # PEFT's own way in for other layers, which a saved adapter config does not keep.
        saved = lora_config._custom_modules
        lora_config._custom_modules = {NF4Linear: LoraNF4}
        try:
            return original(lora_config, adapter_name, target, **kwargs)
        finally:
            lora_config._custom_modules = saved

    return create


def _include_all_linear(original: Callable[..., Any]) -> Callable[..., Any]:
    def include(peft_config: Any, model: nn.Module) -> Any:
        targets = getattr(peft_config, "target_modules", None)
        peft_config = original(peft_config, model)
        if isinstance(targets, str) and targets.lower() == "all-linear":
            head = getattr(model, "get_output_embeddings", lambda: None)()
            heads = [head, getattr(model, "score", None), getattr(model, "classifier", None)]
            peft_config.target_modules |= {
                name
                for name, module in model.named_modules()
                if isinstance(module, NF4Linear)
                and not any(module is h for h in heads)
                and ".base_layer" not in name
            }
        return peft_config

    return include


def lora_layers(model: nn.Module) -> Iterator[tuple[str, LoraNF4]]:
    """``(name, layer)`` of every ``LoraNF4`` in ``model``."""
    for name, module in model.named_modules():
        if isinstance(module, LoraNF4):
            yield name, module


def _targets(model: nn.Module) -> list[LoraNF4]:
    """The same layers, each knowing its name in the base model (PEFT before 0.19 tells none)."""
    layers = []
    for name, layer in lora_layers(model):
        layer._target_name = name.removeprefix("base_model.model.")
        layers.append(layer)
    return layers


def unfused_layers(model: nn.Module) -> dict[str, str]:
    """Name and reason of each LoRA layer over NF4 that would not take the fused path now."""
    reasons = ((name, layer.unfused_reason()) for name, layer in lora_layers(model))
    return {name: reason for name, reason in reasons if reason is not None}


# counts and preparation


def _count_parameters(original: Callable[..., Any]) -> Callable[..., Any]:
    def get_nb_trainable_parameters(self: nn.Module) -> tuple[int, int]:
        trainable, total = original(self)
        for module in self.modules():
            if isinstance(module, QuantizedWeight):
                total += module.q.numel() - module.weight.numel()
            elif isinstance(module, NF4Experts):
                total += sum(module.count(k) - p.numel() for k, p in module.named_parameters())
        return trainable, total

    return get_nb_trainable_parameters


def _prepare_for_kbit_training(original: Callable[..., Any]) -> Callable[..., Any]:
    def prepare_model_for_kbit_training(
        model: Any,
        use_gradient_checkpointing: bool = True,
        gradient_checkpointing_kwargs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> Any:
        """PEFT's function for a model over NF4 layers, without its upcast: embeddings, head and
        norms stay 16-bit (upcasting the embeddings of a 128k vocabulary alone takes a gigabyte).
        Checkpointing is non-reentrant unless asked otherwise."""
        checkpointing = gradient_checkpointing_kwargs
        if not any(isinstance(m, QuantizedWeight) for m in model.modules()):
            return original(model, use_gradient_checkpointing, checkpointing, **kwargs)
        model.requires_grad_(False)
        if use_gradient_checkpointing:
            # Also where not needed now: Trainer may turn on the reentrant kind afterwards.
            if (checkpointing or {}).get("use_reentrant", True):
                model.enable_input_require_grads()
            checkpointing = {"use_reentrant": False, **(checkpointing or {})}
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=checkpointing)
        return model

    return prepare_model_for_kbit_training


# merging


def _announce(model: nn.Module, whole_model: bool) -> None:
    """Say how large the 16-bit weights will be before any of them is made."""
    if LoraNF4.merge_settings.into == "nf4":
        return
    where = model.modules() if whole_model else (l.base_layer for _, l in lora_layers(model))
    layers = [module for module in where if isinstance(module, QuantizedWeight)]
    if layers:
        dtype = LoraNF4.merge_settings.dtype
        size = sum(m.q.numel() * (dtype or m.weight_dtype).itemsize for m in layers)
        packed = sum(m.q.nbytes for m in layers)
        logger.warning(
            "nf4: merging makes 16-bit weights: %.3g GB in place of %.3g GB, layer by layer "
            "(nf4.integrations.peft.merge_and_unload(model, into='nf4', base=...) stays in 4 bits)",
            size / 1e9,
            packed / 1e9,
        )


def _merge_adapter(original: Callable[..., Any]) -> Callable[..., Any]:
    def merge_adapter(self: Any, *args: Any, **kwargs: Any) -> Any:
        for module in self.model.modules():
            if isinstance(module, ParamWrapper):  # before any other layer is merged
                module.merge()
        _announce(self.model, whole_model=False)
        return original(self, *args, **kwargs)

    return merge_adapter


def _unload_and_optionally_merge(original: Callable[..., Any]) -> Callable[..., Any]:
    def unload(self: Any, merge: bool = True, *args: Any, **kwargs: Any) -> Any:
        ours = merge and any(isinstance(m, (OverNF4, ParamWrapper)) for m in self.model.modules())
        if ours:
            check_merge(self.model)
            _announce(self.model, whole_model=True)
        tied = _adapted_tied_heads(self.model) if ours else []
        with _not_in_4bit(self.model) if ours else nullcontext():
            model = original(self, merge, *args, **kwargs)
        _untie(model, tied)
        if ours and LoraNF4.merge_settings.into == "16bit":
            _dequantize_rest(model)
        return model

    return unload


@contextmanager
def _not_in_4bit(model: Any) -> Iterator[None]:
    """Without the mark of bitsandbytes' models, which (IA)^3 refuses to merge."""
    marked = vars(model).pop("is_loaded_in_4bit", None)
    try:
        yield
    finally:
        if marked is not None:
            model.is_loaded_in_4bit = marked


def _adapted_tied_heads(model: nn.Module) -> list[str]:
    """Names of the layers with an adapter whose weight is the table of the embeddings."""
    tables = [m.weight for m in model.modules() if isinstance(m, NF4Embedding)]
    return [
        name
        for name, layer in model.named_modules()
        if isinstance(layer, OverNF4)
        and any((layer._unmerged or layer.base_layer).weight is table for table in tables)
    ]


def _untie(model: Any, heads: list[str]) -> None:
    """Give ``heads``, which hold a merged adapter, a weight of their own for good.

    Tied again, when the model is dequantized or loaded, they would lose the adapter.
    """
    config: Any = getattr(model, "config", None)
    if not heads or config is None:
        return
    config.get_text_config().tie_word_embeddings = config.tie_word_embeddings = False
    for head in heads:
        getattr(model, "all_tied_weights_keys", {}).pop(f"{head}.weight", None)
    logger.warning("nf4: %s no longer shares the embeddings' table: it is merged", heads[0])


def _dequantize_rest(model: nn.Module) -> None:
    """Make the layers without an adapter 16-bit as well, so that the model saves as a plain one."""
    if getattr(model, "hf_quantizer", None) is not None:
        model.dequantize()  # type: ignore[operator]
    else:
        to_16bit(model, dtype=LoraNF4.merge_settings.dtype)


@contextmanager
def _merging(model: nn.Module, into: str, base: Base | None, dtype: Any) -> Iterator[None]:
    if into not in ("16bit", "nf4"):
        raise ValueError(f"nf4.merge: into must be '16bit' or 'nf4', got {into!r}")
    layers = _targets(model)
    if not layers:
        raise ValueError("nf4.merge: model must have LoRA layers over NF4Linear, got none")
    names = [layer._target_name for layer in layers]
    previous = LoraNF4.merge_settings
    LoraNF4.merge_settings = MergeSettings(into, base_reader(base, names), dtype)
    try:
        yield
    finally:
        LoraNF4.merge_settings = previous


def merge_and_unload(
    model: Any,
    into: str = "16bit",
    *,
    base: Base | None = None,
    dtype: torch.dtype | None = None,
    adapter_names: list[str] | None = None,
    progressbar: bool = False,
) -> nn.Module:
    """PEFT's ``merge_and_unload`` with the result and the base chosen.

    ``into="16bit"`` makes every layer of the model 16-bit (``dtype``; None: the dtype quantized
    from); ``into="nf4"`` keeps it quantized, each adapted layer being ``Q(W + deltas)``. ``base``
    is a directory (or file) of safetensors, or a state dict, with the 16-bit weights W; None takes
    the dequantized ones. For "nf4" pass it: requantizing a dequantized weight keeps 0.6 to 4 % of
    an adapter whose norm is at most 3 % of the weight's; from the 16-bit weight 99 % stays.
    """
    with _merging(model, into, base, dtype):
        return model.merge_and_unload(progressbar=progressbar, adapter_names=adapter_names)


def merge_adapter(
    model: Any,
    into: str = "16bit",
    *,
    base: Base | None = None,
    dtype: torch.dtype | None = None,
    adapter_names: list[str] | None = None,
) -> None:
    """PEFT's ``merge_adapter`` with the result and the base chosen, as in ``merge_and_unload``.

    ``model.unmerge_adapter()`` restores the packed bytes.
    """
    with _merging(model, into, base, dtype):
        model.merge_adapter(adapter_names=adapter_names)


# LoftQ


def init_loftq(model: Any, base: Base, adapter_name: str = "default", iterations: int = 1) -> None:
    """Initialize an adapter by LoftQ (arXiv:2310.08659) from the 16-bit weights ``base``.

    ``base``: a directory (or file) of safetensors, or a state dict. With one iteration the
    quantized weights stay as they are; with more they change, and must be saved with the adapter.
    """
    layers = [layer for layer in _targets(model) if adapter_name in layer.lora_A]
    if not layers:
        raise ValueError(
            f"nf4.init_loftq: model must have an adapter {adapter_name!r} over NF4Linear, got none"
        )
    read = base_reader(base, [layer._target_name for layer in layers])
    assert read is not None
    for layer in layers:
        layer.init_loftq(adapter_name, read(layer._target_name), iterations)


install()  # for those who import this module before PEFT
