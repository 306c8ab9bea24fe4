"""prepare_model, adapter files and merging, on tiny models and against PEFT."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import tiny
import torch
from tiny import randomize_adapters, token_ids
from torch import nn

import nf4

LORA = nf4.LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "down_proj"])


def tiny_llama(**changes: object) -> nn.Module:
    """``tiny.llama`` in float32, with a K of down_proj that no block size divides."""
    return tiny.llama(torch.float32, intermediate_size=100, **changes).eval()


def _prepared(lora: nf4.LoraConfig = LORA) -> tuple[nn.Module, dict[str, torch.Tensor]]:
    model = tiny_llama()
    base = copy.deepcopy(model.state_dict())
    nf4.prepare_model(model, lora=lora, progress=False)
    randomize_adapters(model)
    return model.eval(), base


def test_prepare_model_quantizes_targets_and_freezes(capsys: pytest.CaptureFixture) -> None:
    model, _ = _prepared()
    layer = model.model.layers[0]
    assert type(layer.self_attn.q_proj) is nf4.Linear4bitLoRA
    assert type(layer.self_attn.k_proj) is nf4.NF4Linear
    assert type(model.lm_head) is nn.Linear
    trainable = {n for n, p in model.named_parameters() if p.requires_grad}
    assert trainable and all("lora_" in name for name in trainable)
    nf4.print_trainable_parameters(model)
    plain = sum(p.numel() for p in tiny_llama().parameters())
    adapters = sum(p.numel() for p in model.parameters() if p.requires_grad)
    printed = capsys.readouterr().out
    assert f"trainable params: {adapters:,} || all params: {plain + adapters:,}" in printed


def test_prepare_model_keeps_bytes_of_quantized_layers() -> None:
    model, _ = _prepared(None)
    before = {n: m.q.packed for n, m in model.named_modules() if isinstance(m, nf4.NF4Linear)}
    nf4.prepare_model(model, lora=nf4.LoraConfig(r=2), progress=False)
    for name, packed in before.items():
        layer = model.get_submodule(name)
        assert type(layer) is nf4.Linear4bitLoRA and layer.weight.data_ptr() == packed.data_ptr()


@pytest.mark.parametrize("again", [None, nf4.LoraConfig(r=2)], ids=["without", "with"])
def test_prepare_model_again_leaves_adapters_as_they_are(again: nf4.LoraConfig | None) -> None:
    model = nf4.prepare_model(tiny_llama(), lora=nf4.LoraConfig(r=4), progress=False)
    before = {n: p for n, p in model.named_parameters() if p.requires_grad}
    assert before
    nf4.prepare_model(model, lora=again, progress=False)
    after = {n: p for n, p in model.named_parameters() if p.requires_grad}
    assert before.keys() == after.keys()
    assert all(after[name] is p for name, p in before.items())


@pytest.mark.parametrize("training", [True, False])
def test_a_layer_over_another_one_is_it(training: bool) -> None:
    """With and without an adapter, both ways: the same bytes, settings, mode and output."""
    linear = nn.Linear(70, 50, dtype=torch.bfloat16).train(training)
    plain = nf4.NF4Linear.from_linear(linear, block_size=32, compute_dtype=torch.float32)
    plain.fan_in_fan_out = True  # as of a Conv1D
    adapted = nf4.Linear4bitLoRA.from_layer(plain, r=3, lora_alpha=6)
    back = nf4.NF4Linear.from_layer(adapted)
    assert type(adapted) is nf4.Linear4bitLoRA and type(back) is nf4.NF4Linear
    assert (adapted.r, adapted.scaling) == (3, 2.0)
    x = torch.randn(4, 70)
    for layer in (adapted, back):
        assert layer.weight.data_ptr() == plain.weight.data_ptr()
        assert layer.bias.data_ptr() == plain.bias.data_ptr()
        assert layer.compute_dtype is torch.float32 and layer.fan_in_fan_out
        assert layer.training is training
        torch.testing.assert_close(layer(x), plain(x))


def test_prepare_model_refuses_what_it_cannot_do() -> None:
    with pytest.raises(ValueError, match="target_modules must match a linear layer"):
        nf4.prepare_model(tiny_llama(), lora=nf4.LoraConfig(target_modules=["nothing"]))
    model = tiny_llama()
    model.model.layers[1].mlp.up_proj.weight.data[3, 5] = float("nan")
    with pytest.raises(ValueError, match=r"layers\.1\.mlp\.up_proj: .*got nan at index \[3, 5\]"):
        nf4.prepare_model(model, progress=False)


def test_presets_and_coercion() -> None:
    assert nf4.LoraConfig.for_model_size("small").r == 8
    assert "gate_proj" in nf4.LoraConfig.for_model_size("large").target_modules
    with pytest.raises(ValueError, match="size must be one of small, medium, large"):
        nf4.LoraConfig.for_model_size("huge")
    peft = pytest.importorskip("peft")
    theirs = peft.LoraConfig(r=3, lora_alpha=6, lora_dropout=0.1, target_modules=["q_proj"])
    ours = nf4.LoraConfig.coerce(theirs)
    assert (ours.r, ours.lora_alpha, ours.lora_dropout) == (3, 6, 0.1)
    assert ours.target_modules == ["q_proj"]
    with pytest.raises(ValueError, match="use_dora is not supported"):
        nf4.LoraConfig.coerce(peft.LoraConfig(r=3, use_dora=True, target_modules=["q_proj"]))


def test_training_lowers_the_loss_and_moves_only_adapters() -> None:
    model, _ = _prepared()
    frozen = {n: p.detach().clone() for n, p in model.named_parameters() if not p.requires_grad}
    ids = token_ids()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(8):
        loss = model.train()(ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.1
    for name, parameter in model.named_parameters():
        if name in frozen:
            assert torch.equal(parameter, frozen[name])


@pytest.mark.parametrize("checkpointing", [False, True])
def test_prepare_for_qlora_gives_the_same_gradients(checkpointing: bool) -> None:
    model, _ = _prepared()
    plain = copy.deepcopy(model)
    ids = token_ids()
    if checkpointing:
        nf4.prepare_for_qlora(model)
    for m in (model, plain):
        torch.manual_seed(7)
        m.train()(ids, labels=ids, use_cache=False).loss.backward()
    grads = dict(plain.named_parameters())
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            torch.testing.assert_close(parameter.grad, grads[name].grad)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_merge_into_16_bits_keeps_the_outputs(dtype: torch.dtype) -> None:
    model, _ = _prepared()
    ids = token_ids()
    expected = model(ids).logits
    merged = nf4.merge_and_unload(model, into="16bit", dtype=dtype)
    assert not any(isinstance(m, nf4.NF4Linear) for m in merged.modules())
    tolerance = 1e-5 if dtype is torch.float32 else 0.05
    torch.testing.assert_close(
        merged.to(dtype)(ids).logits.float(), expected, rtol=0, atol=tolerance
    )


def test_merge_needs_every_base_weight(tmp_path: Path) -> None:
    model, base = _prepared()
    missing = {k: v for k, v in base.items() if "layers.1.mlp.down_proj" not in k}
    with pytest.raises(KeyError, match=r"1 missing, first 'model\.layers\.1\.mlp\.down_proj"):
        nf4.merge_and_unload(model, into="nf4", base=missing)
    with pytest.raises(FileNotFoundError, match="no safetensors file"):
        nf4.merge_and_unload(model, into="nf4", base=tmp_path)
    with pytest.raises(ValueError, match="into must be '16bit' or 'nf4', got '8bit'"):
        nf4.merge_and_unload(model, into="8bit")
    whole = tiny_llama()
    whole.load_state_dict(base)
    whole.save_pretrained(tmp_path)
    nf4.merge_and_unload(model, into="nf4", base=tmp_path)
    assert not any(isinstance(m, nf4.Linear4bitLoRA) for m in model.modules())


@pytest.mark.parametrize("into", ["16bit", "nf4"])
def test_a_damaged_base_is_refused(into: str, tmp_path: Path) -> None:
    model, base = _prepared()
    name = "model.layers.0.self_attn.q_proj"
    for wrong in (base[f"{name}.weight"][:, :1], base[f"{name}.weight"][:1]):
        with pytest.raises(ValueError, match=rf"{name} in base must have shape \[64, 64\], got"):
            nf4.merge_and_unload(copy.deepcopy(model), into, base={**base, f"{name}.weight": wrong})
    whole = tiny_llama()
    whole.save_pretrained(tmp_path, max_shard_size="100KB")
    shard = max(tmp_path.glob("*.safetensors"))
    for size in (shard.stat().st_size - 1, 7, 0):
        shard.write_bytes(shard.read_bytes()[:size])
        with pytest.raises(ValueError, match=f"{shard.name} is truncated or damaged"):
            nf4.merge_and_unload(copy.deepcopy(model), into, base=tmp_path)
    index = tmp_path / "model.safetensors.index.json"
    for text in ("{", "[]", "{}"):
        index.write_text(text)
        with pytest.raises(ValueError, match="must hold a weight_map"):
            nf4.merge_and_unload(copy.deepcopy(model), into, base=tmp_path)


def _small_adapter(size: int, share: float) -> tuple[nn.Linear, nf4.Linear4bitLoRA, torch.Tensor]:
    """A Gaussian layer with a rank-16 adapter of ``share`` of the weight's norm."""
    linear = nn.Linear(size, size, bias=False)
    nn.init.normal_(linear.weight)
    layer = nf4.Linear4bitLoRA.from_linear(linear, r=16)
    nn.init.normal_(layer.lora_B)
    with torch.no_grad():
        layer.lora_B *= share * linear.weight.norm() / layer.delta_weight().norm()
    return linear, layer, layer.delta_weight()


def test_merging_a_small_adapter_into_nf4_from_the_16_bit_base_keeps_it() -> None:
    """<Q(W + D) - Q(W), D> / |D|^2 within 1 +- 0.01, over 16 draws at 1024^2, |D| = 1 % of |W|.

    Requantizing the dequantized weight keeps about 1.4 % of it.
    """
    kept, lost = [], []
    for _ in range(16):
        linear, layer, delta = _small_adapter(1024, 0.01)
        start = layer.dequantize()
        layer.merge(linear.weight)
        kept.append(((layer.dequantize() - start) * delta).sum() / delta.square().sum())
        layer.unmerge()
        assert torch.equal(layer.dequantize(), start)
    assert abs(torch.stack(kept).mean() - 1) <= 0.01
    with pytest.warns(UserWarning):
        layer.merge()
    lost.append(((layer.dequantize() - start) * delta).sum() / delta.square().sum())
    assert lost[0] < 0.1


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float16, 0.03), (torch.bfloat16, 0.2)])
def test_merging_into_16_bits_rounds_once(dtype: torch.dtype, bound: float) -> None:
    _, layer, delta = _small_adapter(1024, 0.01)
    exact = layer.dequantize(torch.float32) + delta
    merged = nf4.merge_and_unload(nn.Sequential(layer), dtype=dtype)[0].weight
    assert (merged.float() - exact).norm() <= bound * delta.norm()


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("lm_head", [True, False])
def test_prepare_model_quantizes_embeddings(tied: bool, lm_head: bool) -> None:
    model = tiny_llama(tie_word_embeddings=tied)
    settings = nf4.NF4Config(embeddings=True, lm_head=lm_head, modules_to_not_convert=["v_proj"])
    nf4.prepare_model(model, settings, progress=False)
    table, head = model.get_input_embeddings(), model.get_output_embeddings()
    assert isinstance(table, nf4.NF4Embedding)
    assert isinstance(head, nf4.NF4Linear) == (tied or lm_head)
    assert (head.weight is table.weight) == tied
    assert type(model.model.layers[0].self_attn.v_proj) is torch.nn.Linear
    ids = token_ids()
    before = model(ids).logits
    nf4.merge_and_unload(model)
    table, head = model.get_input_embeddings(), model.get_output_embeddings()
    assert type(table) is torch.nn.Embedding and type(head) is torch.nn.Linear
    assert (head.weight is table.weight) == tied
    assert torch.allclose(model(ids).logits, before, atol=1e-4)


def test_prepare_model_refuses_a_tied_head_alone() -> None:
    with pytest.raises(ValueError, match="lm_head needs embeddings=True"):
        nf4.prepare_model(tiny_llama(tie_word_embeddings=True), nf4.NF4Config(lm_head=True))


@pytest.mark.parametrize("bias", ["none", "lora_only", "all"])
def test_prepare_for_qlora_keeps_the_biases_that_train(bias: str) -> None:
    def trainable(model: nn.Module) -> set[str]:
        return {name for name, p in model.named_parameters() if p.requires_grad}

    lora = nf4.LoraConfig(r=2, target_modules=["q_proj"], bias=bias)
    model = nf4.prepare_model(tiny.opt(), lora=lora, progress=False)
    before = trainable(model)
    kept = {name for name in before if name.endswith("bias")}
    assert bool(kept) == (bias != "none") and any("k_proj" in n for n in kept) == (bias == "all")
    assert trainable(nf4.prepare_for_qlora(model)) == before
    model.get_input_embeddings().weight.requires_grad_(True)  # not frozen before: now it is
    assert trainable(nf4.prepare_for_qlora(model)) == before - kept
