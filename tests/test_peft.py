"""PEFT over NF4 layers: the fused path, its fallbacks, adapter files, initialisations, counts."""

from __future__ import annotations

import copy
import importlib
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import tiny
import torch
from packaging.version import Version
from torch import Tensor, nn

import nf4
from nf4 import functional

peft = pytest.importorskip("peft")
pytest.importorskip("transformers")

from nf4.integrations import peft as integration  # noqa: E402
from nf4.integrations.peft_layer import LoraNF4  # noqa: E402
from nf4.integrations.private_names import PEFT_HOOKS, resolve  # noqa: E402

pytestmark = pytest.mark.usefixtures("one_thread")

LAYERS = 14
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def config(**kwargs: Any) -> Any:
    base = {"r": 8, "lora_alpha": 16, "target_modules": TARGETS, "task_type": "CAUSAL_LM"}
    return peft.LoraConfig(**{**base, **kwargs})


def randomize(model: nn.Module, std: float = 0.02) -> None:
    """Give every LoRA B random values, so that adapters do something."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".lora_B." in name:
                parameter.normal_(std=std)


class Calls:
    count = 0


@pytest.fixture
def fused(monkeypatch: pytest.MonkeyPatch) -> Iterator[Calls]:
    """Counts the fused calls of the test."""
    calls, original = Calls(), functional.linear_lora

    def counted(*args: Any, **kwargs: Any) -> Tensor:
        calls.count += 1
        return original(*args, **kwargs)

    monkeypatch.setattr(functional, "linear_lora", counted)
    yield calls


def reference(model: nn.Module) -> None:
    """Give every LoRA layer PEFT's own forward."""
    for _, layer in integration.lora_layers(model):
        layer._fused = lambda: "reference"  # type: ignore[method-assign]


@pytest.mark.parametrize("dropout", [0.0, 0.05])
@pytest.mark.parametrize("targets", [TARGETS, "all-linear"])
def test_get_peft_model_is_fused(dropout: float, targets: Any, fused: Calls) -> None:
    model = tiny.quantized_llama()
    model = peft.get_peft_model(model, config(lora_dropout=dropout, target_modules=targets))
    assert sum(isinstance(m, LoraNF4) for m in model.modules()) == LAYERS
    assert integration.unfused_layers(model) == {} and "fused" in repr(model)
    ids = tiny.token_ids()
    model.train()
    model(ids, labels=ids).loss.backward()
    assert fused.count == LAYERS
    grads = {n: p.grad for n, p in model.named_parameters() if p.requires_grad}
    assert len(grads) == 2 * LAYERS and all(g is not None for g in grads.values())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_fused_equals_peft(dtype: torch.dtype) -> None:
    model = peft.get_peft_model(tiny.quantized_llama(dtype), config())
    randomize(model)
    other = copy.deepcopy(model)
    reference(other)
    ids = tiny.token_ids()
    outputs = []
    for m in (model, other):
        m.train()
        out = m(ids, labels=ids)
        out.loss.backward()
        outputs.append(out)
    # bfloat16: 8 bits of mantissa, and the two round in other places in every layer.
    tolerance = 1e-4 if dtype is torch.float32 else 0.04
    ours, theirs = outputs[0].logits, outputs[1].logits
    assert (ours - theirs).abs().max() <= tolerance * theirs.abs().max()
    for (name, a), b in zip(model.named_parameters(), other.parameters(), strict=True):
        if a.requires_grad:
            assert (a.grad - b.grad).norm() <= tolerance * b.grad.norm(), name


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_over_float32_hidden_states(dtype: torch.dtype, fused: Calls) -> None:
    """What preparing for k-bit training makes of a model elsewhere: mat1 and mat2 must agree."""
    model = peft.get_peft_model(tiny.quantized_llama(torch.float32), config()).train()
    randomize(model)
    ids = tiny.token_ids()
    grads = []
    for enabled in (False, True):
        with torch.autocast("cpu", dtype, enabled=enabled):
            loss = model(ids, labels=ids).loss
        loss.backward()
        grads.append(torch.cat([p.grad.flatten() for p in model.parameters() if p.requires_grad]))
        model.zero_grad()
    assert fused.count == 2 * LAYERS
    assert (grads[1] - grads[0]).norm() <= 0.05 * grads[0].norm()


def test_dropout_only_in_training() -> None:
    model = peft.get_peft_model(tiny.quantized_llama(), config(lora_dropout=0.5))
    randomize(model, 0.1)
    ids = tiny.token_ids()
    with torch.no_grad():
        model.eval()
        assert torch.equal(model(ids).logits, model(ids).logits)
        model.train()
        assert not torch.equal(model(ids).logits, model(ids).logits)
        torch.manual_seed(1)
        first = model(ids).logits
        torch.manual_seed(1)
        assert torch.equal(model(ids).logits, first)


def test_save_load_and_several_adapters(tmp_path: Path, fused: Calls) -> None:
    base = tiny.quantized_llama()
    ids = tiny.token_ids()
    plain = base(ids).logits
    model = peft.get_peft_model(copy.deepcopy(base), config())
    model.add_adapter("other", config(r=4, use_rslora=True, target_modules=["q_proj", "up_proj"]))
    randomize(model, 0.1)
    first = model.eval()(ids).logits
    model.set_adapter("other")
    second = model(ids).logits
    layer = next(l for _, l in integration.lora_layers(model) if "other" in l.scaling)
    assert layer.scaling["other"] == 16 / math.sqrt(4)
    with model.disable_adapter():
        assert torch.equal(model(ids).logits, plain)
        assert set(integration.unfused_layers(model).values()) == {"adapters are disabled"}
    model.save_pretrained(tmp_path)

    fused.count = 0
    loaded = peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / ".")
    assert torch.equal(loaded(ids).logits, first) and fused.count == LAYERS
    loaded.load_adapter(str(tmp_path / "other"), "other")
    loaded.set_adapter("other")
    assert torch.equal(loaded(ids).logits, second)
    # A batch with an adapter per row, and both at once: PEFT's own forward.
    loaded.set_adapter("default")
    rows = torch.cat([ids[:1]] * 3)
    mixed = loaded(rows, adapter_names=["__base__", "default", "other"]).logits
    for row, expected in zip(mixed, (plain, first, second), strict=True):
        assert (row - expected[0]).abs().max() <= 0.04 * expected[0].abs().max()
    loaded.base_model.set_adapter(["default", "other"])
    assert set(integration.unfused_layers(loaded).values()) == {"not exactly one active adapter"}
    loaded(ids, labels=ids).loss.backward()


def test_transformers_own_add_adapter(fused: Calls) -> None:
    from transformers.integrations import peft as bridge

    model = tiny.quantized_llama()
    needed = getattr(bridge, "MIN_PEFT_VERSION", "0")
    if Version(peft.__version__) < Version(needed):
        pytest.skip(f"this transformers needs PEFT {needed} for add_adapter")
    model.add_adapter(config())
    ids = tiny.token_ids()
    model(ids)
    assert fused.count == LAYERS


def test_dora(fused: Calls) -> None:
    base = tiny.quantized_llama(torch.float32)
    ids = tiny.token_ids()
    plain = base(ids).logits
    model = peft.get_peft_model(base, config(use_dora=True))
    assert (model.eval()(ids).logits - plain).abs().max() < 1e-4  # starts as its base
    assert fused.count == 0
    assert set(integration.unfused_layers(model).values()) == {"DoraLinearVariant"}
    assert "not fused: DoraLinearVariant" in repr(model)
    randomize(model)
    model.train()
    out = model(ids, labels=ids)
    out.loss.backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
    expected = model.eval()(ids).logits
    bytes_before = _bytes(model)
    model.merge_adapter()
    assert (model(ids).logits - expected).abs().max() < 1e-4
    model.unmerge_adapter()
    assert _bytes(model) == bytes_before


def _bytes(model: nn.Module) -> dict[str, bytes]:
    state = model.state_dict()
    return {k: v.numpy().tobytes() for k, v in state.items() if v.dtype is torch.uint8}


def _layer(model: nn.Module) -> LoraNF4:
    return dict(integration.lora_layers(model))["base_model.model.model.layers.0.mlp.up_proj"]


@pytest.mark.parametrize("init", ["pissa", "pissa_niter_4", "olora", "orthogonal"])
def test_initialisation_from_the_base(init: str, fused: Calls) -> None:
    base = tiny.quantized_llama(torch.float32)
    weight = base.model.layers[0].mlp.up_proj.dequantize().clone()
    model = peft.get_peft_model(base, config(init_lora_weights=init, lora_alpha=8))
    layer = _layer(model)
    delta = layer.get_delta_weight("default").detach()
    rest = layer.base_layer.dequantize(torch.float32)
    assert delta.norm() > 0.05 * weight.norm() or init == "orthogonal"
    # The residual is quantized again: its own NF4 error, about 9 % of its norm, is all there is.
    assert (rest + delta - weight).norm() <= 0.12 * rest.norm()
    model(tiny.token_ids())
    assert fused.count == LAYERS


def test_loftq(tmp_path: Path) -> None:
    model16 = tiny.llama(torch.float32)
    model16.save_pretrained(tmp_path)
    weight = model16.model.layers[0].mlp.up_proj.weight.detach().clone()
    base = nf4.prepare_model(model16, progress=False)
    quantization_error = (base.model.layers[0].mlp.up_proj.dequantize() - weight).norm()

    def error(model: nn.Module) -> Tensor:
        layer = _layer(model)
        total = layer.base_layer.dequantize() + layer.get_delta_weight("default")
        return (total - weight).norm()

    model = peft.get_peft_model(copy.deepcopy(base), config())
    integration.init_loftq(model, tmp_path)
    once = error(model)
    assert once < 0.9 * quantization_error
    integration.init_loftq(model, dict(tiny_state(tmp_path)), iterations=4)
    assert error(model) < once
    with pytest.raises(ValueError, match="adapter 'missing'"):
        integration.init_loftq(model, tmp_path, "missing")

    if Version(peft.__version__) < Version("0.19"):
        return  # tells a layer neither its name nor the model's folder
    # init_lora_weights="loftq" finds the folder that the model came from (PEFT asks for scipy).
    found = peft.get_peft_model(copy.deepcopy(base), config())
    loftq = SimpleNamespace(loftq_config={"loftq_iter": 1}, base_model_name_or_path=str(tmp_path))
    for _, layer in integration.lora_layers(found):
        layer.loftq_init("default", loftq)
    assert torch.allclose(error(found), once)
    loftq.base_model_name_or_path = str(tmp_path / "absent")
    with pytest.raises(ValueError, match=r"init_loftq\(model, base\)"):
        _layer(found).loftq_init("default", loftq)


def tiny_state(folder: Path) -> dict[str, Tensor]:
    from safetensors.torch import load_file

    return load_file(folder / "model.safetensors")


def test_other_layers_stay_pefts_own() -> None:
    model = tiny.llama()
    model.model.layers[0].self_attn.q_proj = nf4.NF4Linear.from_linear(
        model.model.layers[0].self_attn.q_proj
    )
    model = peft.get_peft_model(model, config())
    kinds = [type(m).__name__ for m in model.modules() if hasattr(m, "lora_A")]
    assert sorted(set(kinds)) == ["Linear", "LoraNF4"] and kinds.count("LoraNF4") == 1


def test_a_layer_with_its_own_adapter_is_refused() -> None:
    model = nf4.prepare_model(tiny.llama(), lora=nf4.LoraConfig(r=4), progress=False)
    with pytest.raises(ValueError, match="an adapter of its own"):
        peft.get_peft_model(model, config())


def test_unsupported_variant_is_refused() -> None:
    kasa = getattr(peft, "KasaConfig", None)
    if kasa is None:
        pytest.skip("this PEFT has no KaSA")
    with pytest.raises(ValueError, match="variant"):
        peft.get_peft_model(tiny.quantized_llama(), config(kasa_config=kasa()))


def test_counts_are_logical(capsys: pytest.CaptureFixture[str]) -> None:
    plain, quantized = tiny.llama(), tiny.quantized_llama()
    expected = peft.get_peft_model(plain, config()).get_nb_trainable_parameters()
    model = peft.get_peft_model(quantized, config())
    assert model.get_nb_trainable_parameters() == expected
    model.print_trainable_parameters()
    assert f"all params: {expected[1]:,}" in capsys.readouterr().out


@pytest.mark.parametrize("use_reentrant", [None, True, False])
def test_prepare_model_for_kbit_training(use_reentrant: bool | None) -> None:
    model = tiny.quantized_llama()
    kwargs = None if use_reentrant is None else {"use_reentrant": use_reentrant}
    dtypes = {n: p.dtype for n, p in model.named_parameters()}
    model = peft.prepare_model_for_kbit_training(model, gradient_checkpointing_kwargs=kwargs)
    assert {n: p.dtype for n, p in model.named_parameters()} == dtypes  # no upcast
    assert not any(p.requires_grad for p in model.parameters())
    model = peft.get_peft_model(model, config())
    model.train()
    assert any(getattr(m, "gradient_checkpointing", False) for m in model.modules())
    ids = tiny.token_ids()
    model(ids, labels=ids).loss.backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)


def test_compiles_in_one_graph() -> None:
    model = peft.get_peft_model(tiny.quantized_llama(torch.float32), config(lora_dropout=0.1))
    layer, x = _layer(model).eval(), torch.randn(3, 64)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    assert torch.allclose(compiled(x), layer(x), atol=1e-6)


@pytest.mark.parametrize("hook", PEFT_HOOKS, ids=lambda hook: hook[1])
def test_every_hook_is_in_place(hook: tuple[str, str]) -> None:
    owner, name = resolve(hook)
    assert getattr(getattr(owner, name), "_nf4", False)


def test_installs_once() -> None:
    before: Callable[..., Any] = peft.tuners.lora.model.LoraModel._create_new_module
    integration.install()
    assert peft.tuners.lora.model.LoraModel._create_new_module is before
    assert importlib.import_module("peft").prepare_model_for_kbit_training._nf4
