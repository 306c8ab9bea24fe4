"""The estimate against real training steps: exact bytes, what autograd saves, allocator peaks."""

from __future__ import annotations

import json
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import nf4
import nf4.optim as optim_classes

transformers = pytest.importorskip("transformers")
pytest.importorskip("trl")

from nf4.cli import estimate as command  # noqa: E402 needs transformers
from nf4.cli.memory import METHODS, Estimate, build, estimate  # noqa: E402
from nf4.cli.presets import lora_config, size_name  # noqa: E402
from nf4.cli.step import loss_function  # noqa: E402

VOCABULARY = 320
_WIDTHS = {"hidden_size": 64, "num_attention_heads": 4, "vocab_size": VOCABULARY}
_GROUPED = {**_WIDTHS, "num_key_value_heads": 2, "num_hidden_layers": 4}
_TOKENS = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}

# More layers than the estimate runs, so that the rest is extrapolated. Gemma 2 has two kinds.
CONFIGS: dict[str, Callable[[], Any]] = {
    "llama": lambda: transformers.LlamaConfig(intermediate_size=160, **_GROUPED),
    "gemma2": lambda: transformers.Gemma2Config(
        intermediate_size=160,
        head_dim=16,
        sliding_window=32,
        **{**_GROUPED, "num_hidden_layers": 8},
        **_TOKENS,
    ),
    "gpt2": lambda: transformers.GPT2Config(
        n_embd=64, n_layer=4, n_head=4, vocab_size=VOCABULARY, n_positions=512, **_TOKENS
    ),
    "opt": lambda: transformers.OPTConfig(
        ffn_dim=160, num_hidden_layers=4, word_embed_proj_dim=64, **_WIDTHS, **_TOKENS
    ),
    "qwen3-moe": lambda: transformers.Qwen3MoeConfig(
        moe_intermediate_size=48, num_experts=4, num_experts_per_tok=2, head_dim=16, **_GROUPED
    ),
}


def _config(**changes: Any) -> Any:
    return transformers.LlamaConfig(**{**_GROUPED, "intermediate_size": 100, **changes})


def _lora(method: str = "qlora", r: int = 8) -> nf4.LoraConfig:
    # On a CPU, dropout saves a mask in its input's dtype; on a GPU and in fakes, as bools.
    dropout = 0.05 if method == "qlora" else 0.0
    return nf4.LoraConfig(r=r, target_modules="all-linear", lora_dropout=dropout)


def _real(config: Any, method: str, lora: nf4.LoraConfig, checkpointing: bool = False) -> Any:
    """The model that a method trains, with zeros for weights and gradients that are there."""
    model = build(config, method, torch.bfloat16, lora, None).to_empty(device="cpu")
    with torch.no_grad():
        for tensor in [*model.parameters(), *model.buffers()]:
            tensor.zero_()
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.grad = torch.zeros_like(parameter)
    if checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    return model.train()


@pytest.mark.parametrize("optim", ["adamw_torch_fused", "paged_adamw_8bit", "paged_adamw_32bit"])
@pytest.mark.parametrize("format", ["nf4", "dynamic8"])
def test_static_bytes_equal_a_real_run(optim: str, format: str) -> None:
    config, lora = _config(hidden_size=128), _lora(r=32)
    settings = nf4.NF4Config(format=format)
    predicted = estimate(config, "qlora", lora=lora, optim=optim, length=16, quantization=settings)
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    nf4.prepare_model(model, settings, lora, progress=False).train()
    parameters = [p for p in model.parameters() if p.requires_grad]
    kinds = {
        "adamw_torch_fused": lambda p: torch.optim.AdamW(p, fused=True),
        "paged_adamw_8bit": optim_classes.PagedAdamW8bit,
        "paged_adamw_32bit": optim_classes.PagedAdamW32bit,
    }
    optimizer = kinds[optim](parameters)
    ids = torch.randint(0, VOCABULARY, (1, 16))
    model(ids, labels=ids).loss.backward()
    optimizer.step()
    adapters = sum(p.nbytes for p in parameters)
    layers = [m for m in model.modules() if isinstance(m, nf4.NF4Linear)]
    scales = sum(t.nbytes for m in layers for t in m.q.tensors[1:] if t is not None)
    everything = sum(t.nbytes for t in [*model.parameters(), *model.buffers()])
    assert predicted.adapters == adapters
    assert predicted.scales == scales
    assert predicted.weights == everything - adapters - scales
    assert predicted.gradients == sum(p.grad.nbytes for p in parameters)
    assert predicted.optimizer == _state_bytes(optimizer)


def _state_bytes(optimizer: torch.optim.Optimizer) -> int:
    """Bytes of the state tensors, each storage once, without the shared code tables."""
    tables = {"qmap1", "qmap2"}
    storages = {
        value.untyped_storage()._cdata: value.untyped_storage().nbytes()
        for state in optimizer.state.values()
        for name, value in state.items()
        if isinstance(value, Tensor) and name not in tables
    }
    return sum(storages.values())


def test_static_bytes_of_full_fine_tuning_equal_a_real_run() -> None:
    config = _config()
    predicted = estimate(config, "full", length=16)
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    ids = torch.randint(0, VOCABULARY, (1, 16))
    model(ids, labels=ids).loss.backward()
    optimizer.step()
    assert predicted.weights == sum(t.nbytes for t in [*model.parameters(), *model.buffers()])
    assert predicted.gradients == sum(p.grad.nbytes for p in model.parameters())
    assert predicted.optimizer == _state_bytes(optimizer)
    assert predicted.scales == predicted.adapters == 0


@pytest.mark.parametrize("kind", ["llama", "gpt2", "opt"])
def test_adapters_of_peft_are_counted_to_the_byte(kind: str) -> None:
    """``nf4 finetune`` trains PEFT's adapters, and the estimate counts nf4's."""
    peft = pytest.importorskip("peft")
    config = CONFIGS[kind]()
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    nf4.prepare_model(model, progress=False)
    preset = lora_config(model, 10**6)
    real = peft.get_peft_model(
        model, peft.LoraConfig(r=preset.r, target_modules=preset.target_modules)
    )
    trained = sum(p.nbytes for p in real.parameters() if p.requires_grad)
    for method in ("lora", "qlora"):
        predicted = estimate(config, method, length=16)
        assert predicted.adapters == predicted.gradients == trained > 0


def _saved_peak(model: nn.Module, loss: Callable[[Tensor], Tensor], ids: Tensor) -> int:
    """The most bytes that autograd held at once, those that checkpointing recomputed among them."""
    hooks = torch.autograd.graph.saved_tensors_hooks
    recomputing = torch.utils.checkpoint._recomputation_hook
    own = {t.untyped_storage()._cdata for t in [*model.parameters(), *model.buffers()]}
    held: set[int] = set()
    live = peak = 0

    def release(key: int, size: int) -> None:
        nonlocal live
        held.discard(key)
        live -= size

    def pack(tensor: Tensor) -> Tensor:
        nonlocal live, peak
        storage = tensor.untyped_storage()
        if storage._cdata not in own and storage._cdata not in held:
            held.add(storage._cdata)
            live += storage.nbytes()
            peak = max(peak, live)
            weakref.finalize(storage, release, storage._cdata, storage.nbytes())
        return tensor

    original = hooks.__init__

    def counting(self: Any, pack_hook: Any, unpack_hook: Any) -> None:
        if isinstance(self, recomputing):
            original(self, lambda t: pack_hook(pack(t)), unpack_hook)
        else:
            original(self, pack_hook, unpack_hook)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(hooks, "__init__", counting)
        with hooks(pack, lambda tensor: tensor):
            value = loss(ids)
        value.backward()
    return peak


def _allocated_peak(loss: Callable[[Tensor], Tensor], ids: Tensor) -> int:
    """The most bytes that the CPU's allocator had given out, by its own events."""
    profiler = torch.profiler
    with profiler.profile(
        activities=[profiler.ProfilerActivity.CPU], profile_memory=True
    ) as profile:
        loss(ids).backward()
    results: Any = profile.profiler
    events = [e for e in results.kineto_results.events() if e.name() == "[memory]"]
    live = peak = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        live += event.nbytes()
        peak = max(peak, live)
    assert peak > 0
    return peak


@pytest.mark.parametrize(
    "kind",
    [pytest.param(k, marks=[pytest.mark.check] * (k not in ("llama", "gpt2"))) for k in CONFIGS],
)
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("checkpointing", [False, True])
def test_activations_are_within_a_tenth_of_a_real_step(
    kind: str, method: str, checkpointing: bool
) -> None:
    for batch, length in ((2, 48), (1, 256)):
        config, lora = CONFIGS[kind](), _lora(method)
        predicted = estimate(
            config,
            method,
            lora=lora,
            batch=batch,
            length=length,
            checkpointing=checkpointing,
            gpu=False,
        )
        model = _real(config, method, lora, checkpointing)
        loss = loss_function(model)
        ids = torch.randint(3, VOCABULARY, (batch, length))
        saved = _saved_peak(model, loss, ids)
        assert abs(predicted.activations - saved) <= 0.1 * saved, (length, predicted, saved)
        peak = _allocated_peak(loss, ids)
        step = predicted.activations + predicted.workspace
        assert abs(step - peak) <= 0.1 * peak, (length, predicted, peak)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_every_layer_counts_in_a_deep_model(checkpointing: bool) -> None:
    """Deep enough that what the layers hand on outweighs one recomputed layer and the loss."""
    config, lora = _config(num_hidden_layers=24, vocab_size=64), _lora()
    predicted = estimate(
        config, "qlora", lora=lora, length=64, checkpointing=checkpointing, gpu=False
    )
    model = _real(config, "qlora", lora, checkpointing)
    ids = torch.randint(3, 64, (1, 64))
    saved = _saved_peak(model, loss_function(model), ids)
    assert abs(predicted.activations - saved) <= 0.03 * saved, (predicted, saved)


def test_a_gpu_s_workspace_holds_one_dequantized_weight() -> None:
    settings: dict[str, Any] = {"lora": _lora(), "batch": 2, "length": 256}
    cpu = estimate(_config(), "qlora", gpu=False, **settings)
    gpu = estimate(_config(), "qlora", gpu=True, **settings)
    assert gpu.workspace - cpu.workspace == 2 * 100 * 64


def test_a_65b_model_is_counted_from_its_config(tmp_path: Path, capsys: Any) -> None:
    config = _config(
        hidden_size=8192,
        intermediate_size=22016,
        num_hidden_layers=80,
        num_attention_heads=64,
        num_key_value_heads=64,
        vocab_size=32000,
    )
    path = tmp_path / "config.json"
    path.write_text(json.dumps(config.to_dict()))
    words = ["--model", str(path), "--length", "512", "--plot", str(tmp_path / "e.png"), "--json"]
    assert command.main([*words, "--gpu-gb", "48"]) == 0
    report = json.loads(capsys.readouterr().out)
    rows = {row["method"]: row for row in report["estimates"]}
    linear = 80 * (4 * 8192**2 + 3 * 8192 * 22016)
    blocks = linear // 64
    offsets = 80 * 7
    assert rows["qlora"]["scales"] == blocks + 4 * -(-blocks // 256) + 4 * offsets
    assert rows["full"]["weights"] > 2 * linear
    # The preset of this size: r=16 on all seven layers, in float32.
    adapters = 80 * 16 * 4 * (4 * 2 * 8192 + 3 * (8192 + 22016))
    assert rows["lora"]["adapters"] == rows["qlora"]["adapters"] == adapters
    # At least what checkpointing keeps: the input of every layer.
    assert rows["qlora"]["activations"] > 80 * 512 * 8192 * 2
    assert rows["qlora"]["total"] < 48 * 2**30 < rows["lora"]["total"]
    assert "fits" in report["advice"]
    assert (tmp_path / "e.png").stat().st_size > 1000


def test_advice_finds_what_fits(tmp_path: Path, capsys: Any) -> None:
    path = tmp_path / "config.json"
    path.write_text(json.dumps(_config().to_dict()))
    words = ["--model", str(path), "--length", "512", "--batch-size", "8", "--json"]

    def report(gib: float) -> dict[str, Any]:
        command.main([*words, "--gpu-gb", str(gib)])
        return json.loads(capsys.readouterr().out)

    roomy = report(10)
    assert "to spare" in roomy["advice"]
    qlora = roomy["estimates"][-1]
    static = qlora["total"] - qlora["activations"] - qlora["workspace"]
    advice = report((static + (qlora["total"] - static) / 3) / 2**30)["advice"]
    assert "fits with nf4 finetune --per_device_train_batch_size 2 --max_length 512" in advice
    assert "--gradient_accumulation_steps 4 --gradient_checkpointing True" in advice
    assert "before any activation" in report(static / 2**31)["advice"]


def test_total_is_the_sum() -> None:
    assert Estimate("full", 1, 2, 3, 4, 5, 6, 7).total == 28
    assert Estimate("full", 1, 2, 3, 4, 5, 6, 7).static == 15


@pytest.mark.parametrize(
    ("billions", "size"),
    [(1.1, "small"), (3.2, "small"), (6.74, "medium"), (8.03, "medium"), (13.02, "medium"),
     (14.8, "large"), (65.3, "large")],
)  # fmt: skip
def test_presets_go_by_the_size_a_model_is_named_for(billions: float, size: str) -> None:
    assert size_name(int(billions * 1e9)) == size


def test_presets_are_common_practice() -> None:
    model = build(_config(), "full", torch.bfloat16, None, None)
    attention = ["q_proj", "k_proj", "v_proj", "o_proj"]
    for size, r, alpha, targets in (
        ("small", 8, 16, attention),
        ("medium", 16, 32, attention),
        ("large", 16, 32, [*attention, "gate_proj", "up_proj", "down_proj"]),
    ):
        chosen = lora_config(model, 10**6, size)
        assert (chosen.r, chosen.lora_alpha, chosen.target_modules) == (r, alpha, targets)
    assert lora_config(model, 65 * 10**9).target_modules == [*attention, "gate_proj", "up_proj",
                                                             "down_proj"]  # fmt: skip
    gpt2 = build(CONFIGS["gpt2"](), "full", torch.bfloat16, None, None)
    assert lora_config(gpt2, 10**6).target_modules == "all-linear"
    assert lora_config(model, 10**6, "small", ["q_proj"], r=4).r == 4
