"""LoRA adapters over quantized models: configure, prepare, save, load, merge."""

from nf4.lora.adapter import load_adapter, save_adapter
from nf4.lora.config import LoraConfig
from nf4.lora.merge import merge_and_unload
from nf4.lora.prepare import prepare_for_qlora, prepare_model, print_trainable_parameters

__all__ = [
    "LoraConfig",
    "load_adapter",
    "merge_and_unload",
    "prepare_for_qlora",
    "prepare_model",
    "print_trainable_parameters",
    "save_adapter",
]
