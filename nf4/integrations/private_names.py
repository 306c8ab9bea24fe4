"""Everything that nf4 uses of transformers, PEFT and accelerate beyond their documented interfaces.

Each entry is a module and an attribute path in it. A release may move any of them without notice:
``tests/test_private_names.py`` looks each one up in the installed releases and names the release
that moved one.
"""

from __future__ import annotations

import importlib
import importlib.metadata
from typing import Any

Name = tuple[str, str]

# The releases that the tests have been run with, oldest and newest.
TESTED = {
    "transformers": "5.0 to 5.24",
    "peft": "0.17 to 0.21",
    "accelerate": "1.15",
}

TRANSFORMERS: tuple[Name, ...] = (
    # Replaced or added to.
    ("transformers.quantizers.auto", "AUTO_QUANTIZER_MAPPING"),
    ("transformers.quantizers.auto", "AUTO_QUANTIZATION_CONFIG_MAPPING"),
    ("transformers.quantizers.auto", "AutoHfQuantizer.merge_quantization_configs"),
    ("transformers.models.auto.configuration_auto", "AutoConfig.from_pretrained"),
    ("transformers.trainer", "Trainer.get_optimizer_cls_and_kwargs"),
    ("transformers.trainer", "Trainer.train"),
    # Overridden.
    ("transformers.quantizers.base", "HfQuantizer.param_element_size"),
    ("transformers.quantizers.base", "HfQuantizer.param_needs_quantization"),
    ("transformers.quantizers.base", "HfQuantizer.get_modules_to_not_convert"),
    ("transformers.quantizers.base", "HfQuantizer.get_weight_conversions"),
    ("transformers.quantizers.base", "HfQuantizer.get_quantize_ops"),
    ("transformers.quantizers.base", "HfQuantizer.get_state_dict_and_metadata"),
    ("transformers.quantizers.base", "HfQuantizer._process_model_before_weight_loading"),
    ("transformers.quantizers.base", "HfQuantizer._process_model_after_weight_loading"),
    ("transformers.quantizers.base", "HfQuantizer._dequantize"),
    ("transformers.core_model_loading", "ConversionOps"),
    ("transformers.core_model_loading", "WeightConverter"),
    # Called.
    ("transformers.core_model_loading", "WeightRenaming"),
    ("transformers.core_model_loading", "rename_source_key"),
    ("transformers.conversion_mapping", "get_model_conversion_mapping"),
    ("transformers.integrations.accelerate", "load_offloaded_parameter"),
    ("transformers.modeling_utils", "PreTrainedModel.get_expanded_tied_weights_keys"),
    ("transformers.utils.quantization_config", "QuantizationConfigMixin"),
    ("transformers.utils.quantization_config", "BitsAndBytesConfig"),
    ("transformers.pytorch_utils", "Conv1D"),
)
# Absent from the first releases of transformers 5, where only what needs them is refused.
TRANSFORMERS_LATER: tuple[Name, ...] = (
    ("transformers.quantizers.base", "HfQuantizer.update_weight_conversions"),
    ("transformers.quantizers.base", "HfQuantizer.get_new_dtype"),
)

# Wrapped by nf4.integrations.peft, in the order of its wrappers.
PEFT_HOOKS: tuple[Name, ...] = (
    ("peft.tuners.lora.model", "LoraModel._create_new_module"),
    ("peft.tuners.lora.model", "LoraModel._unload_and_optionally_merge"),
    ("peft.tuners.lora.model", "LoraModel.merge_adapter"),
    ("peft.tuners.tuners_utils", "_maybe_include_all_linear_layers"),
    ("peft.peft_model", "PeftModel.get_nb_trainable_parameters"),
    ("peft.utils.other", "prepare_model_for_kbit_training"),
)
_OF_METHODS = ("_create_new_module", "_unload_and_optionally_merge")
# PEFT's other methods that peft_methods.py serves: package, model, layer, and what is wrapped of
# the model.
PEFT_METHODS: tuple[tuple[str, str, str, tuple[str, ...]], ...] = (
    ("adalora", "AdaLoraModel", "SVDLinear", _OF_METHODS),
    ("ia3", "IA3Model", "Linear", _OF_METHODS),
    ("oft", "OFTModel", "Linear", _OF_METHODS),
    ("randlora", "RandLoraModel", "Linear", (*_OF_METHODS, "_find_dim")),
    ("road", "RoadModel", "Linear", _OF_METHODS),
    ("vera", "VeraModel", "Linear", (*_OF_METHODS, "_find_dim")),
)
PEFT: tuple[Name, ...] = (
    *PEFT_HOOKS,
    *((f"peft.tuners.{package}.layer", layer) for package, _, layer, _ in PEFT_METHODS),
    *(
        (f"peft.tuners.{package}.model", f"{model}.{name}")
        for package, model, _, names in PEFT_METHODS
        for name in names
    ),
    ("peft.tuners.vera.model", "VeraModel._prepare_adapter_config"),
    ("peft.tuners.vera.model", "VeraModel._check_target_module_exists"),
    ("peft.tuners.vera.model", "VeraModel.get_model_config"),
    ("peft.tuners.lora.config", "LoraConfig._register_custom_module"),  # and its _custom_modules
    ("peft.tuners.lora.layer", "Linear.resolve_lora_variant"),
    ("peft.tuners.lora.layer", "Linear.get_delta_weight"),
    ("peft.tuners.lora.layer", "LoraLayer.pissa_init"),
    ("peft.tuners.lora.layer", "LoraLayer.olora_init"),
    ("peft.tuners.lora.layer", "LoraLayer.corda_init"),
    ("peft.tuners.lora.layer", "LoraLayer.orthogonal_init"),
    ("peft.tuners.lora.layer", "LoraLayer.loftq_init"),
    ("peft.tuners.lora.layer", "ParamWrapper.get_param"),
    ("peft.tuners.lora.layer", "ParamWrapper._activate_lora"),
    ("peft.tuners.lora.layer", "ParamWrapper.unload_and_optionally_merge_module"),
    ("peft.tuners.tuners_utils", "check_adapters_to_merge"),
)
ACCELERATE: tuple[Name, ...] = (
    ("accelerate.hooks", "add_hook_to_module"),
    ("accelerate.hooks", "remove_hook_from_module"),
)


def resolve(name: Name) -> tuple[Any, str]:
    """The object that holds the last part of ``name``'s path, and that part.

    Raises ImportError, with the installed release and those that have it, where it has moved.
    """
    module, path = name
    package = module.partition(".")[0]
    *parents, last = path.split(".")
    try:
        owner: Any = importlib.import_module(module)
        for part in parents:
            owner = getattr(owner, part)
        getattr(owner, last)
    except (AttributeError, ModuleNotFoundError) as error:
        if isinstance(error, ModuleNotFoundError) and not module.startswith(error.name or module):
            raise  # something that the module itself needs
        raise ImportError(
            f"nf4.integrations: {module} must have {path} ({package} {TESTED[package]} do), "
            f"got {package} {importlib.metadata.version(package)}"
        ) from error
    return owner, last
