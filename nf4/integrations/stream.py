"""Quantize a checkpoint on disk tensor by tensor, without loading the model."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from nf4 import functional
from nf4.config import NF4Config
from nf4.lora.prepare import kept_16bit

SHARD_BYTES = 256 * 2**20
_INDEX = "model.safetensors.index.json"


def quantize_checkpoint(
    source: Path,
    target: Path,
    config: NF4Config,
    dtype: torch.dtype,
    *,
    on_tensor: Callable[[str], object] = lambda name: None,
) -> dict[str, int]:
    """Quantize the linear weights of the checkpoint ``source`` into the empty folder ``target``.

    Peak memory is one tensor and one output shard of at most ``SHARD_BYTES`` (or one tensor, if
    larger), whatever the model's size. ``target`` loads in transformers with nf4 or, for the 4-bit
    formats, with bitsandbytes. Other files (tokenizer, generation config) are copied. Returns the
    bytes read and written. Raises ValueError for NaN or infinite weights, naming the tensor.
    """
    files = _tensor_files(source)
    linear = _linear_weights(source, config)
    writer = _ShardWriter(target)
    read = 0
    for name, tensor in _tensors(files):
        read += tensor.nbytes
        if name in linear:
            for key, value in _quantized(name, tensor.to(dtype), config).items():
                writer.add(key, value)
        else:
            writer.add(name, tensor.to(dtype) if tensor.is_floating_point() else tensor)
        on_tensor(name)
    writer.finish()
    _copy_the_rest(source, target)
    settings = json.loads((source / "config.json").read_text())
    settings["quantization_config"] = _quantization_config(config, linear, dtype)
    settings["dtype"] = str(dtype).removeprefix("torch.")
    (target / "config.json").write_text(json.dumps(settings, indent=2) + "\n")
    return {"read": read, "written": writer.total}


def _quantized(name: str, weight: Tensor, config: NF4Config) -> dict[str, Tensor]:
    try:
        q = functional.quantize(weight, config.block_size, config.double_quant, config.format)
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from error
    return q.state_dict(name)


def _tensor_files(source: Path) -> dict[str, Path]:
    """File of every tensor of a checkpoint, in the order of the files."""
    index = source / _INDEX
    if index.exists():
        shards = sorted(set(json.loads(index.read_text())["weight_map"].values()))
    else:
        shards = sorted(p.name for p in source.glob("*.safetensors"))
    if not shards:
        raise FileNotFoundError(f"{source} holds no safetensors file")
    files: dict[str, Path] = {}
    for shard in shards:
        with safe_open(source / shard, framework="pt") as file:
            files.update(dict.fromkeys(file.keys(), source / shard))
    return files


def _tensors(files: dict[str, Path]) -> Iterator[tuple[str, Tensor]]:
    for path in dict.fromkeys(files.values()):
        with safe_open(path, framework="pt") as file:
            for name in (n for n, p in files.items() if p == path):
                yield name, file.get_tensor(name)


def _linear_weights(source: Path, config: NF4Config) -> set[str]:
    """Names of the weights to quantize: those of the model's ``nn.Linear`` layers."""
    from transformers import AutoConfig, AutoModelForCausalLM

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(source))
    keeps = kept_16bit(model, config)
    return {
        f"{name}.weight"
        for name, module in model.named_modules()
        if type(module) is nn.Linear and not keeps(name)
    }


def _quantization_config(config: NF4Config, linear: set[str], dtype: torch.dtype) -> dict[str, Any]:
    """bitsandbytes' own description, so that it loads the result; nf4's for 8-bit weights."""
    if config.format == "dynamic8":
        return {
            "quant_method": "nf4",
            "format": config.format,
            "block_size": config.block_size,
            "double_quant": config.double_quant,
            "modules_to_not_convert": config.modules_to_not_convert,
        }
    return {
        "quant_method": "bitsandbytes",
        "load_in_4bit": True,
        "load_in_8bit": False,
        "bnb_4bit_quant_type": config.format,
        "bnb_4bit_use_double_quant": config.double_quant,
        "bnb_4bit_compute_dtype": str(dtype).removeprefix("torch."),
        "bnb_4bit_quant_storage": "uint8",
        "llm_int8_skip_modules": config.modules_to_not_convert,
    }


def _copy_the_rest(source: Path, target: Path) -> None:
    for path in source.iterdir():
        weights = path.suffix in (".safetensors", ".bin", ".pt", ".h5", ".msgpack")
        if path.is_file() and not weights and path.name not in ("config.json", _INDEX):
            shutil.copy2(path, target / path.name)


class _ShardWriter:
    """Collects tensors into files of at most ``SHARD_BYTES``, with transformers' names."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.pending: dict[str, Tensor] = {}
        self.shards: list[list[str]] = []
        self.total = 0

    def add(self, name: str, tensor: Tensor) -> None:
        size = sum(t.nbytes for t in self.pending.values())
        if self.pending and size + tensor.nbytes > SHARD_BYTES:
            self._flush()
        self.pending[name] = tensor.contiguous()
        self.total += tensor.nbytes

    def _path(self, number: int) -> Path:
        return self.folder / f".shard-{number}"

    def _flush(self) -> None:
        save_file(self.pending, self._path(len(self.shards)), metadata={"format": "pt"})
        self.shards.append(list(self.pending))
        self.pending = {}

    def finish(self) -> None:
        """Write what is pending and give the files their names."""
        if self.pending or not self.shards:
            self._flush()
        count = len(self.shards)
        if count == 1:
            self._path(0).rename(self.folder / "model.safetensors")
            return
        weight_map = {}
        for number, names in enumerate(self.shards):
            final = f"model-{number + 1:05}-of-{count:05}.safetensors"
            self._path(number).rename(self.folder / final)
            weight_map.update(dict.fromkeys(names, final))
        index = {"metadata": {"total_size": self.total}, "weight_map": weight_map}
        (self.folder / _INDEX).write_text(json.dumps(index, indent=2) + "\n")
