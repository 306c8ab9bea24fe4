"""Tiny models made from configs, shared by the tests of modules and adapters."""

from __future__ import annotations

import torch
from torch import nn


def tiny_llama(**changes: object) -> nn.Module:
    """A two-layer Llama with random weights, in eval mode."""
    from transformers import LlamaConfig, LlamaForCausalLM

    settings = {
        "hidden_size": 64,
        "intermediate_size": 100,  # K of down_proj: not a multiple of the block size
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": 97,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    return LlamaForCausalLM(LlamaConfig(**{**settings, **changes})).eval()


def token_ids(batch: int = 2, length: int = 9, vocab_size: int = 97) -> torch.Tensor:
    return torch.randint(3, vocab_size, (batch, length))


def randomize_adapters(model: nn.Module, scale: float = 0.05) -> None:
    """Give every lora_B random values, so that the adapters do something."""
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=scale)
