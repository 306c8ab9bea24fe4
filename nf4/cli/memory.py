"""The memory that training takes, from a model's config alone.

Weights, scales, adapters, gradients and optimizer states are counted to the byte: the model is
built, quantized and given its adapters on the meta device, which holds shapes and no data.
Activations and workspace come from a training step on fake tensors (``nf4.cli.step``).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

import nf4
from nf4.cli.presets import lora_config
from nf4.cli.step import Step, measure_step
from nf4.formats import NESTED_BLOCK_SIZE
from nf4.lora.prepare import count_parameters
from nf4.nn.linear import Linear4bitLoRA, NF4Linear
from nf4.nn.weight import QuantizedWeight

METHODS = ("full", "lora", "qlora")
COMPONENTS = (
    "weights",
    "scales",
    "adapters",
    "gradients",
    "optimizer",
    "activations",
    "workspace",
)
# Tensors smaller than this keep float32 moments in an 8-bit optimizer.
_MIN_8BIT = 4096
# From this many rows on, the Triton kernels, and on Hopper dX of the CUDA ones, multiply by the
# dequantized weight.
_DENSE_ROWS = 256


@dataclass(frozen=True)
class Estimate:
    """Bytes of each component of a training run.

    ``activations`` is the most that autograd holds for the backward at once; ``workspace`` is what
    the step needs beside it at its peak: gradients of activations, temporaries, and on a GPU one
    dequantized weight.
    """

    method: str
    weights: int
    scales: int
    adapters: int
    gradients: int
    optimizer: int
    activations: int
    workspace: int

    @property
    def total(self) -> int:
        return sum(getattr(self, name) for name in COMPONENTS)

    @property
    def static(self) -> int:
        """What does not depend on the batch."""
        return self.total - self.activations - self.workspace


def build(
    config: Any, method: str, dtype: torch.dtype, lora: nf4.LoraConfig | None, quant: Any
) -> Any:
    """The model as ``method`` trains it, on the meta device; ``lora`` None: the size's preset."""
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    lora = lora or lora_config(model, count_parameters(model)[1])
    if method == "qlora":
        nf4.prepare_model(model, quant, lora, progress=False)
    elif method == "lora":
        _add_16bit_adapters(model, lora)
    return model.train()


class _Adapted(nn.Module):
    """A 16-bit layer with a LoRA adapter, for counting plain LoRA as PEFT computes it."""

    def __init__(self, linear: nn.Module, r: int, dropout: float) -> None:
        super().__init__()
        self.linear = linear
        factory: dict[str, Any] = {"device": "meta", "dtype": torch.float32}
        weight: Any = linear.weight
        n, k = weight.shape if isinstance(linear, nn.Linear) else weight.shape[::-1]
        self.dropout = nn.Dropout(dropout)
        self.lora_A = nn.Parameter(torch.empty(r, k, **factory))
        self.lora_B = nn.Parameter(torch.empty(n, r, **factory))

    def forward(self, x: Tensor) -> Tensor:
        wide = self.dropout(x.to(self.lora_A.dtype))
        return self.linear(x) + (wide @ self.lora_A.T @ self.lora_B.T).to(x.dtype)


def _add_16bit_adapters(model: nn.Module, lora: nf4.LoraConfig) -> None:
    from nf4.nn.linear import is_conv1d

    model.requires_grad_(False)
    head = getattr(model, "get_output_embeddings", lambda: None)()
    for name, module in list(model.named_modules()):
        linear = type(module) is nn.Linear or is_conv1d(module)
        if linear and module is not head and lora.targets(name):
            model.set_submodule(name, _Adapted(module, lora.r, lora.lora_dropout))


def static_bytes(model: nn.Module, optim: str) -> dict[str, int]:
    """Bytes of everything but the activations, exactly."""
    counts = dict.fromkeys(("weights", "scales", "adapters", "gradients", "optimizer"), 0)
    adapters = {
        id(parameter)
        for m in model.modules()
        if isinstance(m, (Linear4bitLoRA, _Adapted))
        for parameter in (m.lora_A, m.lora_B)
    }
    for parameter in model.parameters():
        counts["adapters" if id(parameter) in adapters else "weights"] += parameter.nbytes
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


def optimizer_bytes(numel: int, dtype: torch.dtype, optim: str) -> int:
    """State of one parameter: two moments, and torch's float32 step counter."""
    if optim.startswith("adamw_torch"):
        return 2 * numel * dtype.itemsize + 4
    if "8bit" in optim and numel >= _MIN_8BIT:
        return 2 * numel + 2 * 4 * -(-numel // NESTED_BLOCK_SIZE)
    return 8 * numel


def dequantized_bytes(model: nn.Module, rows: int, dtype: torch.dtype) -> int:
    """The largest weight in 16 bits, which GPU kernels make for many rows; else 0."""
    if rows < _DENSE_ROWS:
        return 0
    sizes = [m.q.numel() for m in model.modules() if isinstance(m, NF4Linear)]
    return max(sizes, default=0) * dtype.itemsize


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
    gpu: bool = True,
) -> Estimate:
    """The memory of training the model of ``config`` by ``method``, one of ``METHODS``.

    ``lora`` None is the preset of the model's size, ``optim`` None what ``nf4 finetune`` takes for
    QLoRA and Trainer's own default for the others. ``gpu`` False leaves out what only the GPU's
    kernels allocate.
    """
    optim = optim or ("paged_adamw_8bit" if method == "qlora" else "adamw_torch_fused")
    model = build(config, method, dtype, lora, quantization)
    static = static_bytes(model, optim)
    dense = dequantized_bytes(model, batch * length, dtype) if gpu else 0
    step: Step = measure_step(model, batch, length, checkpointing)
    return Estimate(
        method, **static, activations=step.saved, workspace=step.peak - step.saved + dense
    )
