"""Tiny transformers models from configs, for the tests of the integrations."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

import nf4

SIZES: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 128,
    "max_position_embeddings": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}


def llama(dtype: torch.dtype = torch.bfloat16, **kwargs: Any) -> Any:
    """A 2-layer, 64-wide LlamaForCausalLM (14 linear layers) with random weights."""
    from transformers import AutoModelForCausalLM, LlamaConfig

    # Not .to(dtype): that would round the rotary frequencies, which stay float32 otherwise.
    config = LlamaConfig(**{**SIZES, **kwargs})
    return AutoModelForCausalLM.from_config(config, dtype=dtype)


def opt(dtype: torch.dtype = torch.bfloat16) -> Any:
    """A 2-layer, 64-wide OPTForCausalLM (12 linear layers, all with biases)."""
    from transformers import AutoModelForCausalLM, OPTConfig

    config = OPTConfig(
        hidden_size=64,
        ffn_dim=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        vocab_size=128,
        max_position_embeddings=64,
        word_embed_proj_dim=64,
    )
    return AutoModelForCausalLM.from_config(config, dtype=dtype)


def quantized_llama(dtype: torch.dtype = torch.bfloat16, **kwargs: Any) -> Any:
    """``llama`` with its 14 linear layers as NF4Linear; the head stays 16-bit."""
    return nf4.prepare_model(llama(dtype, **kwargs), progress=False).eval()


def randomize_adapters(model: torch.nn.Module, scale: float = 0.05) -> None:
    """Give every lora_B random values, so that the adapters do something."""
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=scale)


def token_ids(rows: int = 2, length: int = 12, vocab: int = 128) -> Tensor:
    """Random token ids ``[rows, length]``, without the special ones."""
    return torch.randint(3, vocab, (rows, length))
