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
from torch import Tensor

from nf4 import functional
from nf4.config import NF4Config
from nf4.integrations.loading import quantize_for
from nf4.integrations.placing import to_model_names
from nf4.integrations.quantizer import NF4Quantizer
from nf4.integrations.saving import expert_keys
from nf4.nn import NF4Experts
from nf4.nn.experts import MATRICES
from nf4.nn.weight import QuantizedWeight

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
    """Quantize the checkpoint ``source`` into the empty folder ``target``.

    What is quantized, and how, is what ``from_pretrained(source, quantization_config=config)``
    would do. Peak memory is one tensor and one output shard of at most ``SHARD_BYTES`` (or one
    tensor, if larger), whatever the model's size. ``target`` loads in transformers with nf4 and,
    where it has 4-bit linear layers only, with bitsandbytes. Other files (tokenizer, generation
    config) are copied. Returns the bytes read and written. Raises ValueError for NaN or infinite
    weights, naming the tensor.
    """
    files = _tensor_files(source)
    model, stored = _planned(source, files, config, dtype)
    rename = to_model_names(model)
    writer = _ShardWriter(target)
    read = 0
    for key, tensor in _tensors(files):
        read += tensor.nbytes
        tensor = tensor.to(dtype) if tensor.is_floating_point() else tensor
        try:
            parts = _parts(model, rename(key), key, tensor, config)
        except ValueError as error:
            raise ValueError(f"{key}: {error}") from error
        for name, value in parts.items():
            writer.add(name, value)
        on_tensor(key)
    writer.finish()
    _copy_the_rest(source, target)
    settings = json.loads((source / "config.json").read_text())
    settings["quantization_config"] = stored
    settings["dtype"] = str(dtype).removeprefix("torch.")
    (target / "config.json").write_text(json.dumps(settings, indent=2) + "\n")
    return {"read": read, "written": writer.total}


def _planned(
    source: Path, files: dict[str, Path], config: NF4Config, dtype: torch.dtype
) -> tuple[Any, dict[str, Any]]:
    """The model on "meta" with quantized modules in place, and its configuration to save."""
    import transformers

    model_config = transformers.AutoConfig.from_pretrained(source)
    (name, *_) = model_config.architectures or [""]
    kind: Any = getattr(transformers, name, None)
    with torch.device("meta"):
        if kind is not None:
            model = kind._from_config(model_config, dtype=dtype)
        else:
            model = transformers.AutoModelForCausalLM.from_config(model_config, dtype=dtype)
    quantizer = NF4Quantizer(config, pre_quantized=False)
    quantizer.update_dtype(dtype)
    weights = [str(file) for file in dict.fromkeys(files.values())]
    quantizer._process_model_before_weight_loading(model, checkpoint_files=weights)
    return model, quantizer.stored_config(model).to_dict()


def _parts(model: Any, name: str, key: str, tensor: Tensor, config: NF4Config) -> dict[str, Tensor]:
    """What the checkpoint holds for the tensor ``key``, which is ``name`` in the model."""
    path, _, leaf = name.rpartition(".")
    try:
        module = model.get_submodule(path)
    except AttributeError:  # a tensor that the model has no use for
        module = None
    if isinstance(module, QuantizedWeight) and leaf == "weight":
        if name in model.all_tied_weights_keys:  # stored once, as the table of the embeddings
            return {}
        return quantize_for(module, tensor).state_dict(key)
    if not isinstance(module, NF4Experts) or leaf not in MATRICES:
        return {key: tensor}
    if tensor.dim() == 2:  # one matrix of one expert
        q = functional.quantize(tensor, config.block_size, config.double_quant, config.format)
        return q.state_dict(key)
    keys = expert_keys(model, path)[leaf]
    parts: dict[str, Tensor] = {}
    for expert, fused in enumerate(tensor):
        for one, matrix in zip(keys, fused.chunk(len(keys)), strict=True):
            q = functional.quantize(matrix, config.block_size, config.double_quant, config.format)
            parts.update(q.state_dict(one.format(expert)))
    return parts


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
