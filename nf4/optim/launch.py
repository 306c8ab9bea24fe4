"""What one launch of ``adamw_step`` takes: tensor lists, scalars, random seed."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor


class Launch:
    """The arguments of one kernel launch: parameters of one device that took as many steps."""

    def __init__(self, step: int | Tensor) -> None:
        self.step = step
        self.params: list[Tensor] = []
        self.grads: list[Tensor] = []
        # state1, state2, absmax1, absmax2
        self.moments: tuple[list[Tensor], ...] = ([], [], [], [])
        self.offsets: list[int] = []
        self._states: list[dict[str, Any]] = []
        self._strided: list[tuple[Tensor, Tensor]] = []

    def add(self, p: Tensor, state: dict[str, Any], offset: int) -> None:
        """Take the parameter ``p``, which has a gradient; ``offset`` is its first random word."""
        assert p.grad is not None
        target = local_tensor(p)
        dense = target.detach().contiguous()
        if dense.data_ptr() != target.data_ptr():
            self._strided.append((target, dense))
        self.params.append(dense)
        self.grads.append(local_tensor(p.grad).detach().contiguous())
        self.moments[0].append(state["state1"])
        self.moments[1].append(state["state2"])
        empty = self.params[0].new_empty(0, dtype=torch.float32)
        self.moments[2].append(state.get("absmax1", empty))
        self.moments[3].append(state.get("absmax2", empty))
        self.offsets.append(offset)
        self._states.append(state)

    def finish(self, step: int | Tensor) -> None:
        """Copy strided parameters back and record the step count."""
        for target, dense in self._strided:
            target.copy_(dense)
        for state in self._states:
            state["step"] = step


def local_tensor(t: Tensor) -> Tensor:
    """This rank's part of a DTensor; any other tensor itself."""
    return t.to_local() if hasattr(t, "to_local") else t


def hyper_values(group: dict[str, Any], step: int) -> list[float]:
    """The scalars of the ``step``-th update, in the order that ``nf4.optim.adamw`` lists."""
    beta1, beta2 = group["betas"]
    lr = float(group["lr"])
    gain1 = 1.0 - beta1
    return [
        beta1,
        -gain1 if group["maximize"] else gain1,
        beta2,
        1.0 - beta2,
        1.0 / math.sqrt(1.0 - beta2**step),
        group["eps"],
        1.0 - lr * group["weight_decay"],
        lr / (1.0 - beta1**step),
    ]


def hyper_on_device(group: dict[str, Any], step: Tensor) -> Tensor:
    """``hyper_values`` for a step count and learning rate that stay on the device."""
    beta1, beta2 = group["betas"]
    t = step.double()
    lr = group["lr"]
    lr = lr.double().view(()) if isinstance(lr, Tensor) else torch.full_like(t, lr)
    values = [torch.full_like(t, value) for value in hyper_values({**group, "lr": 0.0}, 1)]
    values[4] = (1.0 - torch.pow(beta2, t)).rsqrt()
    values[6] = 1.0 - lr * group["weight_decay"]
    values[7] = lr / (1.0 - torch.pow(beta1, t))
    return torch.stack(values).float()


def to_device(t: Tensor, device: torch.device) -> Tensor:
    """A small host tensor on ``device``."""
    if device.type == "cpu":
        return t
    # From pinned memory the copy is queued without waiting for the device.
    return t.pin_memory().to(device, non_blocking=True)
