"""A whole model: one QLoRA step and decoding, in nf4, in bitsandbytes with PEFT, in 16 bits.

The model has Llama-3-8B's configuration and random weights, so nothing is downloaded; the losses
mean nothing, the times and the memory do. ``--tiny`` is the same run on a small model, on any
machine.
"""

from __future__ import annotations

import argparse
import csv
import gc
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from benchmarks import peers, results

RANK, ALPHA = 16, 32
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
LLAMA_3_8B = {
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "vocab_size": 128256,
    "max_position_embeddings": 8192,
    "rope_theta": 500000.0,
}
TINY = LLAMA_3_8B | {
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 1024,
}
GIB = 1 << 30


def _base_model(config: dict[str, Any], device: torch.device) -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    with torch.device(device):
        model = LlamaForCausalLM(LlamaConfig(**config, dtype="bfloat16")).bfloat16()
    return model.eval()


def _nf4_model(config: dict[str, Any], device: torch.device) -> Any:
    import nf4

    model: Any = _base_model(config, device)
    lora = nf4.LoraConfig(r=RANK, lora_alpha=ALPHA, lora_dropout=0.0, target_modules=TARGETS)
    nf4.prepare_model(model, lora=lora, progress=False)
    return nf4.prepare_for_qlora(model)


def _bitsandbytes_model(config: dict[str, Any], device: torch.device) -> Any:
    import bitsandbytes as bnb

    model = _base_model(config, device)
    for name, module in list(model.named_modules()):
        if isinstance(module, nn.Linear) and name.rsplit(".", 1)[-1] in TARGETS:
            new = bnb.nn.Linear4bit(
                module.in_features,
                module.out_features,
                bias=False,
                compute_dtype=torch.bfloat16,
                quant_type="nf4",
                device="meta",
            )
            new.weight = bnb.nn.Params4bit(
                module.weight.data, requires_grad=False, quant_type="nf4", module=new
            )
            new._parameters["weight"] = new.weight._quantize(device)
            model.set_submodule(name, new)
    return _with_peft(model)


def _dense_model(config: dict[str, Any], device: torch.device) -> Any:
    return _with_peft(_base_model(config, device))


def _with_peft(model: Any) -> Any:
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(r=RANK, lora_alpha=ALPHA, lora_dropout=0.0, target_modules=TARGETS)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    model.config.use_cache = False
    return get_peft_model(model, config)


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def _median_seconds(call: Callable[[], object], device: torch.device, rounds: int) -> float:
    call()
    seconds = []
    for _ in range(rounds):
        _synchronize(device)
        start = time.perf_counter()
        call()
        _synchronize(device)
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds)


def _training_step(model: Any, tokens: int, device: torch.device) -> Callable[[], object]:
    model.train()
    ids = torch.randint(model.config.vocab_size, (1, tokens), device=device)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-4)

    def step() -> None:
        with torch.autocast(device.type, torch.bfloat16):
            loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def _decode(model: Any, batch: int, new_tokens: int, device: torch.device) -> Callable[[], object]:
    model.eval()
    ids = torch.randint(model.config.vocab_size, (batch, 16), device=device)
    options = {"max_new_tokens": new_tokens, "min_new_tokens": new_tokens, "do_sample": False}

    @torch.no_grad()
    def run() -> object:
        with torch.autocast(device.type, torch.bfloat16):
            mask = torch.ones_like(ids)
            return model.generate(ids, attention_mask=mask, use_cache=True, **options)

    return run


def _peak(device: torch.device) -> float:
    return torch.cuda.max_memory_allocated() / GIB if device.type == "cuda" else 0.0


def run(path: Path, tiny: bool) -> None:
    """Measure every contender that is installed and write one row each."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    config = TINY if tiny else LLAMA_3_8B
    tokens, new_tokens, rounds = (64, 4, 1) if tiny else (2048, 64, 3)
    makers: dict[str, Callable[[dict[str, Any], torch.device], Any]] = {"nf4": _nf4_model}
    if {"bitsandbytes", "peft"} <= set(peers.installed()):
        makers["peft_bitsandbytes"] = _bitsandbytes_model
    if "peft" in peers.installed():
        makers["peft_bf16"] = _dense_model
    env = results.environment(device, "", torch.get_num_threads())
    rows = []
    for name, make in makers.items():
        model = make(config, device)
        gc.collect()
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        row: dict[str, Any] = {"contender": name, "tokens": tokens}
        row["step_seconds"] = _median_seconds(_training_step(model, tokens, device), device, rounds)
        row["step_tokens_per_second"] = tokens / row["step_seconds"]
        row["step_peak_gib"] = _peak(device)
        model.gradient_checkpointing_disable()
        for batch in (1, 8):
            seconds = _median_seconds(_decode(model, batch, new_tokens, device), device, 1)
            row[f"decode_batch{batch}_tokens_per_second"] = batch * new_tokens / seconds
        print(", ".join(f"{k} {v:.4g}" if isinstance(v, float) else f"{v}" for k, v in row.items()))
        versions = {k: getattr(env, k) for k in ("date", "commit", "torch", "hardware", "driver")}
        rows.append(versions | row)
        del model
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--csv", type=Path, required=True)
    parser.add_argument("--tiny", action="store_true")
    arguments = parser.parse_args()
    run(arguments.csv, arguments.tiny)
