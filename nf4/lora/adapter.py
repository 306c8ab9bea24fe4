"""Adapter files in PEFT's own format: ``adapter_model.safetensors`` and ``adapter_config.json``."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from nf4.lora.config import LoraConfig
from nf4.lora.prepare import adapter_layers, train_biases
from nf4.nn.linear import Linear4bitLoRA, NF4Linear

WEIGHTS_NAME = "adapter_model.safetensors"
CONFIG_NAME = "adapter_config.json"
_PREFIX = "base_model.model."
# Where PEFT keeps a layer that it wraps: the bias of an adapted layer is named through it.
_BASE_LAYER = ".base_layer"


def write_atomically(writers: Mapping[Path, Callable[[str], object]]) -> None:
    """Call each writer with a temporary name beside its path, then rename all of them.

    On any error the temporary files are removed and every path stays as it was. Raises OSError,
    naming the path, for a file that cannot be written.
    """
    temporaries: dict[Path, str] = {}
    path = Path()
    try:
        for path, write in writers.items():
            path.parent.mkdir(parents=True, exist_ok=True)
            handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
            os.close(handle)
            temporaries[path] = temporary
            write(temporary)
            make_readable(Path(temporary))
            with open(temporary, "rb") as written:
                os.fsync(written.fileno())
        for path, temporary in temporaries.items():
            os.replace(temporary, path)
    except BaseException as error:
        for temporary in temporaries.values():
            Path(temporary).unlink(missing_ok=True)
        if isinstance(error, (OSError, SafetensorError)):
            raise OSError(f"nf4: {path} must be writable, nothing changed: {error}") from error
        raise


def make_readable(path: Path) -> None:
    """Give a file what the umask allows: mkstemp, and safetensors from 0.8, make private files."""
    umask = os.umask(0)
    os.umask(umask)
    path.chmod(0o666 & ~umask)


def save_adapter(model: nn.Module, directory: str | os.PathLike[str]) -> None:
    """Write the adapters of ``model`` so that PEFT, or ``load_adapter``, reads them.

    Files are written under temporary names and renamed: after an error (a full disk) the old ones
    are still there. Raises ValueError when the model has no adapter.
    """
    layers = list(adapter_layers(model))
    if not layers:
        raise ValueError("nf4.save_adapter: model must have Linear4bitLoRA layers, got none")
    config = _common_config(layers, model)
    tensors: dict[str, Tensor] = {}
    for name, layer in layers:
        tensors[f"{_PREFIX}{name}.lora_A.weight"] = layer.lora_A.detach()
        tensors[f"{_PREFIX}{name}.lora_B.weight"] = layer.lora_B.detach()
    if config.bias != "none":
        adapted = {name for name, _ in layers}
        for name, parameter in model.named_parameters():
            module, _, leaf = name.rpartition(".")
            if parameter.requires_grad and leaf == "bias":
                inner = _BASE_LAYER if module in adapted else ""
                tensors[f"{_PREFIX}{module}{inner}.bias"] = parameter.detach()
    tensors = {key: value.contiguous().cpu() for key, value in tensors.items()}
    text = json.dumps(config.to_mapping([name for name, _ in layers]), indent=2) + "\n"
    directory = Path(directory)
    write_atomically(
        {
            directory / WEIGHTS_NAME: lambda path: save_file(tensors, path, {"format": "pt"}),
            directory / CONFIG_NAME: lambda path: Path(path).write_text(text, encoding="utf-8"),
        }
    )


def _common_config(layers: list[tuple[str, Linear4bitLoRA]], model: nn.Module) -> LoraConfig:
    """The one configuration that all adapters share; ValueError if they differ."""
    first_name, first = layers[0]
    for name, layer in layers:
        for field in ("r", "lora_alpha", "lora_dropout", "use_rslora"):
            if getattr(layer, field) != getattr(first, field):
                raise ValueError(
                    f"nf4.save_adapter: all adapters must share {field}, got "
                    f"{getattr(first, field)} ({first_name}) and {getattr(layer, field)} ({name})"
                )
    trained = [n for n, p in model.named_parameters() if n.endswith("bias") and p.requires_grad]
    on_adapters = {f"{name}.bias" for name, _ in layers}
    bias = "none" if not trained else "lora_only" if set(trained) <= on_adapters else "all"
    base = getattr(getattr(model, "config", None), "_name_or_path", None)
    is_causal = "ForCausalLM" in type(model).__name__
    return LoraConfig(
        r=first.r,
        lora_alpha=first.lora_alpha,
        lora_dropout=first.lora_dropout,
        use_rslora=first.use_rslora,
        bias=bias,
        task_type="CAUSAL_LM" if is_causal else None,
        base_model_name_or_path=base or None,
    )


def load_adapter(model: nn.Module, directory: str | os.PathLike[str]) -> nn.Module:
    """Load an adapter that ``save_adapter`` or PEFT wrote into a quantized model, in place.

    Layers named by the file become ``Linear4bitLoRA`` over their present bytes; layers that have
    an adapter already get the file's. As after ``prepare_model``, only adapters, and the biases
    that the file's settings name, train. Everything is checked before anything changes. Raises
    FileNotFoundError for a missing file, ValueError for a truncated one, for a key that fits no
    quantized layer, for an adapter of the model that the file lacks, for shapes that do not fit and
    for NaN or infinite values. Returns ``model``.
    """
    directory = Path(directory)
    config = _read_config(directory / CONFIG_NAME)
    adapters, biases = _sort(_read_tensors(directory / WEIGHTS_NAME))
    if not adapters:
        raise ValueError(f"nf4.load_adapter: {directory / WEIGHTS_NAME} must hold adapters")
    modules = dict(model.named_modules())
    for name, parts in adapters.items():
        _check_adapter(name, modules.get(name), parts, config)
    others = [name for name, _ in adapter_layers(model) if name not in adapters]
    if others:
        raise ValueError(
            f"nf4.load_adapter: {directory / WEIGHTS_NAME} must hold every adapter of the model, "
            f"{len(others)} missing, first {others[0]}"
        )
    parameters = dict(model.named_parameters())
    for name, value in biases.items():
        if name not in parameters or parameters[name].shape != value.shape:
            raise ValueError(f"nf4.load_adapter: {name} must fit a bias of the model")
    model.requires_grad_(False)
    for name, parts in adapters.items():
        _install(model, name, modules[name], parts, config)
    train_biases(model, config)
    parameters = dict(model.named_parameters())
    with torch.no_grad():
        for name, value in biases.items():
            parameters[name].copy_(value)
    return model


def _sort(tensors: dict[str, Tensor]) -> tuple[dict[str, dict[str, Tensor]], dict[str, Tensor]]:
    """The file's tensors as adapters, ``{module: {"lora_A": ..., "lora_B": ...}}``, and biases."""
    adapters: dict[str, dict[str, Tensor]] = {}
    biases: dict[str, Tensor] = {}
    for key, value in tensors.items():
        name = key.removeprefix(_PREFIX)
        module, _, leaf = name.removesuffix(".weight").rpartition(".")
        if leaf in ("lora_A", "lora_B"):
            adapters.setdefault(module, {})[leaf] = value
        elif leaf == "bias":
            biases[f"{module.removesuffix(_BASE_LAYER)}.bias"] = value
        else:
            raise ValueError(f"nf4.load_adapter: keys must be LoRA weights or biases, got {key!r}")
        if not (value.is_floating_point() and value.isfinite().all()):
            raise ValueError(f"nf4.load_adapter: {key} must hold finite floating-point numbers")
    return adapters, biases


def _read_config(path: Path) -> LoraConfig:
    try:
        settings = json.loads(path.read_bytes())
    except ValueError as error:
        raise ValueError(f"nf4.load_adapter: {path} must hold JSON: {error}") from error
    if not isinstance(settings, dict):
        raise ValueError(f"nf4.load_adapter: {path} must hold settings, got {settings!r}")
    return LoraConfig.from_mapping(settings)


def _read_tensors(path: Path) -> dict[str, Tensor]:
    if not path.exists():
        raise FileNotFoundError(f"nf4.load_adapter: no such file: {path}")
    try:
        with safe_open(path, framework="pt") as file:
            return {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 not a dict
    except SafetensorError as error:
        raise ValueError(f"nf4.load_adapter: {path} is truncated or damaged: {error}") from error


def _check_adapter(
    name: str, module: nn.Module | None, parts: dict[str, Tensor], config: LoraConfig
) -> None:
    if not isinstance(module, NF4Linear):
        kind = "no such module" if module is None else type(module).__name__
        raise ValueError(
            f"nf4.load_adapter: {name} must be a quantized layer (prepare_model makes them), "
            f"got {kind}"
        )
    expected = {
        "lora_A": (config.r, module.in_features),
        "lora_B": (module.out_features, config.r),
    }
    for leaf, shape in expected.items():
        if leaf not in parts:
            raise ValueError(f"nf4.load_adapter: missing key {_PREFIX}{name}.{leaf}.weight")
        if tuple(parts[leaf].shape) != shape:
            raise ValueError(
                f"nf4.load_adapter: {name}.{leaf} must have shape {list(shape)}, "
                f"got {list(parts[leaf].shape)}"
            )


def _install(
    model: nn.Module, name: str, module: nn.Module, parts: dict[str, Tensor], config: LoraConfig
) -> None:
    assert isinstance(module, NF4Linear)
    settings = config.layer_kwargs()
    if isinstance(module, Linear4bitLoRA):  # stays in place: others may hold it, as fused ones do
        layer = module
        layer.unmerge()
        for field, value in settings.items():
            setattr(layer, field, value)
    else:
        layer = Linear4bitLoRA.from_layer(module, **settings)
        model.set_submodule(name, layer)
    device = module.weight.device
    layer.lora_A = nn.Parameter(parts["lora_A"].to(device))
    layer.lora_B = nn.Parameter(parts["lora_B"].to(device))
