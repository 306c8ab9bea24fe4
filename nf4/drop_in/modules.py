"""``bitsandbytes.nn``: modules that hold float weights until moved to a device, then 4-bit ones."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from nf4 import functional
from nf4.drop_in.functional import QuantState, stored_as
from nf4.drop_in.params import Params4bit
from nf4.nn.embedding import NF4Embedding, lookup
from nf4.nn.linear import NF4Linear
from nf4.nn.weight import QuantizedWeight
from nf4.tensor import QuantizedTensor


class _Lazy4bit(QuantizedWeight):
    """Keeps the weight, and all that describes it, in a ``Params4bit`` in place of buffers."""

    weight: Params4bit

    def _start(
        self,
        rows: int,
        columns: int,
        *,
        compute_dtype: torch.dtype | None,
        compress_statistics: bool,
        quant_type: str,
        quant_storage: torch.dtype | None,
        weight: Tensor,
    ) -> None:
        nn.Module.__init__(self)
        self.compute_dtype = compute_dtype
        self._shape = torch.Size((rows, columns))
        for name in ("weight_absmax", "weight_nested_absmax", "weight_offset"):
            self.register_buffer(name, None)
        self.weight = Params4bit(
            weight,
            compress_statistics=compress_statistics,
            quant_type=quant_type,
            quant_storage=quant_storage or torch.uint8,
        )

    @property
    def q(self) -> QuantizedTensor:
        return self.weight.q

    @property
    def quant_state(self) -> QuantState | None:
        """The weight's state; None before it is quantized."""
        return getattr(self.weight, "quant_state", None)

    @property
    def weight_shape(self) -> torch.Size:  # type: ignore[override]
        return self._shape

    @property
    def weight_dtype(self) -> torch.dtype:  # type: ignore[override]
        state = self.quant_state
        return self.weight.dtype if state is None else state.dtype or torch.float32

    @property
    def block_size(self) -> int:  # type: ignore[override]
        return self.weight.blocksize

    @property
    def format(self) -> str:  # type: ignore[override]
        return self.weight.quant_type

    def set_quantized(self, q: QuantizedTensor) -> None:
        codes = stored_as(q.packed, self.weight.quant_storage)
        self.weight = Params4bit.from_state(codes, QuantState.from_quantized(q))

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> _Lazy4bit:
        weight = self.weight
        del self._parameters["weight"]
        try:
            nn.Module._apply(self, fn, recurse)
            if not weight.bnb_quantized:
                moved = fn(weight)  # quantizes in place if fn moves to a device
                if moved is not weight:
                    weight = weight.with_data(moved.data)
            else:
                # Codes and scales keep their dtypes; only the device counts.
                device = fn(weight.data).device
                if device != weight.device:
                    weight = weight.with_data(weight.data.to(device))
        finally:
            self._parameters["weight"] = weight
        return self

    def _save_to_state_dict(
        self, destination: dict[str, Any], prefix: str, keep_vars: bool
    ) -> None:
        nn.Module._save_to_state_dict(self, destination, prefix, keep_vars)
        if self.quant_state is not None:
            for key, value in self.quant_state.as_dict(packed=True).items():
                destination[f"{prefix}weight.{key}"] = value if keep_vars else value.detach()

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any
    ) -> None:
        if any(key.startswith(f"{prefix}weight.quant_state.") for key in state_dict):
            q = QuantizedTensor.from_state_dict(state_dict, f"{prefix}weight")
            if q.shape != self.weight_shape:
                raise ValueError(
                    f"nf4.drop_in: {prefix}weight must have shape {list(self.weight_shape)}, "
                    f"got {list(q.shape)}"
                )
            self.weight.quant_storage = state_dict[f"{prefix}weight"].dtype
            device = self.weight.device
            self.set_quantized(q.to("cpu" if device.type == "meta" else device))
            for key in [k for k in state_dict if k.startswith(f"{prefix}weight.")]:
                del state_dict[key]
            state_dict[f"{prefix}weight"] = self.weight.data  # the loader copies it onto itself
        nn.Module._load_from_state_dict(self, state_dict, prefix, *args, **kwargs)


class _Kind(type):
    """``isinstance`` of the classes below holds for nf4's own modules of those formats too.

    QLoRA scripts find the layers to adapt by ``isinstance(module, bnb.nn.Linear4bit)``.
    """

    def __instancecheck__(cls, instance: Any) -> bool:
        if type.__instancecheck__(cls, instance):
            return True
        own, formats = getattr(cls, "_own", None), getattr(cls, "_formats", ())
        return type(instance) is own and instance.format in formats


class Linear4bit(_Lazy4bit, NF4Linear, metaclass=_Kind):
    """bitsandbytes' ``Linear4bit``: float weights until ``.to(device)`` quantizes them.

    ``compute_dtype`` None takes the dtype of the first input. The output has the input's dtype
    also under autocast, as bitsandbytes has it. ``isinstance`` holds for ``NF4Linear`` too.
    """

    _own = NF4Linear
    _formats: tuple[str, ...] = ("nf4", "fp4")

    def __init__(
        self,
        input_features: int,
        output_features: int,
        bias: bool = True,
        compute_dtype: torch.dtype | None = None,
        compress_statistics: bool = True,
        quant_type: str = "fp4",
        quant_storage: torch.dtype | None = torch.uint8,
        device: torch.device | str | None = None,
    ) -> None:
        linear = nn.Linear(input_features, output_features, bias, device=device)
        self._start(
            output_features,
            input_features,
            compute_dtype=compute_dtype,
            compress_statistics=compress_statistics,
            quant_type=quant_type,
            quant_storage=quant_storage,
            weight=linear.weight.data,
        )
        self.in_features, self.out_features = input_features, output_features
        self.fan_in_fan_out = False
        self.bias = linear.bias

    def forward(self, x: Tensor) -> Tensor:
        if self.compute_dtype is None and x.dtype in (torch.float32, torch.bfloat16):
            self.compute_dtype = x.dtype
        return functional.linear(x.to(self.compute_dtype), self.q, self.bias).to(x.dtype)

    def extra_repr(self) -> str:
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, "
            f"bias={self.bias is not None}, format={self.format}, "
            f"quantized={self.quant_state is not None}"
        )


class LinearNF4(Linear4bit):
    """``Linear4bit`` of NF4."""

    _formats = ("nf4",)

    def __init__(
        self,
        input_features: int,
        output_features: int,
        bias: bool = True,
        compute_dtype: torch.dtype | None = None,
        compress_statistics: bool = True,
        quant_storage: torch.dtype | None = torch.uint8,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__(
            input_features, output_features, bias, compute_dtype, compress_statistics, "nf4",
            quant_storage, device,
        )  # fmt: skip


class LinearFP4(Linear4bit):
    """``Linear4bit`` of FP4."""

    _formats = ("fp4",)

    def __init__(
        self,
        input_features: int,
        output_features: int,
        bias: bool = True,
        compute_dtype: torch.dtype | None = None,
        compress_statistics: bool = True,
        quant_storage: torch.dtype | None = torch.uint8,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__(
            input_features, output_features, bias, compute_dtype, compress_statistics, "fp4",
            quant_storage, device,
        )  # fmt: skip


class Embedding4bit(_Lazy4bit, NF4Embedding, metaclass=_Kind):
    """bitsandbytes' ``Embedding4bit``: float rows until ``.to(device)`` quantizes them."""

    _own = NF4Embedding
    _formats: tuple[str, ...] = ("nf4", "fp4")

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        dtype: torch.dtype | None = None,
        quant_type: str = "fp4",
        quant_storage: torch.dtype | None = torch.uint8,
        device: torch.device | str | None = None,
    ) -> None:
        weight = torch.empty(num_embeddings, embedding_dim, dtype=dtype, device=device)
        if not weight.is_meta:
            nn.init.normal_(weight)
        self._start(
            num_embeddings,
            embedding_dim,
            compute_dtype=None,
            compress_statistics=True,
            quant_type=quant_type,
            quant_storage=quant_storage,
            weight=weight,
        )
        self.num_embeddings, self.embedding_dim = num_embeddings, embedding_dim
        self.padding_idx = None

    def forward(self, ids: Tensor) -> Tensor:
        return lookup(self.q, ids, self.weight_dtype)


class EmbeddingNF4(Embedding4bit):
    """``Embedding4bit`` of NF4."""

    _formats = ("nf4",)

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        dtype: torch.dtype | None = None,
        quant_storage: torch.dtype | None = torch.uint8,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__(num_embeddings, embedding_dim, dtype, "nf4", quant_storage, device)


class EmbeddingFP4(Embedding4bit):
    """``Embedding4bit`` of FP4."""

    _formats = ("fp4",)

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        dtype: torch.dtype | None = None,
        quant_storage: torch.dtype | None = torch.uint8,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__(num_embeddings, embedding_dim, dtype, "fp4", quant_storage, device)


def _refused(name: str) -> type:
    """A class that isinstance can ask about and that refuses to be made."""

    def __init__(self: Any, *args: Any, **kwargs: Any) -> None:
        raise NotImplementedError(
            f"nf4.drop_in: bitsandbytes.nn.{name} (8-bit) is not part of nf4; install bitsandbytes"
        )

    return type(name, (nn.Module,), {"__init__": __init__, "__doc__": f"8-bit: refuses. {name}"})


Linear8bitLt = _refused("Linear8bitLt")
Embedding8bit = _refused("Embedding8bit")
Int8Params = _refused("Int8Params")
