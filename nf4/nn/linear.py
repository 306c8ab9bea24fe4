"""Linear layers over quantized weights: ``NF4Linear`` and ``Linear4bitLoRA``."""

from __future__ import annotations

import math
import warnings
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from nf4 import functional
from nf4.nn.shared import SharedInput
from nf4.nn.weight import QuantizedWeight
from nf4.tensor import QuantizedTensor

if TYPE_CHECKING:
    from typing import Self  # Python 3.11


class NF4Linear(QuantizedWeight):
    """``nn.Linear`` with a frozen, blockwise quantized weight ``[out_features, in_features]``.

    ``from_linear`` and ``from_quantized`` make one with contents. ``compute_dtype`` None computes
    in x's dtype; otherwise x is cast to it and the result back. ``fan_in_fan_out`` tells that the
    layer was a transformers ``Conv1D``, which stores its weight as ``[in, out]``.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        *,
        block_size: int = 64,
        double_quant: bool = True,
        format: str = "nf4",
        compute_dtype: torch.dtype | None = None,
        fan_in_fan_out: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(
            out_features,
            in_features,
            block_size=block_size,
            double_quant=double_quant,
            format=format,
            compute_dtype=compute_dtype,
            device=device,
            dtype=dtype,
        )
        self.in_features, self.out_features = in_features, out_features
        self.fan_in_fan_out = fan_in_fan_out
        self.bias = (
            nn.Parameter(torch.zeros(out_features, dtype=self.weight_dtype, device=device))
            if bias
            else None
        )

    @classmethod
    def from_quantized(
        cls,
        q: QuantizedTensor,
        bias: Tensor | None = None,
        *,
        compute_dtype: torch.dtype | None = None,
        **kwargs: Any,
    ) -> Self:
        """A layer over an existing ``QuantizedTensor`` ``[out, in]``; nothing is copied."""
        out_features, in_features = q.shape
        module = cls(
            in_features,
            out_features,
            bias=False,
            block_size=q.block_size,
            double_quant=q.nested,
            format=q.format,
            compute_dtype=compute_dtype,
            device="meta",
            dtype=q.dtype,
            **kwargs,
        )
        module.set_quantized(q)
        if bias is not None:
            module.bias = nn.Parameter(bias.detach(), requires_grad=False)
        return module

    @classmethod
    def from_layer(cls, layer: NF4Linear, **kwargs: Any) -> Self:
        """A layer of this class over another one's weight and bias; nothing is copied."""
        return cls.from_quantized(
            layer.q,
            layer.bias,
            compute_dtype=layer.compute_dtype,
            fan_in_fan_out=layer.fan_in_fan_out,
            **kwargs,
        ).train(layer.training)

    @classmethod
    def from_linear(
        cls,
        linear: nn.Module,
        *,
        block_size: int = 64,
        double_quant: bool = True,
        format: str = "nf4",
        compute_dtype: torch.dtype | None = None,
        **kwargs: Any,
    ) -> NF4Linear:
        """Quantize an ``nn.Linear`` or a transformers ``Conv1D`` (its weight is transposed).

        The bias is taken over, frozen. ``linear`` is left as it is.
        """
        weight, bias = linear.weight, linear.bias
        assert isinstance(weight, Tensor)
        fan_in_fan_out = is_conv1d(linear)
        q = functional.quantize(
            weight.T if fan_in_fan_out else weight,
            block_size=block_size,
            double_quant=double_quant,
            format=format,
        )
        module = cls.from_quantized(
            q,
            bias if isinstance(bias, Tensor) else None,
            compute_dtype=compute_dtype,
            fan_in_fan_out=fan_in_fan_out,
            **kwargs,
        )
        return module.train(linear.training)

    @property
    def W_q(self) -> nn.Parameter:
        """The packed codes, under HQQ's name: PEFT calls ``dequantize()`` on modules with it."""
        return self.weight

    def to_linear(self, dtype: torch.dtype | None = None) -> nn.Module:
        """The 16-bit layer that this one came from, with the dequantized weight."""
        return self.with_weight(self.dequantize(dtype))

    def with_weight(self, weight: Tensor) -> nn.Module:
        """An ``nn.Linear`` (or ``Conv1D``, where this layer was one) over ``weight [out, in]``."""
        out_features, in_features = weight.shape
        bias = None if self.bias is None else nn.Parameter(self.bias.detach().to(weight.dtype))
        linear: nn.Module
        if self.fan_in_fan_out:
            # Only a model made by transformers has such a layer, so it is importable here.
            from transformers.pytorch_utils import Conv1D

            linear, weight = Conv1D(0, 0), weight.T.contiguous()
            linear.nf, linear.nx = out_features, in_features
            linear.register_parameter("bias", bias)
        else:
            linear = nn.Linear(in_features, out_features, bias=bias is not None, device="meta")
            if bias is not None:
                linear.bias = bias
        linear.weight = nn.Parameter(weight)
        return linear.train(self.training)

    def forward(self, x: Tensor) -> Tensor:
        if self.compute_dtype is None or x.dtype is self.compute_dtype:
            return self._forward(x)
        return self._forward(x.to(self.compute_dtype)).to(x.dtype)

    def _forward(self, x: Tensor) -> Tensor:
        return functional.linear(x, self.q, self.bias)

    def extra_repr(self) -> str:
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, "
            f"bias={self.bias is not None}, format={self.format}, block_size={self.block_size}, "
            f"double_quant={self.weight_nested_absmax is not None}"
        )


class Linear4bitLoRA(NF4Linear):
    """``NF4Linear`` with a LoRA adapter: ``y = x W^T + bias + scaling dropout(x) A^T B^T``.

    ``lora_A`` is ``[r, in_features]`` and ``lora_B`` ``[out_features, r]``, both trainable and
    float32 by default; ``scaling`` is ``lora_alpha / r``, or ``lora_alpha / sqrt(r)`` with
    ``use_rslora`` (arXiv:2312.03732). B starts at zero, A as ``nn.Linear`` initialises it.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        *,
        r: int = 16,
        lora_alpha: float = 32,
        lora_dropout: float = 0.0,
        use_rslora: bool = False,
        lora_dtype: torch.dtype = torch.float32,
        device: torch.device | str | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(in_features, out_features, bias, device=device, **kwargs)
        if r < 1:
            raise ValueError(f"nf4.Linear4bitLoRA: r must be at least 1, got {r}")
        if not 0.0 <= lora_dropout < 1.0:
            raise ValueError(
                f"nf4.Linear4bitLoRA: lora_dropout must be in [0, 1), got {lora_dropout}"
            )
        self.r, self.lora_alpha, self.lora_dropout = r, lora_alpha, lora_dropout
        self.use_rslora = use_rslora
        self.lora_A = nn.Parameter(torch.empty(r, in_features, dtype=lora_dtype, device=device))
        self.lora_B = nn.Parameter(torch.empty(out_features, r, dtype=lora_dtype, device=device))
        self.reset_lora_parameters()
        self._unmerged: QuantizedTensor | None = None
        # The layers that one grouped call computes together with this one.
        self.shared: SharedInput | None = None

    def reset_lora_parameters(self) -> None:
        """A as ``nn.Linear`` starts its weight, B zero: the layer starts as its base."""
        if not self.lora_A.is_meta:
            nn.init.kaiming_uniform_(self.lora_A, a=math.sqrt(5))
            nn.init.zeros_(self.lora_B)

    @classmethod
    def from_quantized(
        cls,
        q: QuantizedTensor,
        bias: Tensor | None = None,
        *,
        compute_dtype: torch.dtype | None = None,
        **kwargs: Any,
    ) -> Self:
        module = super().from_quantized(q, bias, compute_dtype=compute_dtype, **kwargs)
        for name in ("lora_A", "lora_B"):
            parameter = getattr(module, name)
            setattr(module, name, nn.Parameter(torch.empty_like(parameter, device=q.device)))
        module.reset_lora_parameters()
        return module

    @property
    def scaling(self) -> float:
        return self.lora_alpha / (math.sqrt(self.r) if self.use_rslora else self.r)

    @property
    def merged(self) -> bool:
        """Whether the adapter is folded into the weight."""
        return self._unmerged is not None

    @property
    def active_dropout(self) -> float:
        """The dropout probability of a forward now: 0 in evaluation."""
        return self.lora_dropout if self.training else 0.0

    def delta_weight(self) -> Tensor:
        """``scaling * B A`` ``[out_features, in_features]`` in float32."""
        return self.scaling * (self.lora_B.detach().float() @ self.lora_A.detach().float())

    def merge(self, base: Tensor | None = None) -> None:
        """Fold the adapter into the 4-bit weight: ``Q(base + scaling B A)``.

        ``base`` is the 16-bit weight ``[out_features, in_features]`` that was quantized. Without
        it the dequantized weight is taken, which sits on the code points, so that requantizing
        loses nearly all of an adapter under 3 % of the weight's norm: a warning says so.
        ``unmerge`` restores the packed bytes exactly.
        """
        if self.merged:
            return
        if base is None:
            warnings.warn(
                "nf4: merging into 4 bits from the dequantized weight loses most of a small "
                "adapter; pass the 16-bit base weight to keep it",
                stacklevel=2,
            )
            base = self.dequantize(torch.float32)
        unmerged = self.q
        if base.shape != unmerged.shape:
            raise ValueError(
                f"nf4.Linear4bitLoRA.merge: base must have shape {list(unmerged.shape)}, "
                f"got {list(base.shape)}"
            )
        merged = functional.quantize(
            base.detach().to(self.weight.device, torch.float32) + self.delta_weight(),
            block_size=self.block_size,
            double_quant=unmerged.nested,
            format=self.format,
        )
        self.set_quantized(replace(merged, dtype=unmerged.dtype))
        self._unmerged = unmerged

    def unmerge(self) -> None:
        """Put back the weight from before ``merge``, byte for byte."""
        if self._unmerged is not None:
            self.set_quantized(self._unmerged.to(self.weight.device))
            self._unmerged = None

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any
    ) -> None:
        self.unmerge()  # the weight to come is another one
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)

    def forward(self, x: Tensor) -> Tensor:
        y = None if self.shared is None else self.shared.take(self, x)
        return super().forward(x) if y is None else y

    def _forward(self, x: Tensor) -> Tensor:
        if self.merged:
            return super()._forward(x)
        return functional.linear_lora(
            x,
            self.q,
            self.lora_A,
            self.lora_B,
            self.scaling,
            self.bias,
            self.active_dropout,
        )

    def extra_repr(self) -> str:
        text = (
            f"{super().extra_repr()}, r={self.r}, lora_alpha={self.lora_alpha}, "
            f"lora_dropout={self.lora_dropout}"
        )
        if self.shared is None:
            return text
        if self.shared.obstacle is not None:
            return f"{text}, not fused: {self.shared.obstacle}"
        return f"{text}, fused={'+'.join(self.shared.names)}"


def is_conv1d(module: nn.Module) -> bool:
    """Whether a module is transformers' ``Conv1D``, a Linear whose weight is ``[in, out]``."""
    return type(module).__name__ == "Conv1D" and hasattr(module, "nf")
