"""``Params4bit``: a parameter that quantizes itself when it is moved to a device."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

from nf4.drop_in.functional import QuantState, quantize_4bit
from nf4.tensor import QuantizedTensor


class _ParameterKind(type(nn.Parameter)):  # type: ignore[misc]
    def __instancecheck__(cls, instance: Any) -> bool:
        # The weights of models that nf4 loaded are plain parameters [bytes, 1]; scripts ask
        # isinstance(parameter, Params4bit) to tell quantized ones.
        if type.__instancecheck__(cls, instance):
            return True
        plain = type(instance) is nn.Parameter and instance.dtype is torch.uint8
        return bool(plain and instance.dim() == 2 and instance.shape[1] == 1)


class Params4bit(nn.Parameter, metaclass=_ParameterKind):
    """A weight that is quantized when it is moved to a device, "cpu" included.

    Until then ``data`` is the float weight; afterwards packed codes of ``quant_storage``, and
    ``quant_state`` what decodes them. Casts (``half()``) leave codes as they are.
    """

    blocksize: int
    compress_statistics: bool
    quant_type: str
    quant_state: QuantState | None
    quant_storage: torch.dtype
    bnb_quantized: bool
    module: nn.Module | None

    def __new__(
        cls,
        data: Tensor | None = None,
        requires_grad: bool = False,
        quant_state: QuantState | None = None,
        blocksize: int | None = None,
        compress_statistics: bool = True,
        quant_type: str = "fp4",
        quant_storage: torch.dtype = torch.uint8,
        module: nn.Module | None = None,
        bnb_quantized: bool = False,
        **kwargs: Any,
    ) -> Params4bit:
        data = torch.empty(0) if data is None else data
        self = torch.Tensor._make_subclass(cls, data, requires_grad)
        self.__dict__.update(
            blocksize=blocksize or 64,
            compress_statistics=compress_statistics,
            quant_type=quant_type,
            quant_state=quant_state,
            quant_storage=quant_storage,
            module=module,
            bnb_quantized=bnb_quantized,
        )
        return self

    @classmethod
    def from_prequantized(
        cls,
        data: Tensor,
        quantized_stats: dict[str, Any],
        requires_grad: bool = False,
        device: torch.device | str = "cuda",
        module: nn.Module | None = None,
        **kwargs: Any,
    ) -> Params4bit:
        """From packed codes and the other entries of a state dict."""
        state = QuantState.from_dict(dict(quantized_stats), device)
        return cls.from_state(data.to(device), state, requires_grad=requires_grad, module=module)

    @classmethod
    def from_state(cls, data: Tensor, state: QuantState, **kwargs: Any) -> Params4bit:
        """Over packed codes and their state; nothing is copied."""
        return cls(
            data,
            quant_state=state,
            blocksize=state.blocksize,
            compress_statistics=state.nested,
            quant_type=state.quant_type or "nf4",
            quant_storage=data.dtype,
            bnb_quantized=True,
            **kwargs,
        )

    @property
    def q(self) -> QuantizedTensor:
        """The quantized weight; RuntimeError before it is one."""
        if self.quant_state is None:
            raise RuntimeError(
                "nf4.drop_in: a 4-bit weight must be quantized before use: move its module to a "
                'device, .to("cpu") included'
            )
        return self.quant_state.to_quantized(self.data)

    def to(self, *args: Any, **kwargs: Any) -> Any:
        device, dtype, non_blocking, _ = torch._C._nn._parse_to(*args, **kwargs)
        if self.bnb_quantized:
            return self.with_data(self.data.to(device, non_blocking=non_blocking))
        if device is None or device.type == "meta":
            return self.with_data(
                self.data.to(device=device, dtype=dtype, non_blocking=non_blocking)
            )
        codes, state = quantize_4bit(
            self.data.contiguous().to(device, dtype),
            blocksize=self.blocksize,
            compress_statistics=self.compress_statistics,
            quant_type=self.quant_type,
            quant_storage=self.quant_storage,
        )
        # In place, as bitsandbytes does: other references to the parameter see it too.
        self.data, self.quant_state, self.bnb_quantized = codes, state, True
        return self

    def cpu(self, *args: Any, **kwargs: Any) -> Any:
        return self.to("cpu")

    def cuda(  # type: ignore[override]
        self, device: Any = None, non_blocking: bool = False, **kwargs: Any
    ) -> Any:
        return self.to("cuda" if device is None else device, non_blocking=non_blocking)

    def with_data(self, data: Tensor, deep: bool = False) -> Params4bit:
        """A new parameter over ``data`` with all else as here, the state on data's device."""
        new = type(self)(data, self.requires_grad)
        new.__dict__.update(self.__dict__)
        if self.quant_state is not None:
            new.quant_state = (
                copy.deepcopy(self.quant_state) if deep else copy.copy(self.quant_state)
            )
            new.quant_state.to(data.device)
        return new

    def __deepcopy__(self, memo: dict[int, Any]) -> Params4bit:
        if id(self) not in memo:
            new = self.with_data(self.data.clone(), deep=True)
            memo[id(self)] = new
            new.module = copy.deepcopy(self.module, memo)
        return memo[id(self)]

    def __reduce_ex__(self, protocol: Any) -> Any:
        return _rebuild, (type(self), self.data, self.requires_grad, dict(self.__dict__))


def _rebuild(
    cls: type[Params4bit], data: Tensor, requires_grad: bool, state: dict[str, Any]
) -> Params4bit:
    new = cls(data, requires_grad)
    new.__dict__.update(state)
    return new
