"""A tiny Llama checkpoint with its tokenizer, and data to train it on, in a folder."""

from __future__ import annotations

import json
from pathlib import Path


def write_checkpoint(folder: Path, name: str) -> None:
    """``<name>/`` (model and tokenizer), ``text.txt`` and ``pairs.jsonl`` in ``folder``."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from nf4.cli.demo_corpus import train_tokenizer

    text = " ".join(f"the quick brown fox number {i} jumps over lazy dogs." for i in range(300))
    tokenizer = train_tokenizer(text, 400)
    config = LlamaConfig(
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=len(tokenizer),
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=None,
        initializer_range=0.1,  # a head of 0.02 hides most of what 20 steps teach the layers
    )
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(folder / name)
    tokenizer.save_pretrained(folder / name)
    (folder / "text.txt").write_text(text[:2000])
    rows = [{"instruction": f"say {i}", "output": f"fox {i}"} for i in range(16)]
    (folder / "pairs.jsonl").write_text("\n".join(map(json.dumps, rows)))
