"""PEFT's methods beside LoRA over NF4Linear, against the same methods over the dense weights."""

from __future__ import annotations

import copy
import io
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from checkpoints import quantized, save_model
from torch import nn

import nf4

peft = pytest.importorskip("peft")
FEEDFORWARD = ["down_proj", "fc2"]  # of Llama, and of OPT, whose layers have biases
TARGETS = ["q_proj", "v_proj", *FEEDFORWARD]
METHODS: dict[str, Callable[[], Any]] = {
    "adalora": lambda: peft.AdaLoraConfig(target_modules=TARGETS, total_step=10, init_r=4),
    "ia3": lambda: peft.IA3Config(target_modules=TARGETS, feedforward_modules=FEEDFORWARD),
    "oft": lambda: peft.OFTConfig(target_modules=TARGETS, r=0, oft_block_size=8),
    "randlora": lambda: peft.RandLoraConfig(target_modules=TARGETS, r=4),
    "road": lambda: peft.RoadConfig(target_modules=TARGETS, group_size=16),
    "vera": lambda: peft.VeraConfig(target_modules=TARGETS, r=4),
}


@pytest.fixture(params=METHODS)
def config(request: pytest.FixtureRequest) -> Callable[[], Any]:
    return METHODS[request.param]


def base(dtype: torch.dtype) -> nn.Module:
    return nf4.prepare_model(tiny.llama(dtype), progress=False)


def adapted(model: nn.Module, config: Any) -> Any:
    """With an adapter that is no identity, the same for every model."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = peft.get_peft_model(model, config)
    generator = torch.Generator().manual_seed(5)
    for name, parameter in model.named_parameters():
        # A count, which PEFT takes for trainable in a 16-bit model.
        if parameter.requires_grad and "ranknum" not in name:
            noise = torch.randn(parameter.shape, generator=generator)
            start = parameter.data if "ia3" in name or "road" in name else 0
            # VeRA's are factors of random projections that are small themselves, RandLoRA's of
            # projections of full rank.
            scale = 1.0 if "vera" in name else 0.1 if "randlora" in name else 0.3
            parameter.data.copy_(start + scale * noise)
    return model


def far(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a - b).float().norm() / b.float().norm())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_it_computes_what_it_does_over_dense_weights(config: Any, dtype: torch.dtype) -> None:
    plain = base(dtype)
    dense = nf4.merge_and_unload(copy.deepcopy(plain))
    ours, theirs = adapted(plain, config()).train(), adapted(dense, config()).train()
    ids = tiny.token_ids(3)
    got, want = (model(input_ids=ids, labels=ids) for model in (ours, theirs))
    with torch.no_grad(), ours.disable_adapter():
        assert far(ours(input_ids=ids).logits, got.logits) > 0.05  # the adapter does something
    assert far(got.logits, want.logits) < (1e-5 if dtype is torch.float32 else 0.03)
    got.loss.backward()
    want.loss.backward()
    expected = dict(theirs.named_parameters())
    trained = {n: p.grad for n, p in ours.named_parameters() if p.requires_grad}
    assert trained
    for name, grad in trained.items():
        assert far(grad, expected[name].grad) < (1e-4 if dtype is torch.float32 else 0.1), name


@pytest.mark.parametrize("kind", ["llama", "opt"])
def test_merging_and_back(config: Any, kind: str) -> None:
    plain = nf4.prepare_model(getattr(tiny, kind)(torch.float32), progress=False)
    for module in plain.modules():
        if isinstance(module, nf4.NF4Linear) and module.bias is not None:
            nn.init.normal_(module.bias)
    model = adapted(plain, config()).eval()
    layers = [m for m in model.modules() if isinstance(m, nf4.NF4Linear)]
    codes = [layer.weight.clone() for layer in layers]
    ids = tiny.token_ids(3)
    with torch.no_grad():
        before = model(input_ids=ids).logits
        model.merge_adapter()
        merged = model(input_ids=ids).logits
        assert sum(isinstance(m, nf4.NF4Linear) for m in model.modules()) < len(layers)
        model.unmerge_adapter()
        after = model(input_ids=ids).logits
    torch.testing.assert_close(merged, before, rtol=1e-3, atol=1e-4)
    assert torch.equal(after, before)
    assert [m for m in model.modules() if isinstance(m, nf4.NF4Linear)] == layers
    assert all(torch.equal(a, layer.weight) for a, layer in zip(codes, layers, strict=True))


def test_merge_and_unload_makes_a_plain_model(config: Any, tmp_path: Path) -> None:
    model = adapted(base(torch.bfloat16), config()).eval()
    ids = tiny.token_ids(3)
    with torch.no_grad():
        before = model(input_ids=ids).logits
        merged = model.merge_and_unload()
        after = merged(input_ids=ids).logits
    assert not [m for m in merged.modules() if isinstance(m, nf4.NF4Linear)]
    assert all(p.dtype is torch.bfloat16 for p in merged.parameters())
    assert far(after, before) < 0.15  # 16-bit weights in place of 16-bit products
    merged.save_pretrained(tmp_path)
    again = type(merged).from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert torch.equal(again(input_ids=ids).logits, after)


def test_a_tied_head_is_untied_by_merging(tmp_path: Path) -> None:
    """As with LoRA: tied again when it is loaded, the head would lose the adapter."""
    model = quantized(save_model("llama-tied", tmp_path / "16bit"), embeddings=True)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    targets = peft.IA3Config(target_modules=["lm_head"], feedforward_modules=[])
    ids = tiny.token_ids(3)
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT's, of tied layers
        model = adapted(model, targets).eval()
        before = model(input_ids=ids).logits
        merged = model.merge_and_unload()
        assert merged.lm_head.weight is not merged.model.embed_tokens.weight
        merged.save_pretrained(tmp_path / "merged")
        again = type(merged).from_pretrained(tmp_path / "merged")
        assert far(again(input_ids=ids).logits, before) < 1e-5


def test_files_copies_and_pickles(config: Any, tmp_path: Path) -> None:
    plain = base(torch.float32)
    fresh = copy.deepcopy(plain)
    model = adapted(plain, config()).eval()
    ids = tiny.token_ids(2)
    expected = model(input_ids=ids).logits
    model.save_pretrained(tmp_path)
    loaded = peft.PeftModel.from_pretrained(fresh, tmp_path).eval()
    assert torch.equal(loaded(input_ids=ids).logits, expected)
    assert torch.equal(copy.deepcopy(model)(input_ids=ids).logits, expected)
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    assert torch.equal(torch.load(file, weights_only=False)(input_ids=ids).logits, expected)


def test_a_broken_adapter_leaves_the_layer_as_it_was(config: Any) -> None:
    model = adapted(base(torch.float32), config()).eval()
    layers = [m for m in model.modules() if isinstance(m, nf4.NF4Linear)]
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data.fill_(float("nan"))
    with pytest.raises(ValueError, match=r"NaNs|NaN"):
        model.merge_and_unload(safe_merge=True)
    assert [m for m in model.modules() if isinstance(m, nf4.NF4Linear)] == layers


def test_a_layer_with_an_adapter_of_its_own_is_refused(config: Any) -> None:
    lora = nf4.LoraConfig(r=2, target_modules=TARGETS)
    model = nf4.prepare_model(tiny.llama(torch.float32), lora=lora, progress=False)
    with pytest.raises(ValueError, match="without an adapter of its own"):
        peft.get_peft_model(model, config())


def test_a_method_that_moved_is_named_and_leaves_the_rest(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    from nf4.integrations import peft as integration

    names = ("_create_new_module",)
    moved = (("elsewhere", "ElsewhereModel", "Linear", names), ("road", "Moved", "Linear", names))
    monkeypatch.setattr(integration, "PEFT_METHODS", moved)
    integration.install()
    assert "PEFT's elsewhere cannot stand over NF4Linear" in caplog.text
    assert "must have Moved._create_new_module" in caplog.text
    peft.get_peft_model(base(torch.float32), METHODS["road"]())


@pytest.mark.parametrize("first", ["import peft", "", "import nf4"])
def test_the_integration_may_be_imported_before_peft(first: str) -> None:
    script = f"""{first}
from nf4.integrations.peft import merge_and_unload
from peft.tuners.lora.model import LoraModel
from peft.tuners.road.model import RoadModel
assert LoraModel._create_new_module._nf4 and RoadModel._create_new_module._nf4
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
