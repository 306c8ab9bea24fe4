"""prepare_model(fuse=True): the numbers and files of the unfused model, with fewer calls."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from tiny import randomize_adapters, token_ids
from torch import Tensor, nn

import nf4
from nf4 import functional

ALL = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
KINDS = ("Llama", "Mistral", "Qwen2", "Qwen3")


def _model(kind: str = "Llama", dtype: torch.dtype = torch.float32) -> nn.Module:
    import transformers

    config = getattr(transformers, f"{kind}Config")(**tiny.SIZES)
    return transformers.AutoModelForCausalLM.from_config(config, dtype=dtype)


def pair(
    kind: str = "Llama",
    dtype: torch.dtype = torch.float32,
    targets: list[str] = ALL,
    dropout: float = 0.0,
    quantization: nf4.NF4Config | None = None,
) -> tuple[nn.Module, nn.Module]:
    """One prepared model, unfused and fused."""
    plain = _model(kind, dtype)
    lora = nf4.LoraConfig(r=4, lora_alpha=8, target_modules=targets, lora_dropout=dropout)
    fused = copy.deepcopy(plain)
    nf4.prepare_model(plain, quantization, lora, progress=False)
    randomize_adapters(plain)
    nf4.prepare_model(fused, quantization, lora, progress=False, fuse=True)
    fused.load_state_dict(plain.state_dict())
    return plain.train(), fused.train()


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The number of members of every group call."""
    sizes: list[int] = []
    original = functional.linear_lora_group

    def counted(x: Tensor, qs: Any, *args: Any, **kwargs: Any) -> list[Tensor]:
        sizes.append(len(qs))
        return original(x, qs, *args, **kwargs)

    monkeypatch.setattr(functional, "linear_lora_group", counted)
    return sizes


def step(model: nn.Module, ids: Tensor, seed: int = 0) -> dict[str, Tensor]:
    """The logits and every gradient of one training step."""
    torch.manual_seed(seed)
    model.zero_grad()
    out = model(input_ids=ids, labels=ids)
    out.loss.backward()
    grads = {n: p.grad for n, p in model.named_parameters() if p.requires_grad}
    return {"logits": out.logits.detach(), **grads}


def assert_equal(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> None:
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        torch.testing.assert_close(tensor, theirs[name], msg=lambda text, n=name: f"{n}: {text}")


@pytest.mark.parametrize("kind", KINDS)
def test_logits_and_gradients_are_the_same(kind: str, calls: list[int]) -> None:
    plain, fused = pair(kind)
    ids = token_ids()
    assert_equal(step(fused, ids), step(plain, ids))
    assert calls == [3, 2] * 2  # q/k/v and gate/up of two layers
    calls.clear()
    with torch.no_grad():
        torch.testing.assert_close(fused.eval()(ids).logits, plain.eval()(ids).logits)
    assert calls == [3, 2] * 2


def test_dropout_draws_the_same_masks(calls: list[int]) -> None:
    plain, fused = pair(dropout=0.3)
    ids = token_ids()
    first = step(plain, ids)
    assert_equal(step(fused, ids), first)
    assert not torch.equal(step(plain, ids, seed=1)["logits"], first["logits"])
    assert len(calls) == 4


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointing(reentrant: bool, calls: list[int]) -> None:
    plain, fused = pair(dropout=0.3)
    ids = token_ids()
    expected = step(plain, ids)
    fused.gradient_checkpointing_enable({"use_reentrant": reentrant})
    fused.enable_input_require_grads()
    assert_equal(step(fused, ids), expected)
    assert calls == [3, 2] * 4  # forward and recomputation


def test_compute_dtype_and_bfloat16(calls: list[int]) -> None:
    quantization = nf4.NF4Config(compute_dtype=torch.bfloat16)
    plain, fused = pair(quantization=quantization)
    ids = token_ids()
    ours, theirs = step(fused, ids), step(plain, ids)
    torch.testing.assert_close(ours["logits"], theirs["logits"])
    # x is cast once, so the members' gradients of it are added in bfloat16, not after the cast.
    for name, tensor in theirs.items():
        assert (ours[name] - tensor).norm() <= 0.05 * tensor.norm(), name
    assert calls == [3, 2] * 2


def test_only_layers_with_adapters_join(calls: list[int]) -> None:
    plain, fused = pair(targets=["q_proj", "v_proj", "up_proj"])
    ids = token_ids()
    assert_equal(step(fused, ids), step(plain, ids))
    assert calls == [2, 2]
    assert "fused=q_proj+v_proj" in repr(fused.model.layers[0].self_attn.q_proj)
    assert "fused" not in repr(fused.model.layers[0].mlp.up_proj)


def test_state_and_files_are_unchanged(tmp_path: Path) -> None:
    plain, fused = pair()
    assert list(fused.state_dict()) == list(plain.state_dict())
    assert [n for n, _ in fused.named_modules()] == [n for n, _ in plain.named_modules()]
    for model, name in ((plain, "plain"), (fused, "fused")):
        nf4.save_adapter(model, tmp_path / name)
    read = [(tmp_path / n / "adapter_model.safetensors").read_bytes() for n in ("plain", "fused")]
    assert read[0] == read[1]
    randomize_adapters(fused, scale=0.5)
    nf4.load_adapter(fused, tmp_path / "plain")
    ids = token_ids()
    torch.testing.assert_close(fused(ids).logits, plain(ids).logits)


@pytest.mark.filterwarnings("ignore:nf4. merging")
def test_merged_layers_compute_for_themselves(calls: list[int]) -> None:
    plain, fused = pair()
    ids = token_ids()
    for model in (plain, fused):
        model.eval().model.layers[0].self_attn.k_proj.merge()
    with torch.no_grad():
        torch.testing.assert_close(fused(ids).logits, plain(ids).logits)
        assert calls == [2, 3, 2]
        attention = fused.model.layers[0].self_attn
        assert "not fused: an adapter is merged" in repr(attention.q_proj)
        attention.k_proj.unmerge()
        plain.model.layers[0].self_attn.k_proj.unmerge()
        torch.testing.assert_close(fused(ids).logits, plain(ids).logits)
    assert calls[3:] == [3, 2, 3, 2] and "fused=" in repr(attention.q_proj)
    merged = [nf4.merge_and_unload(m, into="16bit") for m in (plain, fused)]
    torch.testing.assert_close(merged[0](ids).logits, merged[1](ids).logits)


def test_a_replaced_layer_ends_its_group(calls: list[int]) -> None:
    plain, fused = pair()
    for model in (plain, fused):
        attention = model.model.layers[0].self_attn
        attention.q_proj = attention.q_proj.to_linear()
    ids = token_ids()
    assert_equal(step(fused, ids), step(plain, ids))
    assert calls == [2, 3, 2]


def test_different_dropout_is_not_fused(calls: list[int]) -> None:
    plain, fused = pair()
    for model in (plain, fused):
        model.model.layers[1].mlp.up_proj.lora_dropout = 0.5
    ids = token_ids()
    assert_equal(step(fused, ids), step(plain, ids))
    assert calls == [3, 2, 3]
    assert "not fused: the layers have different dropout" in repr(fused.model.layers[1].mlp)


def test_different_inputs_stop_the_group(calls: list[int]) -> None:
    """A hook that gives one layer another tensor: right numbers, one warning, no wasted call."""
    plain, fused = pair()
    for model in (plain, fused):
        layer = model.model.layers[0].self_attn.k_proj
        layer.register_forward_pre_hook(lambda module, args: (args[0] * 2,))
    ids = token_ids()
    expected = step(plain, ids)
    with pytest.warns(UserWarning, match="q_proj, k_proj, v_proj are not fused: .*different input"):
        ours = step(fused, ids)
    assert_equal(ours, expected)
    assert calls == [3, 2, 3, 2]
    assert_equal(step(fused, ids), expected)
    assert calls[4:] == [2, 3, 2]


def test_an_input_changed_in_place_is_another_input() -> None:
    _, fused = pair()
    layer = fused.model.layers[0].self_attn
    x = torch.randn(2, 64)
    with torch.no_grad():
        layer.q_proj.shared._enter(layer, ())
        layer.q_proj(x)
        x.mul_(2)
        with pytest.warns(UserWarning, match="not fused"):
            y = layer.k_proj(x)
        torch.testing.assert_close(y, layer.k_proj(x.clone()))


def test_layers_alone_compute_for_themselves(calls: list[int]) -> None:
    """Outside the forward of their parent nothing is kept: an adapter may change in between."""
    _, fused = pair()
    layer = fused.model.layers[0].self_attn
    x = torch.randn(2, 64)
    with torch.no_grad():
        layer.q_proj(x)
        before = layer.k_proj(x)
        layer.k_proj.lora_B.mul_(2)
        assert not torch.equal(layer.k_proj(x), before)
    assert calls == []


def test_an_error_leaves_nothing_behind() -> None:
    _, fused = pair()
    layer = fused.model.layers[0].self_attn
    handle = layer.v_proj.register_forward_pre_hook(_fail)
    with pytest.raises(KeyError):
        fused(token_ids())
    shared = layer.q_proj.shared
    assert shared._pending is None and not shared._open
    handle.remove()
    fused(token_ids())


def _fail(module: nn.Module, args: Any) -> None:
    raise KeyError


def _deepcopy(model: nn.Module) -> nn.Module:
    return copy.deepcopy(model)


def _pickle(model: nn.Module) -> nn.Module:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize("clone", [_deepcopy, _pickle])
def test_a_copy_is_fused_by_itself(
    clone: Callable[[nn.Module], nn.Module], calls: list[int]
) -> None:
    _, fused = pair()
    other = clone(fused)
    ids = token_ids()
    before = step(fused, ids)
    with torch.no_grad():
        for parameter in fused.parameters():
            if parameter.requires_grad:
                parameter.zero_()
    calls.clear()
    assert_equal(step(other, ids), before)
    assert calls == [3, 2] * 2


@pytest.mark.filterwarnings("ignore")
def test_compiled_layers_compute_for_themselves(calls: list[int]) -> None:
    plain, fused = pair()
    ids = token_ids()
    expected = plain(ids).logits
    compiled = torch.compile(fused.model.layers[0].mlp, fullgraph=True, backend="aot_eager")
    x = torch.randn(2, 3, 64)
    torch.testing.assert_close(compiled(x), plain.model.layers[0].mlp(x))
    assert calls == []
    whole = torch.compile(fused, backend="aot_eager")
    torch.testing.assert_close(whole(ids).logits, expected)


def test_nothing_to_fuse_is_said() -> None:
    model = tiny.opt(torch.float32)
    lora = nf4.LoraConfig(r=2, target_modules=["q_proj", "k_proj"])
    with pytest.warns(UserWarning, match=r"fuse=True finds no adapters .* this model is opt"):
        nf4.prepare_model(model, lora=lora, progress=False, fuse=True)
