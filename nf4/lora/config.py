"""``LoraConfig``: PEFT's names and file format, without PEFT."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

_ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
_MLP = ["gate_proj", "up_proj", "down_proj"]

# Fields of PEFT's configuration that do not change what a trained adapter computes: how it was
# made, and how the base stores its weights, which the layers know themselves. Any other field that
# is set is refused, also one that a later PEFT adds.
_NO_EFFECT = {
    "auto_mapping",
    "corda_config",
    "ensure_weight_tying",
    "eva_config",
    "exclude_modules",
    "fan_in_fan_out",
    "inference_mode",
    "layers_pattern",
    "layers_to_transform",
    "loftq_config",
    "lora_ga_config",
    "megatron_core",
    "peft_type",
    "peft_version",
    "qalora_group_size",
    "revision",
    "runtime_config",
}
# Initialisations that leave the base weight as it is; PiSSA and its like subtract from it.
_INITIALISATIONS = (True, False, None, "gaussian", "eva", "orthogonal", "mica")
_USE_PEFT = "use PEFT over an NF4 model instead"


@dataclass(frozen=True)
class LoraConfig:
    """LoRA settings (arXiv:2106.09685), with PEFT's names and meanings.

    ``target_modules``: "all-linear" or None (every quantized layer), a list of names (each a whole
    module name or its last components), or a regular expression for the whole name. ``bias``:
    "none", "all" or "lora_only", which biases train. ``use_rslora``: scale by ``alpha / sqrt(r)``
    (arXiv:2312.03732) instead of ``alpha / r``. Raises ValueError for values out of range.
    """

    r: int = 16
    lora_alpha: float = 32
    lora_dropout: float = 0.05
    target_modules: list[str] | str | None = None
    bias: str = "none"
    use_rslora: bool = False
    task_type: str | None = None
    base_model_name_or_path: str | None = None

    def __post_init__(self) -> None:
        for name, kinds in (
            ("r", int),
            ("lora_alpha", (int, float)),
            ("lora_dropout", (int, float)),
        ):
            value = getattr(self, name)
            if not isinstance(value, kinds) or isinstance(value, bool):
                raise ValueError(f"nf4.LoraConfig: {name} must be a number, got {value!r}")
        if self.r < 1:
            raise ValueError(f"nf4.LoraConfig: r must be at least 1, got {self.r}")
        if not 0.0 <= self.lora_dropout < 1.0:
            raise ValueError(
                f"nf4.LoraConfig: lora_dropout must be in [0, 1), got {self.lora_dropout}"
            )
        if self.bias not in ("none", "all", "lora_only"):
            raise ValueError(
                f"nf4.LoraConfig: bias must be none, all or lora_only, got {self.bias!r}"
            )

    @classmethod
    def for_model_size(cls, size: str) -> LoraConfig:
        """Common QLoRA practice: "small" (< 7B), "medium" (7-13B) or "large" (> 13B)."""
        presets = {
            "small": cls(r=8, lora_alpha=16, target_modules=list(_ATTENTION)),
            "medium": cls(r=16, lora_alpha=32, target_modules=list(_ATTENTION)),
            "large": cls(r=16, lora_alpha=32, target_modules=_ATTENTION + _MLP),
        }
        if size not in presets:
            raise ValueError(
                f"nf4.LoraConfig.for_model_size: size must be one of {', '.join(presets)}, "
                f"got {size!r}"
            )
        return presets[size]

    @classmethod
    def from_mapping(cls, config: Mapping[str, Any]) -> LoraConfig:
        """Read an ``adapter_config.json``; ValueError for a feature that these layers lack."""
        kind = str(config.get("peft_type", "LORA")).rpartition(".")[2]
        if kind != "LORA":
            raise ValueError(f"nf4.LoraConfig: peft_type must be LORA, got {kind}")
        known = {f.name for f in fields(cls)}
        for name, value in config.items():
            if name == "init_lora_weights":
                unsupported = value not in _INITIALISATIONS
            else:
                unsupported = bool(value) and name not in known | _NO_EFFECT
            if unsupported:
                raise ValueError(
                    f"nf4.LoraConfig: {name} is not supported by Linear4bitLoRA, got {value!r}; "
                    f"{_USE_PEFT}"
                )
        missing = [name for name in ("r", "lora_alpha") if name not in config]
        if missing:
            raise ValueError(f"nf4.LoraConfig: settings must name {' and '.join(missing)}")
        # Where a file does not say, PEFT's default holds.
        values = {"lora_dropout": 0.0, **{k: v for k, v in config.items() if k in known}}
        if isinstance(values.get("target_modules"), (set, tuple)):
            values["target_modules"] = sorted(values["target_modules"])
        return cls(**values)

    @classmethod
    def coerce(cls, config: Any) -> LoraConfig:
        """``config`` itself, or the equal of a ``peft.LoraConfig``.

        Raises ValueError for a choice that ``prepare_model`` does not have.
        """
        if isinstance(config, cls):
            return config
        if not hasattr(config, "peft_type"):
            raise TypeError(
                f"nf4.LoraConfig: lora must be an nf4 or peft LoraConfig, "
                f"got {type(config).__name__}"
            )
        settings = config.to_dict()
        # These do not matter to an adapter that is trained already, but here it is to be made.
        for name, default in (
            ("init_lora_weights", True),
            ("exclude_modules", None),
            ("layers_to_transform", None),
        ):
            if settings.get(name, default) != default:
                raise ValueError(
                    f"nf4.LoraConfig: {name} is not supported, got {settings[name]!r}; {_USE_PEFT}"
                )
        return cls.from_mapping(settings)

    def to_mapping(self, target_modules: list[str]) -> dict[str, Any]:
        """The contents of an ``adapter_config.json`` that PEFT reads."""
        return {
            "peft_type": "LORA",
            "task_type": self.task_type,
            "base_model_name_or_path": self.base_model_name_or_path,
            "r": self.r,
            "lora_alpha": self.lora_alpha,
            "lora_dropout": self.lora_dropout,
            "target_modules": target_modules,
            "bias": self.bias,
            "use_rslora": self.use_rslora,
            "use_dora": False,
            "fan_in_fan_out": False,
            "inference_mode": True,
            "init_lora_weights": True,
            "modules_to_save": None,
            "rank_pattern": {},
            "alpha_pattern": {},
        }

    def targets(self, name: str) -> bool:
        """Whether the module called ``name`` gets an adapter."""
        if self.target_modules is None or self.target_modules == "all-linear":
            return True
        if isinstance(self.target_modules, str):
            return re.fullmatch(self.target_modules, name) is not None
        return matches(name, self.target_modules)

    def layer_kwargs(self) -> dict[str, Any]:
        """The keyword arguments that ``Linear4bitLoRA`` takes."""
        return {
            "r": self.r,
            "lora_alpha": self.lora_alpha,
            "lora_dropout": self.lora_dropout,
            "use_rslora": self.use_rslora,
        }


def matches(name: str, patterns: list[str]) -> bool:
    """Whether ``name`` equals a pattern or ends with it at a dot."""
    return any(name == p or name.endswith(f".{p}") for p in patterns)
