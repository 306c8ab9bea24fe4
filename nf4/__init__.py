"""NF4 quantization kernels for QLoRA, in place of bitsandbytes."""

from nf4 import optim
from nf4.backends import available_backends, use_backend
from nf4.config import NF4Config
from nf4.functional import dequantize, linear, linear_lora, linear_lora_group, quantize
from nf4.integrations.register import register as _register
from nf4.lora import (
    LoraConfig,
    load_adapter,
    merge_and_unload,
    prepare_for_qlora,
    prepare_model,
    print_trainable_parameters,
    save_adapter,
)
from nf4.nn import Linear4bitLoRA, NF4Embedding, NF4Linear
from nf4.tensor import QuantizedTensor
from nf4.version import __version__

# The names people type; the classes are called otherwise because accelerate and PEFT take
# bitsandbytes' path for any class that is called Linear4bit.
Linear4bit = NF4Linear
Embedding4bit = NF4Embedding

_register()

__all__ = [
    "Embedding4bit",
    "Linear4bit",
    "Linear4bitLoRA",
    "LoraConfig",
    "NF4Config",
    "NF4Embedding",
    "NF4Linear",
    "QuantizedTensor",
    "__version__",
    "available_backends",
    "dequantize",
    "linear",
    "linear_lora",
    "linear_lora_group",
    "load_adapter",
    "merge_and_unload",
    "optim",
    "prepare_for_qlora",
    "prepare_model",
    "print_trainable_parameters",
    "quantize",
    "save_adapter",
    "use_backend",
]
