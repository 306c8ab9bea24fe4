"""Chooses the backend of each op call: the only place that does.

``nf4::<op>`` runs the native kernel registered at the tensor's device, when one is loaded;
otherwise the Python fallback registered here walks ``ORDER`` and takes the first backend that
supports the device. ``use_backend`` routes the calls of a block of code to one backend instead.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from nf4.backends import composed, cpu, cuda, reference, triton
from nf4.ops import BACKENDS, LIBRARIES, SCHEMAS

ORDER: tuple[ModuleType, ...] = (cpu, cuda, triton, reference)
_BY_NAME = {module.NAME: module for module in ORDER}
assert tuple(_BY_NAME) == BACKENDS

# The namespace that calls go to; dynamo guards on it, and autograd keeps it for the backward.
_namespace = "nf4"


@dataclass(frozen=True)
class BackendStatus:
    """Whether a backend can run on this machine, and if not, why."""

    usable: bool
    reason: str

    def __bool__(self) -> bool:
        return self.usable


def available_backends() -> dict[str, BackendStatus]:
    """Every backend with whether it is usable on this machine, and the reason if it is not."""
    status = {}
    for name, module in _BY_NAME.items():
        reasons = [module.unsupported(torch.device(device)) for device in ("cpu", "cuda")]
        usable = any(reason is None for reason in reasons)
        reason = "" if usable else "; ".join(dict.fromkeys(r for r in reasons if r is not None))
        status[name] = BackendStatus(usable, reason)
    return status


@contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Run the nf4 calls of a block, and their backward passes, on one backend.

    Raises ValueError for an unknown name and RuntimeError, with the reason, where the backend
    cannot run on this machine. The choice is process-wide, not per thread.
    """
    global _namespace
    if name not in _BY_NAME:
        raise ValueError(
            f"nf4.use_backend: name must be one of {', '.join(_BY_NAME)}, got {name!r}"
        )
    status = available_backends()[name]
    if not status.usable:
        raise RuntimeError(f"nf4.use_backend: backend {name!r} is not usable here: {status.reason}")
    previous = _namespace
    _namespace = f"nf4_{name}"
    try:
        yield
    finally:
        _namespace = previous


def namespace() -> str:
    """The op namespace that calls go to now: ``nf4`` or ``nf4_<backend>``."""
    return _namespace


def backend_for(device: torch.device) -> str:
    """Name of the backend that ``nf4::<op>`` takes on ``device`` when none is forced."""
    for module in ORDER:
        if module.unsupported(device) is None:
            return module.NAME
    raise RuntimeError(_no_backend("any op", device))


def _no_backend(op: str, device: torch.device) -> str:
    reasons = [f"{name}: {m.unsupported(device)}" for name, m in _BY_NAME.items()]
    return f"nf4.{op}: no backend can run on {device.type!r} ({'; '.join(reasons)})"


def _device(args: tuple[Any, ...]) -> torch.device:
    first = args[0] if isinstance(args[0], list) else args
    return next(a.device for a in first if isinstance(a, Tensor))


def _run(implementation: Callable, device: torch.device, args: tuple[Any, ...]) -> Any:
    """Call a Python implementation with autocast off.

    Autocast stays active inside an op and would cast the float32 matmuls of the reference, and of
    any dense path, to 16 bits.
    """
    if not torch.is_autocast_enabled(device.type):
        return implementation(*args)
    with torch.autocast(device.type, enabled=False):
        return implementation(*args)


def _implementation(module: ModuleType, op: str) -> Callable | None:
    """A backend's own Python implementation of an op, or the one made of its other ops."""
    own: Callable | None = getattr(module, op, None)
    if own is not None or op not in composed.__all__:
        return own
    return partial(getattr(composed, op), getattr(torch.ops, f"nf4_{module.NAME}"))


def _loaded_now(module: ModuleType, op: str, device: torch.device) -> bool:
    """Whether an op that came here has its native kernel by now: CUDA's are loaded when asked for,
    and the dispatcher finds them from then on."""
    return module is cuda and device.type == "cuda" and op in cuda.OPS


def _fallback(op: str, *args: Any) -> Any:
    device = _device(args)
    for module in ORDER:
        if module.unsupported(device) is not None:
            continue
        if _loaded_now(module, op, device):
            return getattr(torch.ops.nf4, op)(*args)
        implementation = _implementation(module, op)
        if implementation is not None:
            return _run(implementation, device, args)
    raise RuntimeError(_no_backend(op, device))


def _forced(module: ModuleType, op: str, *args: Any) -> Any:
    device = _device(args)
    reason = module.unsupported(device)
    if reason is not None:
        raise RuntimeError(
            f"nf4.{op}: backend {module.NAME!r} cannot run on {device.type!r}: {reason}"
        )
    if _loaded_now(module, op, device):
        return getattr(torch.ops.nf4_cuda, op)(*args)
    implementation = _implementation(module, op)
    if implementation is None:
        raise RuntimeError(f"nf4.{op}: backend {module.NAME!r} does not implement it")
    return _run(implementation, device, args)


def _register() -> None:
    key = "CompositeExplicitAutograd"
    for op in SCHEMAS:
        LIBRARIES["nf4"].impl(op, partial(_fallback, op), key)
        for name, module in _BY_NAME.items():
            LIBRARIES[f"nf4_{name}"].impl(op, partial(_forced, module, op), key)


_register()
