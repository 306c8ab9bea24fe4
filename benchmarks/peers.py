"""The competition: bitsandbytes, PEFT on bitsandbytes, and torchao, where they are installed.

Peers get the very bytes that nf4 quantized (torchao excepted: its format is its own), in the
classes their users call. Imports are lazy, because bitsandbytes takes five seconds.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.workload import (
    BLOCK_SIZE,
    LORA_SCALING,
    Bench,
    Case,
    Contender,
    Layer,
    LoraInputs,
)

PEERS = ("bitsandbytes", "peft", "torchao")


def installed() -> list[str]:
    """The peers that can be imported here."""
    return [name for name in PEERS if importlib.util.find_spec(name) is not None]


def _bnb_layer(layer: Layer, dtype: torch.dtype, copy: int) -> Any:
    """bitsandbytes' Linear4bit over a copy of the layer's bytes."""
    import bitsandbytes as bnb

    q = layer.qs[copy % len(layer.qs)]
    state = {name: t.clone() for name, t in q.state_dict("weight").items()}
    module = bnb.nn.Linear4bit(
        layer.k, layer.n, bias=False, compute_dtype=dtype, quant_type="nf4", device="meta"
    )
    module.weight = bnb.nn.Params4bit.from_prequantized(
        data=state.pop("weight"),
        quantized_stats=state,
        requires_grad=False,
        device=layer.bench.device,
        module=module,
    )
    # As if the model had been loaded in this dtype; the backward dequantizes to it.
    module.weight.quant_state.dtype = dtype
    return module


def _bnb_copies(layer: Layer, dtype: torch.dtype) -> list[Any]:
    """One module per copy, in training mode: then nothing is repacked."""

    def make() -> list[Any]:
        return [_bnb_layer(layer, dtype, i).train() for i in range(len(layer.qs))]

    return layer.cached("bitsandbytes", dtype, make)


def _bnb_repacked(layer: Layer, x: Tensor) -> list[Any]:
    """The same in eval mode, after the first forward that repacks the weight in place."""

    def make() -> list[Any]:
        modules = [_bnb_layer(layer, x.dtype, i).eval() for i in range(len(layer.qs))]
        with torch.inference_mode():
            for module in modules:
                module(x)
        return modules

    return layer.cached("bitsandbytes_eval", x.dtype, make)


def _repacks(layer: Layer) -> bool:
    """Whether bitsandbytes' eval path repacks this weight (its rules for the shape)."""
    from bitsandbytes.functional import has_avx512bf16

    fits = layer.n % 32 == 0 and layer.k % BLOCK_SIZE == 0
    cpu = layer.bench.device.type == "cpu"
    return cpu and fits and layer.bench.isa == "avx512_bf16" and bool(has_avx512bf16())


def quantize(
    case: Case, weights: Sequence[Tensor], bench: Bench, nested: bool = True
) -> list[Contender]:
    if "bitsandbytes" not in bench.peers:
        return []
    import bitsandbytes.functional as bnb

    def call(w: Tensor) -> Callable[[], object]:
        def run() -> tuple[Tensor, ...]:
            packed, state = bnb.quantize_4bit(
                w, blocksize=BLOCK_SIZE, compress_statistics=nested, quant_type="nf4"
            )
            if not nested:
                return packed, state.absmax
            return packed, state.absmax, state.state2.absmax, state.offset

        return run

    return [Contender("bitsandbytes", [call(w) for w in weights], capturable=False)]


def dequantize(case: Case, layer: Layer, outs: Sequence[Tensor], bench: Bench) -> list[Contender]:
    if "bitsandbytes" not in bench.peers:
        return []
    import bitsandbytes.functional as bnb

    modules = _bnb_copies(layer, case.dtype)

    def given(i: int) -> Callable[[], object]:
        weight, out = modules[i].weight, outs[i % len(outs)]
        return lambda: bnb.dequantize_4bit(weight.data, weight.quant_state, out=out)

    def fresh(i: int) -> Callable[[], object]:
        weight = modules[i].weight
        return lambda: bnb.dequantize_4bit(weight.data, weight.quant_state)

    count = len(modules)
    contenders = [Contender("bitsandbytes_new_output", [fresh(i) for i in range(count)])]
    if bench.device.type != "cpu":
        # Its CPU build registers no out= form: every call allocates the result.
        contenders.append(Contender("bitsandbytes", [given(i) for i in range(count)]))
    return contenders


def linear(case: Case, layer: Layer, x: Tensor, bench: Bench) -> list[Contender]:
    contenders = []
    if "bitsandbytes" in bench.peers:
        modules = _bnb_copies(layer, case.dtype)
        contenders.append(Contender("bitsandbytes", [_forward(m, x) for m in modules]))
        if _repacks(layer):
            packed = _bnb_repacked(layer, x)
            contenders.append(Contender("bitsandbytes_eval", [_forward(m, x) for m in packed]))
    # torchao's scales come in blocks of 256, without a tail; it decodes the whole weight whatever M
    # is, so a few token counts say all, and the weights of an 8B model do.
    size = layer.n * layer.k
    fits = size % (BLOCK_SIZE * 256) == 0 and size <= 1 << 26 and case.m in (1, 512, 2048)
    if "torchao" in bench.peers and case.dtype is torch.bfloat16 and fits:
        contenders.append(_torchao(layer, x))
    return contenders


def _forward(module: nn.Module, x: Tensor) -> Callable[[], object]:
    return lambda: module(x)


def _torchao(layer: Layer, x: Tensor) -> Contender:
    """torchao's NF4Tensor: other scales and a rounded table, so its error is larger."""
    from torchao.quantization.quantize_.workflows.nf4 import nf4_tensor

    weight = layer.cached("torchao", x.dtype, lambda: nf4_tensor.to_nf4(layer.source))
    return Contender("torchao", [lambda: nf4_tensor.linear_nf4(x, weight)], capturable=False)


def _peft_layer(layer: Layer, dtype: torch.dtype, copy: int, inputs: LoraInputs) -> Any:
    """PEFT's LoRA layer over bitsandbytes, with float32 adapters as PEFT makes them."""
    from peft import LoraConfig, get_peft_model

    rank = inputs.a.shape[0]
    base = nn.Sequential()
    base.add_module("proj", _bnb_layer(layer, dtype, copy))
    config = LoraConfig(
        r=rank,
        lora_alpha=int(LORA_SCALING * rank),
        target_modules=["proj"],
        lora_dropout=0.0,
    )
    model: Any = get_peft_model(base, config)
    module = model.base_model.model.proj.to(layer.bench.device)
    return module.train()


def _peft_copies(layer: Layer, dtype: torch.dtype, inputs: LoraInputs) -> list[Any]:
    def make() -> list[Any]:
        return [_peft_layer(layer, dtype, i, inputs) for i in range(len(layer.qs))]

    modules = layer.cached("peft", dtype, make)
    with torch.no_grad():
        for module in modules:
            module.lora_A["default"].weight.copy_(inputs.a)
            module.lora_B["default"].weight.copy_(inputs.b)
    return modules


def linear_lora(case: Case, layer: Layer, inputs: LoraInputs, bench: Bench) -> list[Contender]:
    contenders = []
    if {"bitsandbytes", "peft"} <= set(bench.peers):
        modules = _peft_copies(layer, case.dtype, inputs)
        calls = [_peft_step(m, inputs) for m in modules]
        contenders.append(Contender("peft_bitsandbytes", calls, capturable=False))
    if "bitsandbytes" in bench.peers:
        # Without LoRA: the base layer alone.
        steps = [_base_step(m, inputs) for m in _bnb_copies(layer, case.dtype)]
        contenders.append(Contender("bitsandbytes", steps, partial=True, capturable=False))
    return contenders


def _peft_forward(module: Any, x: Tensor) -> Callable[[], Tensor]:
    """On a GPU under autocast, as Trainer runs it: the float32 adapters then compute in 16 bits."""
    if x.device.type == "cpu" or x.dtype is torch.float32:
        return lambda: module(x)

    def run() -> Tensor:
        with torch.autocast(x.device.type, x.dtype):
            return module(x)

    return run


def _peft_step(module: Any, inputs: LoraInputs) -> Callable[[], object]:
    a, b = module.lora_A["default"].weight, module.lora_B["default"].weight
    forward = _peft_forward(module, inputs.x)
    return lambda: inputs.step(forward, inputs.x, a, b)


def _base_step(module: nn.Module, inputs: LoraInputs) -> Callable[[], object]:
    return lambda: inputs.step(lambda: module(inputs.x), inputs.x)


def linear_lora_forward(
    case: Case, layer: Layer, inputs: LoraInputs, bench: Bench
) -> list[Contender]:
    if not {"bitsandbytes", "peft"} <= set(bench.peers):
        return []
    x = inputs.x.detach()
    modules = _peft_copies(layer, case.dtype, inputs)
    return [Contender("peft_bitsandbytes", [_peft_forward(m, x) for m in modules])]
