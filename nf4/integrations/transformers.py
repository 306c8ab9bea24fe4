"""Registers nf4 with transformers 5, for loading and saving; Trainer is next door in trainer.py.

``import nf4`` has ``install`` called once transformers' table of quantizers is imported. What nf4
relies on in transformers beyond its documented interface is listed in private_names.py.
"""

from __future__ import annotations

import functools
import warnings
from types import ModuleType
from typing import Any

from nf4.config import NF4Config
from nf4.integrations.hooks import importable, on_import

# 5.0 to 5.8 cannot reload quantized experts.
MINIMUM = (5, 0)
_BITSANDBYTES = "bitsandbytes_4bit"

_original_quantizer: Any = None


def install() -> None:
    """Make transformers know ``quant_method`` "nf4".

    Takes bitsandbytes' 4-bit method too where bitsandbytes is not importable. A release of
    transformers that is not supported refuses when the method is used, not when it is imported.
    """
    from transformers.quantizers import auto
    from transformers.utils.quantization_config import QuantizationConfigMixin

    NF4Config.__bases__ = (QuantizationConfigMixin,)
    auto.AUTO_QUANTIZATION_CONFIG_MAPPING["nf4"] = NF4Config
    _quantizers()["nf4"] = _quantizer
    if _unsupported() is not None:
        return
    if not importable("bitsandbytes"):
        take_bitsandbytes()
    try:
        _wrap_merge(auto)
        on_import("transformers.models.auto.configuration_auto", _wrap_auto_config)
    except AttributeError as error:
        warnings.warn(f"nf4: transformers {_version()} has moved a hook: {error}", stacklevel=2)


def take_bitsandbytes() -> None:
    """Serve ``BitsAndBytesConfig`` and bitsandbytes' 4-bit checkpoints with nf4."""
    global _original_quantizer
    if _quantizers()[_BITSANDBYTES] is not _quantizer:
        _original_quantizer = _quantizers()[_BITSANDBYTES]
        _quantizers()[_BITSANDBYTES] = _quantizer


def give_back_bitsandbytes() -> None:
    """Undo ``take_bitsandbytes``."""
    if _quantizers()[_BITSANDBYTES] is _quantizer:
        _quantizers()[_BITSANDBYTES] = _original_quantizer


def _quantizers() -> dict[str, Any]:
    """transformers' table of quantizers; it calls what it finds there with a configuration."""
    from transformers.quantizers import auto

    return auto.AUTO_QUANTIZER_MAPPING


def _version() -> str:
    import transformers

    return transformers.__version__


def _unsupported() -> str | None:
    version = _version()
    if tuple(int(part) for part in version.split(".")[:2]) >= MINIMUM:
        return None
    needed = ".".join(map(str, MINIMUM))
    return f"nf4: needs transformers {needed} or newer for from_pretrained, got {version}"


def _quantizer(config: Any, **kwargs: Any) -> Any:
    """Stands in transformers' table for ``NF4Quantizer``, which is imported when it is used."""
    reason = _unsupported()
    if reason is not None:
        raise ImportError(f"{reason}; nf4.prepare_model works with any version")
    from nf4.integrations.quantizer import NF4Quantizer

    return NF4Quantizer(config, **kwargs)


def _wrap_merge(auto: ModuleType) -> None:
    """Let an ``NF4Config`` load a bitsandbytes checkpoint, where transformers wants the same class.

    It is how to choose nf4 for one model while bitsandbytes is installed.
    """
    original = auto.AutoHfQuantizer.merge_quantization_configs.__func__

    @functools.wraps(original)
    def merge(cls: Any, quantization_config: Any, quantization_config_from_args: Any) -> Any:
        from nf4.integrations.settings import merge_configs

        merged = merge_configs(quantization_config, quantization_config_from_args)
        if merged is not None:
            return merged
        return original(cls, quantization_config, quantization_config_from_args)

    auto.AutoHfQuantizer.merge_quantization_configs = classmethod(merge)


def _wrap_auto_config(configuration_auto: ModuleType) -> None:
    """Take ``quantization_config=None`` as not given.

    AutoConfig would set it on the configuration it reads, so that the Auto classes load a
    quantized checkpoint as if it were not, and fail over its shapes.
    """
    original = configuration_auto.AutoConfig.from_pretrained.__func__

    @functools.wraps(original)
    def from_pretrained(cls: Any, *args: Any, **kwargs: Any) -> Any:
        if kwargs.get("quantization_config", kwargs) is None:
            del kwargs["quantization_config"]
        return original(cls, *args, **kwargs)

    configuration_auto.AutoConfig.from_pretrained = classmethod(from_pretrained)
