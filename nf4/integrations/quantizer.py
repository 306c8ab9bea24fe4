"""``NF4Quantizer``: NF4 weights in transformers' ``from_pretrained`` and ``save_pretrained``."""

from __future__ import annotations

import os
import weakref
from typing import Any

import torch
from torch import Tensor, nn
from transformers.quantizers.base import HfQuantizer

from nf4.config import NF4Config
from nf4.integrations import loading, placing, saving
from nf4.integrations.checkpoint import COMPANIONS, STATES, read_checkpoint
from nf4.integrations.hooks import importable
from nf4.integrations.settings import as_bitsandbytes_config, as_nf4_config
from nf4.nn import NF4Embedding, NF4Experts
from nf4.nn.linear import Linear4bitLoRA
from nf4.nn.weight import QuantizedWeight


class NF4Quantizer(HfQuantizer):
    """Quantizes while loading, and reads checkpoints that nf4 or bitsandbytes quantized.

    Serves ``quant_method`` "nf4" (``NF4Config``) and, where it takes bitsandbytes' place,
    "bitsandbytes" in 4 bits (``BitsAndBytesConfig``). Which weights of a checkpoint are quantized
    is read from the checkpoint, not from its configuration.
    """

    requires_calibration = False
    # The longer names first: old releases of transformers take the first that matches.
    serialized_names = {  # noqa: RUF012 overrides an attribute of the base class
        "weight": [f"weight.{name}" for name in (*STATES, *sorted(COMPANIONS)[::-1])] + ["weight"]
    }

    def __init__(self, quantization_config: Any, **kwargs: Any) -> None:
        super().__init__(quantization_config, **kwargs)
        self.settings = as_nf4_config(quantization_config)
        self._replaced_conversions: list[Any] = []
        self._dtype = torch.get_default_dtype()
        self._errors: list[str] = []
        self._model: weakref.ReferenceType[nn.Module] | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_model": None}

    def __deepcopy__(self, memo: dict[int, Any]) -> NF4Quantizer:
        copied = type(self)(self.quantization_config, pre_quantized=self.pre_quantized)
        copied._dtype = self._dtype
        return copied

    # What transformers asks before it builds the model.

    def validate_environment(self, *args: Any, **kwargs: Any) -> None:
        device_map = kwargs.get("device_map")
        if (
            not self.pre_quantized
            and isinstance(device_map, dict)
            and "disk" in device_map.values()
        ):
            raise ValueError(
                "nf4: device_map must not send modules to disk while quantizing on the fly; save "
                "the quantized model first, then load that with the same device_map"
            )

    def update_device_map(self, device_map: Any) -> Any:
        if device_map is not None:
            return device_map
        if torch.cuda.is_available():
            # Under torchrun each process has a device of its own, current or not.
            rank = os.environ.get("LOCAL_RANK")
            return {"": torch.cuda.current_device() if rank is None else int(rank)}
        return {"": "cpu"}

    def update_dtype(self, dtype: torch.dtype) -> torch.dtype:
        self._dtype = dtype or self._dtype
        return dtype

    def param_element_size(self, model: nn.Module, param_name: str, param: Tensor) -> float:
        # While quantizing, the model still shows the 16-bit weight that is read.
        will_shrink = not self.pre_quantized and self.param_needs_quantization(model, param_name)
        return 0.5 if will_shrink else param.element_size()

    def adjust_max_memory(self, max_memory: dict[Any, Any]) -> dict[Any, Any]:
        # Room for the layer that is being quantized.
        return {key: value * 0.9 for key, value in max_memory.items()}

    # Loading.

    def _process_model_before_weight_loading(
        self, model: Any, checkpoint_files: list[str] | None = None, **kwargs: Any
    ) -> None:
        self._model = weakref.ref(model)
        checkpoint = None
        if checkpoint_files:
            checkpoint = placing.in_model_names(read_checkpoint(checkpoint_files), model)
        if self.pre_quantized and checkpoint is not None:
            placing.place_stored(model, checkpoint, self.settings)
        else:
            skip, packed = self._skipped(model), self.pre_quantized
            placing.place_new(model, self.settings, skip, checkpoint, packed=packed)

    def _skipped(self, model: Any) -> list[str]:
        """Names and patterns, as transformers reads them, of what stays 16-bit."""
        kept = list(getattr(model, "_keep_in_fp32_modules", None) or ())
        config: Any = self.quantization_config
        if not isinstance(config, NF4Config):
            return self.get_modules_to_not_convert(model, config.llm_int8_skip_modules, kept)
        names = self.get_modules_to_not_convert(model, None, kept)
        return placing.allow_embeddings(model, self.settings, names)

    def param_needs_quantization(self, model: nn.Module, param_name: str, **kwargs: Any) -> bool:
        path, _, leaf = param_name.rpartition(".")
        try:
            module = model.get_submodule(path)
        except AttributeError:
            return False
        if isinstance(module, NF4Experts):
            return leaf in module._parameters
        return isinstance(module, QuantizedWeight) and leaf == "weight"

    def get_quantize_ops(self) -> Any:
        return loading.Quantize(self)

    def get_weight_conversions(self) -> list[Any]:
        if not self.pre_quantized:
            return []
        return [
            loading.Reader(list(names), parameter, operations=[loading.Deserialize(self)])
            for parameter, names in self.serialized_names.items()
        ]

    def update_weight_conversions(
        self, weight_conversions: list[Any], model: Any = None
    ) -> list[Any]:
        # Up to transformers 5.21 this is called without the model.
        if model is None and self._model is not None:
            model = self._model()
        if self.pre_quantized and any(isinstance(m, NF4Experts) for m in model.modules()):
            weight_conversions, self._replaced_conversions = saving.experts_conversions(
                self, weight_conversions
            )
        return weight_conversions + self.get_weight_conversions()

    def get_new_dtype(self, converter: Any, param: Any, dtype: Any) -> Any:
        for operation in getattr(converter, "operations", ()):
            if isinstance(operation, loading.Deserialize):
                # Codes and scales keep their dtype; the step casts an unquantized weight itself.
                operation.dtype = dtype
                return None
        return super().get_new_dtype(converter, param, dtype)

    def postpone(
        self, name: str, error: Exception, missing_keys: set[str] | None
    ) -> dict[str, Tensor]:
        """Keep an error of one weight until loading ends.

        The loader swallows exceptions of its steps and ends with "some issues during automatic
        conversion"; what is kept here becomes one error that names every weight.
        """
        text = error.args[0] if error.args else str(error)
        self._errors.append(f"{name}: {text}")
        if missing_keys is not None:
            missing_keys.discard(name)
        return {}

    def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        if self._errors:
            shown = "\n  ".join(self._errors[:8])
            more = f"\n  and {len(self._errors) - 8} more" if len(self._errors) > 8 else ""
            count = len(self._errors)
            raise ValueError(f"nf4: {count} weights could not be loaded:\n  {shown}{more}")
        # save_pretrained reverses the loading steps. Ours need none of it: the state dict that it
        # gets from get_state_dict_and_metadata is as it is stored.
        model._weight_conversions = [
            c for c in model._weight_conversions or () if not loading.is_ours(c)
        ] + self._replaced_conversions
        if not self.pre_quantized:
            model.config.quantization_config = self.stored_config(model)
        if not isinstance(self.quantization_config, NF4Config) and importable("bitsandbytes"):
            # Scripts written for bitsandbytes look at this. transformers imports bitsandbytes
            # wherever it is set (num_parameters, so every step of a Trainer).
            model.is_loaded_in_4bit = True
        return model

    # Saving.

    def stored_config(self, model: Any) -> Any:
        """The configuration that is saved: bitsandbytes' own where it can load the result."""
        if not isinstance(self.quantization_config, NF4Config):
            own = any(isinstance(m, NF4Experts) for m in model.modules())
            return self.settings if own else self.quantization_config
        modules = list(model.modules())
        if self.settings.format == "dynamic8" or any(
            isinstance(m, (NF4Experts, NF4Embedding)) for m in modules
        ):
            return self.quantization_config
        default = self.get_modules_to_not_convert(
            model, None, list(getattr(model, "_keep_in_fp32_modules", None) or ())
        )
        skip = saving.bitsandbytes_skip_list(model, default)
        return as_bitsandbytes_config(self.settings, self._dtype, skip)

    def is_serializable(self) -> bool:
        return True

    def get_state_dict_and_metadata(self, model: Any) -> tuple[dict[str, Tensor], dict[str, str]]:
        config = getattr(self.quantization_config, "stored", self.quantization_config)
        storage = getattr(config, "bnb_4bit_quant_storage", torch.uint8)
        return saving.stored_state_dict(model, storage), {}

    # What a model with these weights can do.

    @property
    def is_trainable(self) -> bool:
        return True

    @property
    def is_qat_trainable(self) -> bool:
        # Asked by the Trainer, which otherwise takes only PEFT's adapters.
        model = None if self._model is None else self._model()
        return model is not None and any(isinstance(m, Linear4bitLoRA) for m in model.modules())

    @property
    def is_compileable(self) -> bool:
        # The experts' forward depends on the routing: it breaks the graph.
        model = None if self._model is None else self._model()
        return model is None or not any(isinstance(m, NF4Experts) for m in model.modules())

    def _dequantize(self, model: Any, dtype: torch.dtype | str | None = None) -> Any:
        # save_pretrained leaves a name in the model's config, where transformers finds it
        named = isinstance(dtype, str)
        wanted: Any = getattr(torch, str(dtype).removeprefix("torch.")) if named else dtype
        saving.dequantize(model, wanted)
        model.__dict__.pop("is_loaded_in_4bit", None)
        return model
