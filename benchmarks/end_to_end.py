"""A whole model: one QLoRA step and decoding, in nf4, in bitsandbytes with PEFT, in 16 bits.

``nf4_fused`` is nf4 with q/k/v and gate/up in one call each (``prepare_model(fuse=True)``).

The model has Llama-3-8B's configuration and random weights, so nothing is downloaded; the losses
mean nothing, the times and the memory do. ``--tiny`` is the same run on a small model, on any
machine.
"""

from __future__ import annotations

import argparse
import csv
import gc
import statistics
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from functools import partial
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
Maker = Callable[[dict[str, Any], torch.device], Any]
Row = dict[str, Any]


def _base_model(config: dict[str, Any], device: torch.device) -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    # Not .bfloat16() afterwards: that would round the rotary frequencies.
    default = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device(device):
            model = LlamaForCausalLM(LlamaConfig(**config, dtype="bfloat16"))
    finally:
        torch.set_default_dtype(default)
    return model.eval()


def _nf4_model(config: dict[str, Any], device: torch.device, fuse: bool = False) -> Any:
    import nf4

    model: Any = _base_model(config, device)
    lora = nf4.LoraConfig(r=RANK, lora_alpha=ALPHA, lora_dropout=0.0, target_modules=TARGETS)
    nf4.prepare_model(model, lora=lora, progress=False, fuse=fuse)
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
    model.is_loaded_in_4bit = True  # as from_pretrained leaves it: PEFT takes its 4-bit layer
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


def _gib(device: torch.device, *, peak: bool) -> float:
    if device.type != "cuda":
        return 0.0
    return (torch.cuda.max_memory_allocated() if peak else torch.cuda.memory_allocated()) / GIB


def _free(device: torch.device) -> None:
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def _measure(make: Maker, config: dict[str, Any], device: torch.device, tiny: bool) -> Row:
    """Seconds, rates and GiB of one contender; what it held is freed after the call."""
    tokens, new_tokens, rounds = (64, 4, 1) if tiny else (2048, 32, 3)
    _free(device)
    start = time.perf_counter()
    model = make(config, device)
    _synchronize(device)
    row: Row = {"build_seconds": time.perf_counter() - start}
    _free(device)
    row["weights_gib"] = _gib(device, peak=False)
    step = _training_step(model, tokens, device)
    row["step_tokens"] = tokens
    row["step_seconds"] = _median_seconds(step, device, rounds)
    row["step_tokens_per_second"] = tokens / row["step_seconds"]
    row["step_peak_gib"] = _gib(device, peak=True)
    del step
    _free(device)
    model.gradient_checkpointing_disable()
    for batch in (1, 8):
        seconds = _median_seconds(_decode(model, batch, new_tokens, device), device, rounds)
        row[f"decode_batch{batch}_tokens_per_second"] = batch * new_tokens / seconds
    row["decode_peak_gib"] = _gib(device, peak=True)
    return row


def _append(path: Path, row: Row) -> None:
    """Write a row at once: a run that is cut short keeps those that it has."""
    path.parent.mkdir(parents=True, exist_ok=True)
    new = not path.exists()
    with path.open("a", newline="") as file:
        writer = csv.DictWriter(file, list(row), lineterminator="\n")
        if new:
            writer.writeheader()
        writer.writerow({k: f"{v:.5g}" if isinstance(v, float) else v for k, v in row.items()})


def contenders() -> dict[str, Maker]:
    """The models that can be made of what is installed here."""
    here = set(peers.installed())
    makers: dict[str, Maker] = {"nf4": _nf4_model}
    if {"bitsandbytes", "peft"} <= here:
        makers["peft_bitsandbytes"] = _bitsandbytes_model
    makers["nf4_fused"] = partial(_nf4_model, fuse=True)
    if "peft" in here:
        makers["peft_bf16"] = _dense_model
    return makers


def run(path: Path, tiny: bool, only: Sequence[str] = ()) -> bool:
    """Measure every contender, or those named; whether none of them failed."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    makers = contenders()
    if unknown := set(only) - set(makers):
        raise SystemExit(f"end_to_end: --only must be one of {', '.join(makers)}, got {unknown}")
    env = results.environment(device, "", torch.get_num_threads())
    versions = {
        name: getattr(env, name)
        for name in ("date", "commit", "dirty", "torch", "triton", "bitsandbytes", "peft")
    }
    versions |= {"hardware": env.hardware, "driver": env.driver, "model": "tiny" if tiny else "8B"}
    good = True
    for name in only or makers:
        start = time.perf_counter()
        try:
            row = _measure(makers[name], TINY if tiny else LLAMA_3_8B, device, tiny)
        except Exception:  # the others are still worth their time
            traceback.print_exc()
            good = False
            continue
        shown = (f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}" for k, v in row.items())
        print(f"{name} in {time.perf_counter() - start:.0f} s: {', '.join(shown)}", flush=True)
        _append(path, {**versions, "contender": name, **row})
    return good


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--csv", type=Path, required=True)
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--only", action="append", help="this contender; may be repeated")
    arguments = parser.parse_args()
    sys.exit(not run(arguments.csv, arguments.tiny, arguments.only or ()))
