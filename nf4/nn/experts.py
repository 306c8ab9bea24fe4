"""``NF4Experts``: the fused experts of a mixture-of-experts layer over quantized weights."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from nf4 import functional
from nf4.formats import FORMATS, NESTED_BLOCK_SIZE
from nf4.tensor import QuantizedTensor

# Matrices an expert has in each fused parameter, in the order they are stacked in.
MATRICES = {"gate_up_proj": ("gate", "up"), "down_proj": ("down",)}
_STATISTICS = ("absmax", "nested_absmax", "offset")
# lora_A [E, r, columns], lora_B [E, rows of all matrices, r] and the scaling.
ExpertsAdapter = tuple[Tensor, Tensor, float]


class NF4Experts(nn.Module):
    """Gated experts ``down(act(gate x) * up x)`` whose matrices are quantized one by one.

    It takes the place of a transformers v5 experts module: parameters ``gate_up_proj``
    ``[E, 2 I, H]`` and ``down_proj`` ``[E, H, I]``, called with ``hidden_states [T, H]``,
    ``top_k_index [T, k]`` and ``top_k_weights [T, k]``, giving ``[T, H]``. Here each parameter
    holds the packed codes of its matrices, uint8 ``[E, matrices, bytes]``, with scales in buffers
    ``<name>_absmax`` and, double quantized, ``<name>_nested_absmax`` and ``<name>_offset``. Every
    matrix is a ``QuantizedTensor`` of its own, so that a checkpoint can store it by itself. The
    weights are frozen; gradients reach the hidden states and the routing weights.
    """

    def __init__(
        self,
        source: nn.Module,
        *,
        block_size: int = 64,
        double_quant: bool = True,
        format: str = "nf4",
        compute_dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        """Zero weights in the sizes of ``source``, an experts module, which is left as it is.

        Raises TypeError, with the reason, for a module of another layout.
        """
        super().__init__()
        reason = unsupported_experts(source)
        if reason is not None:
            raise TypeError(f"nf4.NF4Experts: {reason}, got {type(source).__name__}")
        gate_up, down = source.gate_up_proj, source.down_proj
        assert isinstance(gate_up, Tensor) and isinstance(down, Tensor)
        self.num_experts, self.hidden_dim, self.intermediate_dim = down.shape
        self.block_size, self.format = block_size, format
        self.compute_dtype, self.weight_dtype = compute_dtype, down.dtype
        self.double_quant = double_quant
        self._adapters: dict[str, Sequence[ExpertsAdapter]] = {}
        # In a tuple, which hides it from named_modules: it has settings, but no weights.
        self._shell = (_without_parameters(source),)
        self.act_fn: Callable[[Tensor], Tensor] = source.act_fn  # type: ignore[assignment]
        for name, matrices in MATRICES.items():
            tensors = self._storage(name, len(matrices), device or down.device)
            self.register_parameter(name, nn.Parameter(tensors[name], requires_grad=False))
            for key in _STATISTICS:
                self.register_buffer(f"{name}_{key}", tensors.get(f"{name}_{key}"))
        self.train(source.training)

    def _storage(self, name: str, count: int, device: torch.device | str) -> dict[str, Tensor]:
        rows, columns = self.matrix_shape(name)
        blocks = -(-rows * columns // self.block_size)
        lead = (self.num_experts, count)
        packed_bytes = FORMATS[self.format].packed_bytes(rows * columns)
        tensors = {name: torch.zeros(*lead, packed_bytes, dtype=torch.uint8, device=device)}
        dtype = torch.uint8 if self.double_quant else torch.float32
        tensors[f"{name}_absmax"] = torch.zeros(*lead, blocks, dtype=dtype, device=device)
        if self.double_quant:
            nested = -(-blocks // NESTED_BLOCK_SIZE)
            tensors[f"{name}_nested_absmax"] = torch.zeros(
                *lead, nested, dtype=torch.float32, device=device
            )
            tensors[f"{name}_offset"] = torch.zeros(lead, dtype=torch.float32, device=device)
        return tensors

    @classmethod
    def from_experts(
        cls,
        experts: nn.Module,
        *,
        block_size: int = 64,
        double_quant: bool = True,
        format: str = "nf4",
        compute_dtype: torch.dtype | None = None,
    ) -> NF4Experts:
        """Quantize the weights of an experts module, which is left as it is."""
        module = cls(
            experts,
            block_size=block_size,
            double_quant=double_quant,
            format=format,
            compute_dtype=compute_dtype,
            device="meta",
        )
        for name in MATRICES:
            module.set_tensors(module.quantize(name, getattr(experts, name)))
        return module

    def matrix_shape(self, name: str) -> torch.Size:
        """``[rows, columns]`` of one matrix of the parameter ``name``."""
        if name == "down_proj":
            return torch.Size((self.hidden_dim, self.intermediate_dim))
        return torch.Size((self.intermediate_dim, self.hidden_dim))

    def count(self, name: str) -> int:
        """Elements of the parameter ``name`` before it was quantized."""
        return self.num_experts * len(MATRICES[name]) * self.matrix_shape(name).numel()

    def quantize(self, name: str, weight: Tensor) -> dict[str, Tensor]:
        """Quantize a fused parameter ``[E, rows of all matrices, columns]``, matrix by matrix.

        Returns the tensors to store, by attribute name. Raises ValueError for a shape that does
        not fit and for NaN or infinite elements.
        """
        rows, columns = self.matrix_shape(name)
        count = len(MATRICES[name])
        if weight.shape != (self.num_experts, count * rows, columns):
            raise ValueError(
                f"nf4.NF4Experts: {name} must have shape "
                f"{[self.num_experts, count * rows, columns]}, got {list(weight.shape)}"
            )
        matrices = [
            functional.quantize(
                matrix,
                block_size=self.block_size,
                double_quant=self.double_quant,
                format=self.format,
            )
            for expert in weight.detach()
            for matrix in expert.view(count, rows, columns)
        ]
        return self.stack(name, matrices)

    def stack(self, name: str, matrices: list[QuantizedTensor]) -> dict[str, Tensor]:
        """The stored tensors of ``name`` from its matrices, expert by expert, by attribute name.

        Raises ValueError unless there is one of each, all of this module's layout.
        """
        count = len(MATRICES[name])
        if len(matrices) != self.num_experts * count:
            raise ValueError(
                f"nf4.NF4Experts: {name} must have {self.num_experts * count} matrices, "
                f"got {len(matrices)}"
            )
        layout = (self.matrix_shape(name), self.block_size, self.format, self.double_quant)
        for q in matrices:
            if (q.shape, q.block_size, q.format, q.nested) != layout:
                raise ValueError(
                    f"nf4.NF4Experts: every matrix of {name} must be {self.format} "
                    f"{list(layout[0])} in blocks of {self.block_size}, double_quant="
                    f"{self.double_quant}, got {q!r}"
                )
        self.weight_dtype = matrices[0].dtype
        columns = zip(*(q.tensors for q in matrices), strict=True)
        tensors = {}
        for key, values in zip(("", *(f"_{s}" for s in _STATISTICS)), columns, strict=True):
            if values[0] is not None:
                stacked = torch.stack([v.reshape(-1) if v.dim() else v for v in values])
                tensors[name + key] = stacked.view(self.num_experts, count, *stacked.shape[1:])
        return tensors

    def set_tensors(self, tensors: Mapping[str, Tensor]) -> None:
        """Make ``tensors`` (of ``quantize`` or ``stack``) the stored ones; nothing is copied."""
        for key, value in tensors.items():
            if key in MATRICES:
                setattr(self, key, nn.Parameter(value, requires_grad=False))
            else:
                setattr(self, key, value)

    def q(self, name: str, expert: int, index: int) -> QuantizedTensor:
        """Matrix ``index`` (see ``MATRICES``) of an expert, over the same memory."""
        nested = getattr(self, f"{name}_nested_absmax")
        offset = getattr(self, f"{name}_offset")
        return QuantizedTensor(
            getattr(self, name).data[expert, index].view(-1, 1),
            getattr(self, f"{name}_absmax")[expert, index],
            None if nested is None else nested[expert, index],
            None if offset is None else offset[expert, index],
            self.matrix_shape(name),
            self.weight_dtype,
            self.block_size,
            self.format,
        )

    def dequantize(self, name: str, dtype: torch.dtype | None = None) -> Tensor:
        """The parameter ``name`` as the experts module stores it, in one dtype."""
        rows, columns = self.matrix_shape(name)
        count = len(MATRICES[name])
        out = torch.empty(
            (self.num_experts, count, rows, columns),
            dtype=dtype or self.weight_dtype,
            device=getattr(self, name).device,
        )
        for expert in range(self.num_experts):
            for index in range(count):
                functional.dequantize(self.q(name, expert, index), out=out[expert, index])
        return out.view(self.num_experts, count * rows, columns)

    def to_experts(self, dtype: torch.dtype | None = None) -> nn.Module:
        """The 16-bit module that this one came from, with the dequantized weights."""
        module = copy.copy(self._shell[0])
        module._parameters = {name: nn.Parameter(self.dequantize(name, dtype)) for name in MATRICES}
        return module.train(self.training)

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        out = torch.zeros_like(hidden_states)
        for expert in top_k_index.unique().tolist():
            if expert >= self.num_experts:  # another rank's, under expert parallelism
                continue
            token, slot = torch.where(top_k_index == expert)
            y = self._expert(expert, hidden_states[token]) * top_k_weights[token, slot, None]
            # An expert meets a token once, so this sum has one order: it is deterministic.
            out = out.index_add(0, token, y.to(out.dtype))
        return out

    @contextmanager
    def adapted(self, name: str, adapters: Sequence[ExpertsAdapter]) -> Iterator[None]:
        """Within it, a forward adds ``scaling * lora_B[e] @ lora_A[e]`` to the matrices of each
        expert e in the parameter ``name``, for every adapter, in the matmul itself."""
        before = self._adapters
        self._adapters = {**before, name: adapters}
        try:
            yield
        finally:
            self._adapters = before

    def _expert(self, expert: int, x: Tensor) -> Tensor:
        dtype = self.compute_dtype or x.dtype
        gate, up = (self._linear("gate_up_proj", expert, i, x.to(dtype)) for i in range(2))
        combine = _own_gate(self._shell[0])
        hidden = self.act_fn(gate) * up if combine is None else combine(torch.cat((gate, up), -1))
        return self._linear("down_proj", expert, 0, hidden).to(x.dtype)

    def _linear(self, name: str, expert: int, index: int, x: Tensor) -> Tensor:
        q = self.q(name, expert, index)
        adapters = self._adapters.get(name, ())
        if not adapters:
            return functional.linear(x, q)
        rows = slice(index * q.shape[0], (index + 1) * q.shape[0])
        if len(adapters) == 1:
            ((a, b, scaling),) = adapters
            return functional.linear_lora(x, q, a[expert], b[expert, rows], scaling)
        # Several adapters are one of their ranks' sum.
        stacked_a = torch.cat([a[expert] for a, _, _ in adapters])
        stacked_b = torch.cat([b[expert, rows] * scaling for _, b, scaling in adapters], dim=1)
        return functional.linear_lora(x, q, stacked_a, stacked_b, 1.0)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> NF4Experts:
        # The scales are float32 whatever dtype the rest of the model is cast to.
        dtypes = {name: b.dtype for name, b in self._buffers.items() if b is not None}
        kept = {name: self._buffers.pop(name) for name in tuple(self._buffers)}
        super()._apply(fn, recurse)
        for name, value in kept.items():
            if value is not None:
                moved = fn(value)
                value = moved if moved.dtype is dtypes[name] else value.to(moved.device)
            self._buffers[name] = value
        return self

    def extra_repr(self) -> str:
        return (
            f"num_experts={self.num_experts}, hidden_dim={self.hidden_dim}, "
            f"intermediate_dim={self.intermediate_dim}, format={self.format}, "
            f"block_size={self.block_size}, double_quant={self.double_quant}"
        )


def is_fused_experts(module: nn.Module) -> bool:
    """Whether ``module`` holds the weights of all experts in 3-dimensional parameters."""
    return isinstance(module, NF4Experts) or any(
        p is not None and p.dim() == 3 and "proj" in name for name, p in module._parameters.items()
    )


def unsupported_experts(module: nn.Module) -> str | None:
    """Why ``NF4Experts`` cannot take the place of a fused experts module, or None."""
    parameters = {k: v for k, v in module._parameters.items() if v is not None}
    if set(parameters) != set(MATRICES) or any(p.numel() for p in _below(module)):
        names = ", ".join(sorted(k for k, _ in module.named_parameters())) or "none"
        return f"experts must have the parameters gate_up_proj and down_proj only (has {names})"
    gate_up, down = parameters["gate_up_proj"], parameters["down_proj"]
    if down.dim() != 3 or gate_up.shape != (down.shape[0], 2 * down.shape[2], down.shape[1]):
        return (
            "experts must store gate_up_proj as [E, 2 I, H] and down_proj as [E, H, I] "
            f"(has {list(gate_up.shape)} and {list(down.shape)})"
        )
    if not getattr(module, "is_concatenated", True):
        return "experts must store gate before up (has them interleaved)"
    if not hasattr(module, "act_fn"):
        return "experts must have an act_fn"
    return None


def _below(module: nn.Module) -> list[nn.Parameter]:
    return [p for child in module.children() for p in child.parameters()]


def _without_parameters(module: nn.Module) -> nn.Module:
    shell = copy.copy(module)  # shares the parameters until they are dropped
    shell._parameters = dict.fromkeys(MATRICES)
    return shell


def _own_gate(module: nn.Module) -> Callable[[Tensor], Tensor] | None:
    """A gating rule of the model's own, of gate and up in one tensor; None for act(gate) * up."""
    rule: Any = getattr(type(module), "_apply_gate", None)
    if rule is None or rule.__name__ == "_default_apply_gate":
        return None
    return rule.__get__(module)
