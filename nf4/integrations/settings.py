"""Between ``NF4Config`` and transformers' ``BitsAndBytesConfig``."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from transformers.utils.quantization_config import BitsAndBytesConfig

from nf4.config import NF4Config


def as_nf4_config(config: NF4Config | BitsAndBytesConfig) -> NF4Config:
    """The settings of either class; ValueError for what is not 4-bit."""
    if isinstance(config, NF4Config):
        return config
    if not config.load_in_4bit:
        raise ValueError("nf4: BitsAndBytesConfig must have load_in_4bit=True, got 8-bit settings")
    return NF4Config(
        double_quant=config.bnb_4bit_use_double_quant,
        compute_dtype=config.bnb_4bit_compute_dtype,
        modules_to_not_convert=config.llm_int8_skip_modules,
        format=config.bnb_4bit_quant_type,
    )


def as_bitsandbytes_config(
    config: NF4Config, dtype: torch.dtype, skip: list[str] | None
) -> BitsAndBytesConfig:
    """The equal of ``config`` for a model of ``dtype`` in which ``skip`` stays 16-bit.

    bitsandbytes takes the block size from each stored weight. Its compute dtype is fixed by the
    configuration, so a ``compute_dtype`` of None becomes the model's.
    """
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=config.format,
        bnb_4bit_use_double_quant=config.double_quant,
        bnb_4bit_compute_dtype=config.compute_dtype or dtype,
        llm_int8_skip_modules=skip,
    )


@dataclass
class ConfigOfBitsAndBytes(NF4Config):
    """An ``NF4Config`` over a checkpoint of bitsandbytes; saved as its own config, ``stored``."""

    stored: BitsAndBytesConfig | None = None

    def to_dict(self) -> dict[str, Any]:
        assert self.stored is not None
        return self.stored.to_dict()


def merge_configs(stored: Any, given: Any) -> NF4Config | None:
    """What an ``NF4Config`` given for a checkpoint that is 4-bit already means.

    The checkpoint decides everything but the compute dtype. None where this is not the case.
    """
    if not isinstance(given, NF4Config):
        return None
    if isinstance(stored, dict) and stored.get("load_in_4bit"):
        stored = BitsAndBytesConfig.from_dict(stored)
    elif isinstance(stored, dict) and stored.get("quant_method") == NF4Config.quant_method:
        stored = NF4Config.from_dict(stored)
    if isinstance(stored, NF4Config):
        return replace(stored, compute_dtype=given.compute_dtype or stored.compute_dtype)
    if not isinstance(stored, BitsAndBytesConfig) or not stored.load_in_4bit:
        return None
    return ConfigOfBitsAndBytes(
        double_quant=stored.bnb_4bit_use_double_quant,
        compute_dtype=given.compute_dtype,
        modules_to_not_convert=stored.llm_int8_skip_modules,
        format=stored.bnb_4bit_quant_type,
        stored=stored,
    )
