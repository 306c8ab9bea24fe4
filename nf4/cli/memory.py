"""The memory that training takes, from a model's config alone.

Weights, scales, adapters, gradients and optimizer states are counted to the byte: the model is
built, quantized and given its adapters on the meta device, which holds shapes and no data.
Activations are what autograd saves, counted by running the training step on fake tensors.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

import nf4
from nf4.formats import NESTED_BLOCK_SIZE
from nf4.nn.linear import Linear4bitLoRA
from nf4.nn.weight import QuantizedWeight

METHODS = ("full", "lora", "qlora")
COMPONENTS = ("weights", "scales", "adapters", "gradients", "optimizer", "activations")
# Tensors smaller than this keep float32 moments in an 8-bit optimizer.
_MIN_8BIT = 4096


@dataclass(frozen=True)
class Estimate:
    """Bytes of each component of a training run."""

    method: str
    weights: int
    scales: int
    adapters: int
    gradients: int
    optimizer: int
    activations: int

    @property
    def total(self) -> int:
        return sum(getattr(self, name) for name in COMPONENTS)


def build(config: Any, method: str, dtype: torch.dtype, lora: nf4.LoraConfig, quant: Any) -> Any:
    """The model as ``method`` trains it, on the meta device."""
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    if method == "qlora":
        nf4.prepare_model(model, quant, lora, progress=False)
    elif method == "lora":
        _add_16bit_adapters(model, lora)
    return model.train()


class _Adapted(nn.Module):
    """A 16-bit layer with a LoRA adapter, for counting plain LoRA."""

    def __init__(self, linear: nn.Linear, r: int) -> None:
        super().__init__()
        self.linear = linear
        factory: dict[str, Any] = {"device": "meta", "dtype": torch.float32}
        self.lora_A = nn.Parameter(torch.empty(r, linear.in_features, **factory))
        self.lora_B = nn.Parameter(torch.empty(linear.out_features, r, **factory))

    def forward(self, x: Tensor) -> Tensor:
        wide = x.to(self.lora_A.dtype)
        return self.linear(x) + (wide @ self.lora_A.T @ self.lora_B.T).to(x.dtype)


def _add_16bit_adapters(model: nn.Module, lora: nf4.LoraConfig) -> None:
    model.requires_grad_(False)
    head = getattr(model, "get_output_embeddings", lambda: None)()
    for name, module in list(model.named_modules()):
        if type(module) is nn.Linear and module is not head and lora.targets(name):
            model.set_submodule(name, _Adapted(module, lora.r))


def static_bytes(model: nn.Module, optim: str) -> dict[str, int]:
    """Bytes of everything but the activations, exactly."""
    counts = dict.fromkeys(("weights", "scales", "adapters", "gradients", "optimizer"), 0)
    for parameter in model.parameters():
        adapter = parameter.requires_grad and _is_adapter(model, parameter)
        counts["adapters" if adapter else "weights"] += parameter.nbytes
        if parameter.requires_grad:
            counts["gradients"] += parameter.nbytes
            counts["optimizer"] += optimizer_bytes(parameter.numel(), parameter.dtype, optim)
    statistics = {
        id(t)
        for m in model.modules()
        if isinstance(m, QuantizedWeight)
        for t in m.q.tensors[1:]
        if t is not None
    }
    for buffer in model.buffers():
        counts["scales" if id(buffer) in statistics else "weights"] += buffer.nbytes
    return counts


def _is_adapter(model: nn.Module, parameter: nn.Parameter) -> bool:
    return any(
        parameter is m.lora_A or parameter is m.lora_B
        for m in model.modules()
        if isinstance(m, (Linear4bitLoRA, _Adapted))
    )


def optimizer_bytes(numel: int, dtype: torch.dtype, optim: str) -> int:
    """State of one parameter: two moments, and torch's float32 step counter."""
    if optim.startswith("adamw_torch"):
        return 2 * numel * dtype.itemsize + 4
    if "8bit" in optim and numel >= _MIN_8BIT:
        return 2 * numel + 2 * 4 * -(-numel // NESTED_BLOCK_SIZE)
    return 8 * numel


def activation_bytes(model: nn.Module, batch: int, length: int, checkpointing: bool) -> int:
    """What autograd saves in one training step of ``batch`` sequences of ``length`` tokens.

    With ``checkpointing``: the input of every decoder layer, the largest layer's own activations,
    and what lies outside the layers.
    """
    layers = decoder_layers(model)
    with FakeTensorMode(allow_non_fake_inputs=True):
        fake = model.to_empty(device="cpu")
        ids = torch.zeros(batch, length, dtype=torch.long)
        with record_saved(fake, layers) as saved:
            fake(input_ids=ids, labels=ids, use_cache=False)
    if not checkpointing:
        return sum(saved.values())
    inside = [count for owner, count in saved.items() if owner is not None]
    parameters = [p.dtype for p in model.parameters() if p.is_floating_point()]
    hidden = batch * length * _hidden_size(model) * parameters[0].itemsize
    return saved.get(None, 0) + max(inside, default=0) + hidden * len(layers)


def decoder_layers(model: nn.Module) -> list[nn.Module]:
    """The repeated blocks of the model, each of which checkpointing recomputes."""
    lists = [m for m in model.modules() if isinstance(m, nn.ModuleList)]
    return list(max(lists, key=len, default=[]))


def _hidden_size(model: Any) -> int:
    return model.config.get_text_config().hidden_size


@contextmanager
def record_saved(model: nn.Module, layers: list[nn.Module]) -> Iterator[dict[int | None, int]]:
    """Count the bytes saved for backward, by the layer (its number, or None) that saved them.

    Parameters and buffers are not counted, nor is a storage that is saved twice.
    """
    own = {t.untyped_storage()._cdata for t in [*model.parameters(), *model.buffers()]}
    seen: dict[int, Tensor] = {}
    saved: dict[int | None, int] = {}
    current: list[int | None] = [None]

    def pack(tensor: Tensor) -> Tensor:
        key = tensor.untyped_storage()._cdata
        if key not in own and key not in seen:
            seen[key] = tensor  # held, so that no other storage takes its address
            owner = current[0]
            saved[owner] = saved.get(owner, 0) + tensor.untyped_storage().nbytes()
        return tensor

    def enter(number: int) -> Callable[..., None]:
        return lambda *_: current.__setitem__(0, number)

    handles = []
    for number, layer in enumerate(layers):
        handles.append(layer.register_forward_pre_hook(enter(number)))
        handles.append(layer.register_forward_hook(lambda *_: current.__setitem__(0, None)))
    try:
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            yield saved
    finally:
        for handle in handles:
            handle.remove()


def estimate(
    config: Any,
    method: str,
    *,
    dtype: torch.dtype = torch.bfloat16,
    lora: nf4.LoraConfig | None = None,
    quantization: nf4.NF4Config | None = None,
    optim: str | None = None,
    batch: int = 1,
    length: int = 2048,
    checkpointing: bool = True,
) -> Estimate:
    """The memory of training the model of ``config`` by ``method``, one of ``METHODS``."""
    lora = lora or nf4.LoraConfig(target_modules="all-linear")
    optim = optim or ("paged_adamw_8bit" if method == "qlora" else "adamw_torch")
    model = build(config, method, dtype, lora, quantization)
    static = static_bytes(model, optim)
    activations = activation_bytes(model, batch, length, checkpointing)
    return Estimate(method, **static, activations=activations)
