"""One grouped call for LoRA layers of a module that get the same input (q/k/v, gate/up)."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from nf4 import functional

if TYPE_CHECKING:
    from nf4.nn.linear import Linear4bitLoRA


@dataclass
class _Pending:
    """Outputs of siblings that have not been called yet, and the input that they belong to."""

    x: Tensor
    version: int
    ys: dict[int, Tensor]


class SharedInput:
    """Layers of ``parent`` (their attribute names in ``names``) that share their input.

    While the forward of ``parent`` runs, the first of them that is called computes all of them by
    ``nf4.linear_lora_group``; the others return their part when they are called with the very same
    tensor. Outside that forward, under torch.compile, and where ``obstacle`` names a reason, each
    layer computes for itself as if it stood alone. Modules, parameters and state_dict stay as they
    are. Not tied to a thread: what is handed out always belongs to the input that it was made of.
    """

    def __init__(self, parent: nn.Module, names: list[str]) -> None:
        self.names = names
        self.members: list[Linear4bitLoRA] = [getattr(parent, name) for name in names]
        self.obstacle: str | None = None  # why the last forward did not group its calls
        self._stopped = False
        self._open = False
        self._pending: _Pending | None = None
        for member in self.members:
            member.shared = self
        parent.register_forward_pre_hook(self._enter)
        parent.register_forward_hook(self._leave, always_call=True)

    def _enter(self, parent: nn.Module, args: Any) -> None:
        if torch.compiler.is_compiling():
            return
        self._pending = None
        whole = zip(self.names, self.members, strict=True)
        self._open = not self._stopped and all(getattr(parent, n, None) is m for n, m in whole)

    def _leave(self, parent: nn.Module, args: Any, output: Any) -> None:
        if torch.compiler.is_compiling():
            return
        self._pending, self._open = None, False

    def take(self, member: Linear4bitLoRA, x: Tensor) -> Tensor | None:
        """The output of ``member`` for x, or None where it has to compute it itself."""
        if torch.compiler.is_compiling() or not self._open:
            return None
        index = next((i for i, m in enumerate(self.members) if m is member), None)
        if index is None:  # a copy of a member, as nn.DataParallel makes them
            return None
        pending = self._pending
        if pending is not None:
            if pending.x is not x or pending.version != x._version:
                self._stop()
                return None
            y = pending.ys.pop(index, None)
            if not pending.ys:
                self._pending = None
            return y
        self.obstacle = self._why_apart(x)
        if self.obstacle is not None:
            return None
        ys = self._compute(x)
        y = ys.pop(index)
        self._pending = _Pending(x, x._version, ys)
        return y

    def _stop(self) -> None:
        self._pending, self._open, self._stopped = None, False, True
        self.obstacle = "the layers were called with different inputs"
        warnings.warn(f"nf4: {', '.join(self.names)} are not fused: {self.obstacle}", stacklevel=5)

    def _why_apart(self, x: Tensor) -> str | None:
        first = self.members[0]
        for m in self.members:
            if m.merged:
                return "an adapter is merged"
            if m.weight.device != x.device or m.lora_A.device != x.device:
                return "a weight is not on the device of the input"
            if type(m.lora_A) is not nn.Parameter or type(m.weight) is not nn.Parameter:
                return "a weight is sharded"
            if m.active_dropout != first.active_dropout:
                return "the layers have different dropout"
            if m.compute_dtype is not first.compute_dtype:
                return "the layers have different compute dtypes"
            if m.lora_A.dtype is not first.lora_A.dtype:
                return "the adapters have different dtypes"
            if (m.block_size, m.format) != (first.block_size, first.format):
                return "the layers have different block sizes or formats"
        return None

    def _compute(self, x: Tensor) -> dict[int, Tensor]:
        first, members = self.members[0], self.members
        inside = x if first.compute_dtype is None else x.to(first.compute_dtype)
        ys = functional.linear_lora_group(
            inside,
            [m.q for m in members],
            [m.lora_A for m in members],
            [m.lora_B for m in members],
            [m.scaling for m in members],
            [m.bias for m in members],
            first.active_dropout,
        )
        if inside is not x:
            ys = [y.to(x.dtype) for y in ys]
        return dict(enumerate(ys))
