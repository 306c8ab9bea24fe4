"""``NF4Experts`` against the transformers module that it takes the place of."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from checkpoints import MODELS
from torch import Tensor, nn

import nf4
from nf4.lora.prepare import count_parameters
from nf4.nn import NF4Experts
from nf4.nn.experts import unsupported_experts

pytest.importorskip("transformers", reason="transformers is not installed")

E, TOKENS, TOP_K, HIDDEN = 4, 10, 2, 64


def experts_of(kind: str) -> nn.Module:
    """The experts of a tiny model's first layer, with random weights."""
    experts = MODELS[kind]().model.layers[0].mlp.experts
    experts.config._experts_implementation = "eager"  # the others take no float64
    for parameter in experts.parameters():
        nn.init.normal_(parameter, std=0.1)
    return experts


def routing(dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    hidden = torch.randn(TOKENS, HIDDEN, dtype=dtype)
    weights, index = torch.rand(TOKENS, E).topk(TOP_K)
    return hidden, index, (weights / weights.sum(-1, keepdim=True)).to(dtype)


@pytest.mark.parametrize("double_quant", [True, False])
@pytest.mark.parametrize("kind", ["qwen3-moe", "mixtral"])
def test_forward_and_backward(kind: str, double_quant: bool, device: torch.device) -> None:
    module = NF4Experts.from_experts(experts_of(kind).to(device), double_quant=double_quant)
    dense = module.to_experts().double()
    hidden, index, weights = (t.to(device) for t in routing())
    inputs = [hidden.requires_grad_(), weights.requires_grad_()]
    wide = [t.detach().double().requires_grad_() for t in inputs]
    out, expected = module(hidden, index, weights), dense(wide[0], index, wide[1])
    assert torch.allclose(out.double(), expected, atol=1e-5)
    grad = torch.randn(TOKENS, HIDDEN, device=device)
    got = torch.autograd.grad(out, inputs, grad)
    exact = torch.autograd.grad(expected, wide, grad.double())
    for ours, theirs in zip(got, exact, strict=True):
        assert torch.allclose(ours.double(), theirs, atol=1e-5)


def test_matrices_are_quantized_one_by_one() -> None:
    source = experts_of("qwen3-moe")
    module = NF4Experts.from_experts(source)
    gate, up = source.gate_up_proj.detach()[2].chunk(2)
    for index, weight in enumerate((gate, up)):
        alone, stacked = nf4.quantize(weight), module.q("gate_up_proj", 2, index)
        for one, other in zip(alone.tensors, stacked.tensors, strict=True):
            assert torch.equal(one, other)
    expected = nf4.dequantize(nf4.quantize(source.down_proj.detach()[3]))
    assert torch.equal(module.dequantize("down_proj")[3], expected)


def test_tokens_without_an_expert_here() -> None:
    """Under expert parallelism an index of E stands for an expert of another rank."""
    module = NF4Experts.from_experts(experts_of("qwen3-moe"))
    hidden, index, weights = routing()
    index[0] = E
    out = module(hidden, index, weights)
    assert not out[0].any() and out[1:].any(dim=-1).all()


def test_gating_rule_of_a_model() -> None:
    class Clamped(type(experts_of("qwen3-moe"))):  # type: ignore[misc]
        limit = 0.05

        def _apply_gate(self, gate_up: Tensor) -> Tensor:
            gate, up = gate_up.chunk(2, dim=-1)
            return self.act_fn(gate).clamp(max=self.limit) * up.clamp(-self.limit, self.limit)

    source = experts_of("qwen3-moe")
    plain = NF4Experts.from_experts(source)
    source.__class__ = Clamped
    module = NF4Experts.from_experts(source)
    hidden, index, weights = routing()
    expected = torch.zeros_like(hidden)
    for token in range(TOKENS):
        for slot in range(TOP_K):
            expert = int(index[token, slot])
            gate_up = module.dequantize("gate_up_proj")[expert] @ hidden[token]
            y = module.dequantize("down_proj")[expert] @ source._apply_gate(gate_up)
            expected[token] += weights[token, slot] * y
    out = module(hidden, index, weights)
    assert torch.allclose(out, expected, atol=1e-5)
    assert not torch.allclose(out, plain(hidden, index, weights), atol=1e-3)


def test_casts_copies_and_states() -> None:
    module = NF4Experts.from_experts(experts_of("mixtral"))
    hidden, index, weights = routing()
    before = module(hidden, index, weights)
    cast = copy.deepcopy(module).to(torch.bfloat16)
    assert cast.down_proj.dtype is torch.uint8
    assert cast.down_proj_nested_absmax.dtype is torch.float32
    assert torch.equal(cast(hidden, index, weights), before)
    assert torch.equal(pickle.loads(pickle.dumps(module))(hidden, index, weights), before)
    empty = NF4Experts(experts_of("mixtral"))
    empty.load_state_dict(module.state_dict())
    assert torch.equal(empty(hidden, index, weights), before)
    assert all(not p.requires_grad for p in module.parameters())


def test_compute_dtype() -> None:
    source = experts_of("qwen3-moe")
    module = NF4Experts.from_experts(source, compute_dtype=torch.bfloat16)
    hidden, index, weights = routing()
    out = module(hidden, index, weights)
    assert out.dtype is torch.float32
    exact = NF4Experts.from_experts(source)(hidden, index, weights)
    assert not torch.equal(out, exact) and torch.allclose(out, exact, rtol=0.1, atol=0.02)


class _Shaped(nn.Module):
    def __init__(self, **shapes: Any) -> None:
        super().__init__()
        self.act_fn = nn.SiLU()
        for name, shape in shapes.items():
            self.register_parameter(name, nn.Parameter(torch.zeros(shape)))


@pytest.mark.parametrize(
    ("shapes", "reason"),
    [
        ({"gate_up_proj": (4, 64, 96), "down_proj": (4, 48, 64)}, "must store gate_up_proj as"),
        (
            {"gate_up_proj": (4, 96, 64), "down_proj": (4, 64, 48), "down_proj_bias": (4, 64)},
            "gate_up_proj and down_proj only",
        ),
        ({"up_proj": (4, 96, 64), "down_proj": (4, 64, 96)}, "gate_up_proj and down_proj only"),
    ],
)
def test_other_layouts_are_refused(shapes: dict[str, Any], reason: str) -> None:
    module = _Shaped(**shapes)
    assert reason in str(unsupported_experts(module))
    with pytest.raises(TypeError, match=reason):
        NF4Experts(module)


@pytest.mark.parametrize("kind", ["qwen3-moe", "mixtral"])
def test_prepare_model_quantizes_experts(kind: str) -> None:
    model = MODELS[kind]()
    elements = sum(p.numel() for p in model.parameters())
    nf4.prepare_model(model, lora=nf4.LoraConfig(r=2, target_modules=["q_proj"]), progress=False)
    experts = [m for m in model.modules() if isinstance(m, NF4Experts)]
    assert len(experts) == 2
    trainable, total = count_parameters(model)
    assert total == elements + trainable
    ids = torch.randint(3, 128, (2, 8))
    model(ids, labels=ids).loss.backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
    before = model.eval()(ids).logits
    merged = nf4.merge_and_unload(model)
    assert not any(isinstance(m, NF4Experts) for m in merged.modules())
    assert torch.allclose(merged(ids).logits, before, atol=1e-4)


def test_prepare_model_names_experts_that_stay_16bit() -> None:
    model = nn.ModuleDict({"experts": _Shaped(up_proj=(4, 8, 8), down_proj=(4, 8, 8))})
    with pytest.warns(UserWarning, match="experts stays 16-bit: experts must have"):
        nf4.prepare_model(model, progress=False)
