"""save_adapter and load_adapter: PEFT's files both ways, damaged files, a full disk."""

from __future__ import annotations

import copy
import json
import resource
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from safetensors.torch import load_file, save_file
from tiny import randomize_adapters, token_ids
from torch import nn

import nf4

LORA = nf4.LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "down_proj"])
WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"


def quantized() -> nn.Module:
    """A tiny Llama in NF4, with a K of down_proj that no block size divides."""
    return tiny.quantized_llama(torch.float32, intermediate_size=100)


def adapted(model: nn.Module | None = None, lora: nf4.LoraConfig = LORA) -> nn.Module:
    """A copy of ``model`` with an adapter of random values."""
    model = quantized() if model is None else copy.deepcopy(model)
    nf4.prepare_model(model, lora=lora, progress=False)
    randomize_adapters(model)
    return model.eval()


def trainable(model: nn.Module) -> set[str]:
    return {name for name, p in model.named_parameters() if p.requires_grad}


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_round_trip(tmp_path: Path) -> None:
    base = quantized()
    model, ids = adapted(base), token_ids()
    nf4.save_adapter(model, tmp_path)
    other = copy.deepcopy(base)
    for _ in range(2):  # the second time over an adapter that is there already
        nf4.load_adapter(other, tmp_path)
        assert torch.equal(other.eval()(ids).logits, model(ids).logits)
        randomize_adapters(other)


def test_loading_leaves_only_the_adapter_trainable(tmp_path: Path) -> None:
    model = adapted()
    nf4.save_adapter(model, tmp_path)
    other = quantized().requires_grad_(False)
    other.model.norm.weight.requires_grad_(True)  # as from_pretrained leaves it
    nf4.load_adapter(other, tmp_path)
    assert trainable(other) == trainable(model) and trainable(model)


def test_loading_keeps_fused_layers_fused(tmp_path: Path) -> None:
    lora = nf4.LoraConfig(r=4, target_modules="all-linear")
    nf4.save_adapter(adapted(lora=lora), tmp_path)
    model = nf4.prepare_model(tiny.llama(intermediate_size=100), lora=lora, fuse=True)
    nf4.load_adapter(model, tmp_path)
    model(token_ids())
    assert "fused=q_proj+k_proj+v_proj" in repr(model.model.layers[0].self_attn.q_proj)


class TestPeft:
    """The same logits over the plain 16-bit model, whoever wrote the file."""

    @pytest.fixture(params=["llama", "opt", "gpt2"])
    def base(self, request: pytest.FixtureRequest) -> tuple[nn.Module, list[str]]:
        """A quantized model with the layers to adapt: without biases, with them, and Conv1D."""
        pytest.importorskip("peft")
        if request.param == "llama":
            return quantized(), ["q_proj", "down_proj"]
        if request.param == "opt":
            model, targets = tiny.opt(torch.float32), ["q_proj", "fc1"]
        else:
            from transformers import GPT2Config, GPT2LMHeadModel

            config = GPT2Config(n_embd=64, n_layer=2, n_head=2, vocab_size=128, eos_token_id=0)
            model, targets = GPT2LMHeadModel(config), ["c_attn", "c_fc"]
        return nf4.prepare_model(model, progress=False).eval(), targets

    @staticmethod
    def randomize(model: nn.Module) -> None:
        """Everything that trains, so that a tensor left out of a file changes the logits."""
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter.add_(torch.randn_like(parameter), alpha=0.1)

    @pytest.mark.filterwarnings("ignore:fan_in_fan_out")
    @pytest.mark.parametrize("rslora", [False, True])
    @pytest.mark.parametrize("bias", ["none", "lora_only", "all"])
    def test_both_ways(
        self, bias: str, rslora: bool, base: tuple[nn.Module, list[str]], tmp_path: Path
    ) -> None:
        import peft

        model, targets = base
        settings: dict[str, Any] = {
            "r": 4, "lora_alpha": 8, "target_modules": targets, "bias": bias, "use_rslora": rslora
        }  # fmt: skip
        ids = token_ids()
        plain = nf4.merge_and_unload(copy.deepcopy(model), dtype=torch.float32)

        ours = nf4.prepare_model(
            copy.deepcopy(model), lora=nf4.LoraConfig(**settings, lora_dropout=0), progress=False
        ).eval()
        self.randomize(ours)
        nf4.save_adapter(ours, tmp_path / "ours")
        theirs = peft.PeftModel.from_pretrained(copy.deepcopy(plain), tmp_path / "ours").eval()
        torch.testing.assert_close(theirs(ids).logits, ours(ids).logits, rtol=1e-4, atol=1e-5)

        theirs = peft.get_peft_model(
            plain, peft.LoraConfig(**settings, task_type="CAUSAL_LM")
        ).eval()
        self.randomize(theirs)
        theirs.save_pretrained(tmp_path / "peft")
        back = nf4.load_adapter(copy.deepcopy(model), tmp_path / "peft").eval()
        torch.testing.assert_close(back(ids).logits, theirs(ids).logits, rtol=1e-4, atol=1e-5)
        assert len(trainable(back)) == len(trainable(theirs))

    def test_bfloat16(self, tmp_path: Path) -> None:
        """Within the rounding of bfloat16, the dtype that models really have."""
        peft = pytest.importorskip("peft")
        model, ids = tiny.quantized_llama(torch.bfloat16), token_ids()
        ours = adapted(model)
        nf4.save_adapter(ours, tmp_path)
        plain = nf4.merge_and_unload(copy.deepcopy(model))
        theirs = peft.PeftModel.from_pretrained(plain, tmp_path).eval()
        exact = nf4.load_adapter(copy.deepcopy(model).float(), tmp_path).eval()(ids).logits
        rounding = (theirs(ids).logits - exact).norm()
        assert 0 < (ours(ids).logits - exact).norm() <= 1.25 * rounding

    def test_settings_that_choose_layers_do_not_matter_to_a_file(self, tmp_path: Path) -> None:
        peft = pytest.importorskip("peft")
        model, ids = quantized(), token_ids()
        plain = nf4.merge_and_unload(copy.deepcopy(model), dtype=torch.float32)
        config = peft.LoraConfig(
            r=4, target_modules=["q_proj"], layers_to_transform=[1], init_lora_weights="gaussian"
        )
        theirs = peft.get_peft_model(plain, config).eval()
        randomize_adapters(theirs)
        theirs.save_pretrained(tmp_path)
        back = nf4.load_adapter(model, tmp_path).eval()
        torch.testing.assert_close(back(ids).logits, theirs(ids).logits, rtol=1e-4, atol=1e-5)
        with pytest.raises(ValueError, match="init_lora_weights is not supported, got 'gaussian'"):
            nf4.LoraConfig.coerce(config)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"r": 5}, r"lora_A must have shape \[5, .*\], got \[4, "),
        ({"r": "four"}, "r must be a number, got 'four'"),
        ({"r": None}, "r must be a number, got None"),
        ({"lora_alpha": []}, r"lora_alpha must be a number, got \[\]"),
        ({"bias": "some"}, "bias must be none, all or lora_only, got 'some'"),
        ({"peft_type": "IA3"}, "peft_type must be LORA, got IA3"),
        ({"use_dora": True}, "use_dora is not supported"),
        ({"rank_pattern": {"q_proj": 8}}, "rank_pattern is not supported"),
        ({"a_later_peft": True}, "a_later_peft is not supported"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights is not supported .* got 'pissa'"),
    ],
    ids=str,
)
def test_settings_that_cannot_be_read_are_refused(
    change: dict, message: str, tmp_path: Path
) -> None:
    model = adapted()
    nf4.save_adapter(model, tmp_path)
    settings = json.loads((tmp_path / CONFIG).read_text())
    (tmp_path / CONFIG).write_text(json.dumps({**settings, **change}))
    with pytest.raises(ValueError, match=message):
        nf4.load_adapter(model, tmp_path)


def _drop_lora_b(tensors: dict) -> None:
    tensors.pop(next(key for key in tensors if "layers.1.mlp.down_proj.lora_B" in key))


def _drop_a_layer(tensors: dict) -> None:
    for key in [key for key in tensors if "layers.1.mlp.down_proj" in key]:
        del tensors[key]


def _rename(tensors: dict) -> None:
    key = next(iter(tensors))
    tensors[key.replace("model.layers", "model.blocks")] = tensors.pop(key)


def _add_magnitude(tensors: dict) -> None:
    tensors["base_model.model.x.lora_magnitude_vector"] = torch.ones(3)


def _add_bias(tensors: dict) -> None:
    tensors["base_model.model.model.layers.0.self_attn.q_proj.bias"] = torch.ones(64)


def _spoil(tensors: dict) -> None:
    next(iter(tensors.values()))[0, 0] = torch.nan


def _to_int(tensors: dict) -> None:
    key = next(iter(tensors))
    tensors[key] = tensors[key].to(torch.int8)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_drop_lora_b, r"missing key .*layers\.1\.mlp\.down_proj\.lora_B\.weight"),
        (_drop_a_layer, r"every adapter .* 1 missing, first model\.layers\.1\.mlp\.down_proj"),
        (_rename, r"blocks.* must be a quantized layer .* got no such module"),
        (_add_magnitude, "keys must be LoRA weights or biases, got .*lora_magnitude_vector"),
        (_add_bias, r"q_proj\.bias must fit a bias of the model"),
        (_spoil, "lora_[AB].weight must hold finite"),
        (_to_int, "lora_[AB].weight must hold finite floating-point"),
        (dict.clear, "must hold adapters"),
    ],
)
def test_damaged_weights_are_refused_and_nothing_changes(
    change: Callable[[dict], object], message: str, tmp_path: Path
) -> None:
    model = adapted()
    nf4.save_adapter(model, tmp_path)
    before, trained = copy.deepcopy(model.state_dict()), trainable(model)
    tensors = load_file(tmp_path / WEIGHTS)
    change(tensors)
    save_file(tensors, tmp_path / WEIGHTS)
    with pytest.raises(ValueError, match=message):
        nf4.load_adapter(model, tmp_path)
    assert trainable(model) == trained
    for key, value in model.state_dict().items():
        assert torch.equal(value, before[key])


def test_truncated_and_missing_files(tmp_path: Path) -> None:
    model = adapted()
    with pytest.raises(FileNotFoundError, match=CONFIG):
        nf4.load_adapter(model, tmp_path)
    nf4.save_adapter(model, tmp_path)
    whole = files(tmp_path)
    for size in (0, 7, 100, len(whole[WEIGHTS]) // 2, len(whole[WEIGHTS]) - 1):
        (tmp_path / WEIGHTS).write_bytes(whole[WEIGHTS][:size])
        with pytest.raises(ValueError, match=f"{WEIGHTS} is truncated or damaged"):
            nf4.load_adapter(model, tmp_path)
    (tmp_path / WEIGHTS).unlink()
    with pytest.raises(FileNotFoundError, match=WEIGHTS):
        nf4.load_adapter(model, tmp_path)
    (tmp_path / WEIGHTS).write_bytes(whole[WEIGHTS])
    for text in (b"", b"{", whole[CONFIG][:-5], b"\xff\xfe\x00"):
        (tmp_path / CONFIG).write_bytes(text)
        with pytest.raises(ValueError, match="must hold JSON"):
            nf4.load_adapter(model, tmp_path)
    for text in (b"[]", b"3", b"null"):
        (tmp_path / CONFIG).write_bytes(text)
        with pytest.raises(ValueError, match="must hold settings"):
            nf4.load_adapter(model, tmp_path)
    (tmp_path / CONFIG).write_bytes(b"{}")
    with pytest.raises(ValueError, match="settings must name r and lora_alpha"):
        nf4.load_adapter(model, tmp_path)


def test_models_without_a_place_for_it(tmp_path: Path) -> None:
    nf4.save_adapter(adapted(), tmp_path)
    with pytest.raises(ValueError, match=r"_proj must be a quantized layer .* got Linear"):
        nf4.load_adapter(tiny.llama(), tmp_path)
    with pytest.raises(ValueError, match="must have Linear4bitLoRA layers, got none"):
        nf4.save_adapter(quantized(), tmp_path)
    mixed = adapted()
    mixed.model.layers[0].self_attn.q_proj.lora_alpha = 99
    with pytest.raises(ValueError, match=r"all adapters must share lora_alpha, got 99 .* and 8"):
        nf4.save_adapter(mixed, tmp_path)


def test_a_full_disk_leaves_the_old_adapter(tmp_path: Path) -> None:
    """The weights stop at 2000 bytes, by the system's own limit on the size of a file."""
    model = adapted()
    nf4.save_adapter(model, tmp_path)
    old = files(tmp_path)
    randomize_adapters(model)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2000, hard))
    try:
        with pytest.raises(OSError, match=rf"{WEIGHTS} must be writable, .*File too large"):
            nf4.save_adapter(model, tmp_path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert files(tmp_path) == old


def test_a_disk_that_fills_between_the_files_leaves_both(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """New weights beside old settings would be another adapter."""
    model = adapted()
    nf4.save_adapter(model, tmp_path)
    old = files(tmp_path)
    randomize_adapters(model)
    for _, layer in nf4.lora.adapter.adapter_layers(model):
        layer.lora_alpha = 99

    def full_disk(path: Path, text: str, encoding: str) -> None:
        path.write_bytes(text[:10].encode())
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_text", full_disk)
    with pytest.raises(OSError, match=f"{CONFIG} must be writable, .*No space left"):
        nf4.save_adapter(model, tmp_path)
    assert files(tmp_path) == old
    monkeypatch.undo()
    nf4.save_adapter(model, tmp_path)
    assert files(tmp_path).keys() == old.keys() and files(tmp_path) != old


def test_files_are_as_readable_as_the_umask_says(tmp_path: Path) -> None:
    nf4.save_adapter(adapted(), tmp_path)
    (tmp_path / "beside").touch()
    assert len({path.stat().st_mode for path in tmp_path.iterdir()}) == 1
