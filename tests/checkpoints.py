"""Checkpoints of tiny models without dropout, for the tests of loading and saving."""

from __future__ import annotations

import gc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import SIZES
from torch import Tensor

import nf4
from nf4.integrations.transformers import give_back_bitsandbytes, take_bitsandbytes
from nf4.nn import NF4Experts


def _llama(**changes: Any) -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    return LlamaForCausalLM(LlamaConfig(**{**SIZES, **changes}))


def _gpt2() -> Any:
    from transformers import GPT2Config, GPT2LMHeadModel

    return GPT2LMHeadModel(
        GPT2Config(
            n_embd=64, n_layer=2, n_head=4, vocab_size=128, n_positions=64, bos_token_id=1,
            eos_token_id=2, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0,
        )
    )  # fmt: skip


def _opt() -> Any:
    from transformers import OPTConfig, OPTForCausalLM

    sizes = {k: v for k, v in SIZES.items() if k not in ("intermediate_size", "hidden_size")}
    widths = {"hidden_size": 64, "ffn_dim": 128, "word_embed_proj_dim": 64}
    return OPTForCausalLM(OPTConfig(**widths, **sizes, dropout=0.0))


def _classifier() -> Any:
    from transformers import LlamaConfig, LlamaForSequenceClassification

    return LlamaForSequenceClassification(LlamaConfig(**SIZES, num_labels=3))


def _qwen3_moe() -> Any:
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    return Qwen3MoeForCausalLM(
        Qwen3MoeConfig(**SIZES, moe_intermediate_size=32, num_experts=4, num_experts_per_tok=2)
    )


def _mixtral() -> Any:
    from transformers import MixtralConfig, MixtralForCausalLM

    return MixtralForCausalLM(MixtralConfig(**SIZES, num_local_experts=4, num_experts_per_tok=2))


MODELS: dict[str, Callable[[], Any]] = {
    "llama": _llama,
    # 100 columns: blocks cross rows, and the last block of a matrix is short.
    "llama-short-blocks": lambda: _llama(intermediate_size=100),
    "llama-tied": lambda: _llama(tie_word_embeddings=True),
    "gpt2": _gpt2,
    "opt": _opt,
    "classifier": _classifier,
    "qwen3-moe": _qwen3_moe,
    "mixtral": _mixtral,
}


def reloads(kind: str) -> bool:
    """Whether the installed transformers can load this kind of model once it is quantized."""
    from transformers.quantizers.base import HfQuantizer

    experts = kind in ("qwen3-moe", "mixtral")
    return not experts or hasattr(HfQuantizer, "update_weight_conversions")


def save_model(kind: str, directory: Path, dtype: torch.dtype = torch.float32) -> Path:
    """Write a 16-bit checkpoint of a tiny model with random weights."""
    model = MODELS[kind]().to(dtype)
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):  # zero at first, which would hide a bias that gets lost
            torch.nn.init.normal_(parameter, std=0.1)
    model.save_pretrained(directory)
    return directory


def auto_class(kind: str) -> Any:
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

    return AutoModelForSequenceClassification if kind == "classifier" else AutoModelForCausalLM


# A quantized model goes to a GPU where there is one; these tests hold it against CPU tensors.
ON_CPU: dict[str, Any] = {"device_map": {"": "cpu"}}


def load(directory: Path, kind: str = "llama", **kwargs: Any) -> Any:
    """``from_pretrained`` onto the CPU, which must find every weight, and no other."""
    if "quantization_config" in (directory / "config.json").read_text() and not reloads(kind):
        pytest.skip("this release of transformers has no hook for quantized experts")
    kwargs = {**ON_CPU, **kwargs}
    model, info = auto_class(kind).from_pretrained(directory, output_loading_info=True, **kwargs)
    assert not info["missing_keys"] and not info["unexpected_keys"], info
    assert not info["mismatched_keys"], info
    return model


def quantized(directory: Path, kind: str = "llama", **settings: Any) -> Any:
    """The checkpoint quantized while it is loaded."""
    return load(directory, kind, quantization_config=nf4.NF4Config(**settings))


def load_as_bitsandbytes(directory: Path, kind: str = "llama", **kwargs: Any) -> Any:
    """The checkpoint loaded by nf4 in bitsandbytes' place."""
    take_bitsandbytes()
    try:
        model = load(directory, kind, **kwargs)
    finally:
        give_back_bitsandbytes()
    assert any(isinstance(m, (nf4.NF4Linear, NF4Experts)) for m in model.modules())
    assert not any(type(m).__module__.startswith("bitsandbytes") for m in model.modules())
    return model


@torch.no_grad()
def logits(model: Any, ids: Tensor) -> Tensor:
    return model(ids).logits


def assert_same_files(one: Path, other: Path) -> None:
    """Every file of two directories is equal byte for byte."""
    names = sorted(path.name for path in one.iterdir())
    assert names == sorted(path.name for path in other.iterdir())
    for name in names:
        assert (one / name).read_bytes() == (other / name).read_bytes(), name


def edit_tensors(directory: Path, change: Callable[[dict[str, Tensor]], None]) -> None:
    """Change the tensors of a checkpoint's one file."""
    file = directory / "model.safetensors"
    tensors = load_file(file)
    change(tensors)
    gc.collect()  # the old file may still be mapped
    save_file(tensors, file, metadata={"format": "pt"})
