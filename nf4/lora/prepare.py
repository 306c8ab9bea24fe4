"""Quantize a model in place and give it LoRA adapters."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from torch import nn

from nf4.config import NF4Config
from nf4.lora.config import LoraConfig, matches
from nf4.lora.fuse import fuse_shared_inputs
from nf4.nn.embedding import NF4Embedding
from nf4.nn.experts import NF4Experts, is_fused_experts, unsupported_experts
from nf4.nn.linear import Linear4bitLoRA, NF4Linear, is_conv1d
from nf4.nn.weight import QuantizedWeight


def prepare_model(
    model: nn.Module,
    quantization: NF4Config | None = None,
    lora: LoraConfig | Any | None = None,
    *,
    progress: bool = True,
    fuse: bool = False,
) -> nn.Module:
    """Quantize the linear layers of ``model`` in place, one by one, and add LoRA adapters.

    Every ``nn.Linear`` and transformers ``Conv1D`` becomes an ``NF4Linear``, or a
    ``Linear4bitLoRA`` where ``lora`` (an nf4 or peft ``LoraConfig``; None adds none) targets it;
    fused experts become ``NF4Experts``, and what ``quantization`` says of embeddings and head.
    Layers that are quantized already keep their bytes, and adapters that are there already stay as
    they are. All other parameters are frozen, but for the biases that ``lora.bias`` names. ``fuse``
    computes adapters that share an input (q/k/v and gate/up of Llama, Mistral, Qwen 2 and Qwen 3)
    by one ``nf4.linear_lora_group`` call; names and saved files stay the same, and the repr of a
    layer says where it does not apply. Peak memory is the model's plus one layer. Returns
    ``model``. Raises ValueError when ``lora`` targets nothing, for a tied head that is to be
    quantized without its table, and for NaN or infinite weights, naming the module.
    """
    quantization = quantization or NF4Config()
    lora = None if lora is None else LoraConfig.coerce(lora)
    keeps = kept_16bit(model, quantization)
    names = [n for n, m in model.named_modules() if _is_linear(m) and not keeps(n)]
    if lora is not None and not any(lora.targets(name) for name in names):
        some = ", ".join(names[:8]) or "none"
        raise ValueError(
            f"nf4.prepare_model: lora.target_modules must match a linear layer, "
            f"got {lora.target_modules!r} (layers: {some})"
        )
    for _, parameter in _without_adapters(model):
        parameter.requires_grad_(False)
    for name in _bar(names, "Quantizing", progress):
        old = model.get_submodule(name)
        target = lora is not None and lora.targets(name)
        model.set_submodule(name, _replacement(name, old, quantization, lora if target else None))
        del old
    for name, module in list(model.named_modules()):
        if is_fused_experts(module) and not keeps(name):
            _quantize_experts(model, name, module, quantization)
    if quantization.embeddings:
        _quantize_embeddings(model, quantization)
    if lora is not None:
        train_biases(model, lora)
    if fuse:
        fuse_shared_inputs(model)
    return model


def kept_16bit(model: nn.Module, quantization: NF4Config) -> Callable[[str], bool]:
    """Whether the linear layer of a name stays 16-bit: those that the settings name, and the head
    (a tied one has no weight of its own; it goes with the embeddings).

    Raises ValueError where a head is to be quantized without the table that it shares.
    """
    head, tied = _output_head(model), _tied_heads(model)
    if quantization.lm_head and tied and not quantization.embeddings:
        raise ValueError(
            f"nf4.NF4Config: lm_head needs embeddings=True too where {head[0]} shares the table "
            f"of the embeddings, as in {type(model).__name__}"
        )
    kept = tied if quantization.lm_head else [*head, *tied]
    return lambda name: quantization.keeps(name) or matches(name, kept)


def _quantize_experts(
    model: nn.Module, name: str, module: nn.Module, quantization: NF4Config
) -> None:
    if isinstance(module, NF4Experts):
        return
    reason = unsupported_experts(module)
    if reason is not None:
        warnings.warn(f"nf4.prepare_model: {name} stays 16-bit: {reason}", stacklevel=3)
        return
    try:
        model.set_submodule(name, NF4Experts.from_experts(module, **quantization.layer_kwargs()))
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from error


def _quantize_embeddings(model: nn.Module, quantization: NF4Config) -> None:
    """Quantize the token embeddings; a head that is tied to them shares the result."""
    table = _token_embeddings(model)
    if isinstance(table, NF4Embedding):
        return
    if type(table) is not nn.Embedding:
        raise ValueError(
            f"nf4.NF4Config: embeddings must be an nn.Embedding to be quantized, "
            f"got {type(table).__name__}"
        )
    heads = _tied_heads(model)
    names = [name for name, module in model.named_modules() if module is table]
    new = NF4Embedding.from_embedding(table, **quantization.layer_kwargs())
    for name in names:
        model.set_submodule(name, new)
    for name in heads:
        head = model.get_submodule(name)
        bias = head.bias if isinstance(head.bias, nn.Parameter) else None
        tied = NF4Linear.from_quantized(new.q, bias, compute_dtype=quantization.compute_dtype)
        tied.weight = new.weight
        model.set_submodule(name, tied.train(head.training))


def _token_embeddings(model: nn.Module) -> nn.Module | None:
    getter = getattr(model, "get_input_embeddings", None)
    return None if getter is None else getter()


def _tied_heads(model: nn.Module) -> list[str]:
    """Names of the linear layers that share the weight of the token embeddings."""
    table = _token_embeddings(model)
    weight = getattr(table, "weight", None)
    return [n for n, m in model.named_modules() if type(m) is nn.Linear and m.weight is weight]


def train_biases(model: nn.Module, lora: LoraConfig) -> None:
    """Let the biases train that ``lora.bias`` names."""
    for module in model.modules():
        bias = getattr(module, "bias", None)
        if isinstance(bias, nn.Parameter):
            on_adapter = isinstance(module, Linear4bitLoRA)
            if lora.bias == "all" or (lora.bias == "lora_only" and on_adapter):
                bias.requires_grad_(True)


def _replacement(
    name: str, old: nn.Module, quantization: NF4Config, lora: LoraConfig | None
) -> NF4Linear:
    lora_kwargs = {} if lora is None else lora.layer_kwargs()
    kind = NF4Linear if lora is None else Linear4bitLoRA
    if isinstance(old, NF4Linear):
        if lora is None or isinstance(old, Linear4bitLoRA):
            return old
        return kind.from_layer(old, **lora_kwargs)
    try:
        new = kind.from_linear(old, **quantization.layer_kwargs(), **lora_kwargs)
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from error
    return new


def _is_linear(module: nn.Module) -> bool:
    # Exactly nn.Linear: a subclass may compute something else.
    return type(module) is nn.Linear or isinstance(module, NF4Linear) or is_conv1d(module)


def _output_head(model: nn.Module) -> list[str]:
    """Names of the output projection, which QLoRA leaves 16-bit."""
    head = getattr(model, "get_output_embeddings", lambda: None)()
    names = [name for name, module in model.named_modules() if head is not None and module is head]
    return names or ["lm_head"]


def _bar(items: list[str], label: str, show: bool) -> Iterable[str]:
    if not show:
        return items
    try:
        from tqdm.auto import tqdm
    except ImportError:  # tqdm comes with transformers; without it there is no bar
        return items
    return tqdm(items, desc=label, unit="layer", disable=None)


def adapter_layers(model: nn.Module) -> Iterator[tuple[str, Linear4bitLoRA]]:
    """``(name, module)`` of every ``Linear4bitLoRA`` in ``model``."""
    for name, module in model.named_modules():
        if isinstance(module, Linear4bitLoRA):
            yield name, module


def _without_adapters(model: nn.Module) -> list[tuple[str, nn.Parameter]]:
    adapters = {id(p) for _, m in adapter_layers(model) for p in (m.lora_A, m.lora_B)}
    return [(name, p) for name, p in model.named_parameters() if id(p) not in adapters]


def count_parameters(model: nn.Module) -> tuple[int, int]:
    """``(trainable, all)`` parameters, a quantized weight counted by its elements."""
    packed: dict[int, int] = {}
    for module in model.modules():
        if isinstance(module, QuantizedWeight):
            packed[id(module.weight)] = module.q.numel()
        elif isinstance(module, NF4Experts):
            packed.update({id(p): module.count(name) for name, p in module.named_parameters()})
    trainable = total = 0
    for parameter in model.parameters():
        count = packed.get(id(parameter), parameter.numel())
        total += count
        trainable += count if parameter.requires_grad else 0
    return trainable, total


def print_trainable_parameters(model: nn.Module) -> None:
    """Print how many parameters train, of how many, in PEFT's form."""
    trainable, total = count_parameters(model)
    share = 100 * trainable / max(total, 1)
    print(f"trainable params: {trainable:,} || all params: {total:,} || trainable%: {share:.4f}")


def _is_bias(name: str) -> bool:
    return name.rpartition(".")[2] == "bias"


def prepare_for_qlora(model: nn.Module) -> nn.Module:
    """Freeze a quantized model and turn on gradient checkpointing, without any upcast.

    Unlike PEFT's ``prepare_model_for_kbit_training`` it leaves embeddings and head in 16 bits, and
    checkpoints without reentrancy, so no input needs a gradient. Adapters stay trainable, and so
    do the biases that train in a model that is frozen already, which ``LoraConfig.bias`` asked for.
    """
    rest = _without_adapters(model)
    frozen = not any(p.requires_grad for name, p in rest if not _is_bias(name))
    for name, parameter in rest:
        if not (frozen and _is_bias(name)):
            parameter.requires_grad_(False)
    enable = getattr(model, "gradient_checkpointing_enable", None)
    if enable is not None:
        enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    config: Any = getattr(model, "config", None)
    if config is not None:
        config.use_cache = False
    return model
