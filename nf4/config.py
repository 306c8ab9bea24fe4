"""``NF4Config``: how the weights of a model are quantized."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, ClassVar

import torch

from nf4.formats import BLOCK_SIZES, WEIGHT_FORMATS


class _Config:
    """The base of ``NF4Config`` while transformers is not imported.

    Once it is, ``nf4.integrations`` puts transformers' ``QuantizationConfigMixin`` in this place:
    one class then serves both, whichever package was imported first.
    """


@dataclass
class NF4Config(_Config):
    """Quantization settings of a model; the defaults are QLoRA's (arXiv:2305.14314, section 3).

    ``compute_dtype`` None computes in the dtype of each layer's input. ``modules_to_not_convert``
    lists modules that stay 16-bit: a module's whole name, its last components or its first ones.
    The output head and the token embeddings stay 16-bit too, unless ``lm_head`` and ``embeddings``
    are set; a head that is tied to the embeddings shares their table, quantized or not. Raises
    ValueError for values that do not exist.

    Also the ``quantization_config`` of transformers' ``from_pretrained``. Such a model is saved
    with bitsandbytes' own configuration where bitsandbytes can load the result; 8-bit weights,
    embeddings and experts are saved with ``quant_method`` "nf4", for which nf4 must be imported
    before the checkpoint is loaded.
    """

    block_size: int = 64
    double_quant: bool = True
    compute_dtype: torch.dtype | None = None
    modules_to_not_convert: list[str] | None = None
    format: str = "nf4"
    embeddings: bool = False
    lm_head: bool = False

    quant_method: ClassVar[str] = "nf4"

    def __post_init__(self) -> None:
        if self.block_size not in BLOCK_SIZES:
            raise ValueError(
                f"nf4.NF4Config: block_size must be one of "
                f"{', '.join(map(str, BLOCK_SIZES))}, got {self.block_size}"
            )
        if self.format not in WEIGHT_FORMATS:
            raise ValueError(
                f"nf4.NF4Config: format must be one of {', '.join(WEIGHT_FORMATS)}, "
                f"got {self.format!r}"
            )
        if isinstance(self.compute_dtype, str):
            dtype = getattr(torch, self.compute_dtype.removeprefix("torch."), None)
            if not isinstance(dtype, torch.dtype):
                raise ValueError(
                    f"nf4.NF4Config: compute_dtype must name a torch dtype, "
                    f"got {self.compute_dtype!r}"
                )
            self.compute_dtype = dtype

    @classmethod
    def from_dict(
        cls, config_dict: Mapping[str, Any], return_unused_kwargs: bool = False, **kwargs: Any
    ) -> Any:
        """Read what ``to_dict`` made; transformers fixes the signature and calls it.

        ``kwargs`` that are settings win; with ``return_unused_kwargs`` the others come back beside
        the config. Raises ValueError for a setting that does not exist.
        """
        names = {f.name for f in fields(cls)}
        values = {k: v for k, v in config_dict.items() if k != "quant_method"}
        unknown = sorted(set(values) - names)
        if unknown:
            raise ValueError(
                f"nf4.NF4Config: settings must be among {', '.join(sorted(names))}, "
                f"got {', '.join(unknown)}"
            )
        config = cls(**values, **{k: v for k, v in kwargs.items() if k in names})
        unused = {k: v for k, v in kwargs.items() if k not in names}
        return (config, unused) if return_unused_kwargs else config

    def to_dict(self) -> dict[str, Any]:
        """The settings as JSON values, under ``quant_method`` "nf4"."""
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        if self.compute_dtype is not None:
            values["compute_dtype"] = str(self.compute_dtype).removeprefix("torch.")
        return {"quant_method": self.quant_method, **values}

    def layer_kwargs(self) -> dict[str, Any]:
        """The keyword arguments that a layer's ``from_linear`` takes."""
        return {
            "block_size": self.block_size,
            "double_quant": self.double_quant,
            "format": self.format,
            "compute_dtype": self.compute_dtype,
        }

    def keeps(self, name: str) -> bool:
        """Whether ``modules_to_not_convert`` keeps the module called ``name`` 16-bit."""
        return any(
            name == kept or name.endswith(f".{kept}") or name.startswith(f"{kept}.")
            for kept in self.modules_to_not_convert or ()
        )
