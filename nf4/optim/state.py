"""The optimizer state of one parameter, and its form in a checkpoint.

In memory: ``step``, and ``state1``, ``state2`` (the first and second moment) either as float32 or
as uint8 codes with ``absmax1``, ``absmax2``, float32 [ceil(numel / 256)]. The first moment uses
the signed, the second the unsigned 8-bit dynamic map of ``nf4.formats``.

In a checkpoint: as bitsandbytes 0.50 writes it, so that each library resumes what the other saved.
The tensors lie under one nested key, which keeps FSDP from gathering them, and 8-bit states carry
their code tables ``qmap1`` and ``qmap2``. The flat form of older versions is read too.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from nf4 import formats

BLOCK_SIZE = formats.NESTED_BLOCK_SIZE
NESTED_KEY = "__bnb_optimizer_quant_state__"
_MAPS = {"qmap1": formats.DYNAMIC8, "qmap2": formats.DYNAMIC8_UNSIGNED}


def blocks(numel: int) -> int:
    """Number of 256-element blocks, the last of which may be short."""
    return -(-numel // BLOCK_SIZE)


def layout(numel: int, bits: int) -> dict[str, tuple[int, torch.dtype]]:
    """Elements and dtype of each state tensor of a parameter."""
    if bits == 32:
        return {"state1": (numel, torch.float32), "state2": (numel, torch.float32)}
    scales = (blocks(numel), torch.float32)
    codes = (numel, torch.uint8)
    return {"state1": codes, "absmax1": scales, "state2": codes, "absmax2": scales}


def new_state(param: Tensor, bits: int) -> dict[str, Tensor]:
    """Zero moments for ``param``, on its device; codes and moments have its shape."""
    return {
        name: torch.zeros(
            param.shape if name.startswith("state") else (n,), dtype=dtype, device=param.device
        )
        for name, (n, dtype) in layout(param.numel(), bits).items()
    }


def to_checkpoint(
    state: dict[str, Any], tables: dict[torch.device, dict[str, Tensor]]
) -> dict[str, Any]:
    """The checkpoint entry of one parameter's state. Shares its tensors, unless they are paged.

    ``tables`` collects the code tables that all entries of a checkpoint share on a device.
    """
    tensors = {name: state[name] for name in tensor_names(state)}
    if tensors["state1"].untyped_storage().nbytes() != tensors["state1"].nbytes:
        # torch.save refuses tensors of several dtypes in one storage, and would write all of it.
        tensors = {name: tensor.clone() for name, tensor in tensors.items()}
    if "absmax1" in tensors:
        device = tensors["state1"].device
        if device not in tables:
            tables[device] = {
                name: torch.from_numpy(fmt.values.copy()).to(device) for name, fmt in _MAPS.items()
            }
        tensors |= tables[device]
    step = state["step"]
    return {"step": int(step), NESTED_KEY: tensors}


def tensor_names(state: dict[str, Any]) -> list[str]:
    """The keys of a parameter's state that hold tensors of its own."""
    return [name for name in ("state1", "state2", "absmax1", "absmax2") if name in state]


def bits_of(state: dict[str, Any]) -> int:
    """8 or 32: the precision of a state's moments."""
    return 8 if "absmax1" in state else 32


def from_checkpoint(entry: Any, param: Tensor, device: torch.device, where: str) -> dict[str, Any]:
    """The state of ``param`` from its checkpoint entry, copied to ``device``.

    Raises ValueError, opening with ``where``, for a missing key, a wrong shape or dtype, another
    code table, or scales and moments that are not finite.
    """
    if not isinstance(entry, dict):
        raise ValueError(f"{where}: must be a dict, got {type(entry).__name__}")
    nested = entry.get(NESTED_KEY, {})
    if not isinstance(nested, dict):
        raise ValueError(f"{where}: {NESTED_KEY} must be a dict, got {type(nested).__name__}")
    flat = {**{k: v for k, v in entry.items() if k != NESTED_KEY}, **nested}
    for name in ("step", "state1", "state2"):
        if name not in flat:
            raise ValueError(f"{where}: {name} is missing, got {', '.join(map(str, flat))}")
    step = _checked_step(flat["step"], where)
    state1 = flat["state1"]
    quantized = isinstance(state1, Tensor) and state1.dtype is torch.uint8
    state: dict[str, Any] = {"step": step}
    for name, (n, dtype) in layout(param.numel(), 8 if quantized else 32).items():
        shape = tuple(param.shape) if name.startswith("state") else (n,)
        value = _checked(flat, name, shape, dtype, where)
        state[name] = torch.empty(shape, dtype=dtype, device=device).copy_(value)
    if quantized:
        for name, fmt in _MAPS.items():
            table = flat.get(name)
            if table is not None and not _equals(table, fmt):
                raise ValueError(f"{where}: {name} must be the {fmt.name} map, got another table")
    return state


def _checked_step(value: Any, where: str) -> int:
    try:
        step = int(value)
        whole = step == value
    except (TypeError, ValueError, OverflowError, RuntimeError):
        whole = False
    # 32 bits of the random words' key are the step's.
    if not whole or not 0 <= step < 2**32:
        raise ValueError(f"{where}: step must be a whole number in [0, 2**32), got {value}")
    return step


def _equals(table: Any, fmt: formats.Format) -> bool:
    values = torch.from_numpy(fmt.values)
    return isinstance(table, Tensor) and (
        table.dtype is values.dtype and torch.equal(table.cpu(), values)
    )


def _checked(
    flat: dict[str, Any], name: str, shape: tuple[int, ...], dtype: torch.dtype, where: str
) -> Tensor:
    value = flat.get(name)
    if not isinstance(value, Tensor):
        raise ValueError(f"{where}: {name} must be a tensor, got {type(value).__name__}")
    # A flat moment is what some tools make of it; another shape is another parameter's.
    fits = value.shape in (shape, (math.prod(shape),))
    if value.dtype is not dtype or not fits:
        raise ValueError(
            f"{where}: {name} must be {dtype} {list(shape)}, got {value.dtype} {list(value.shape)}"
        )
    if dtype is torch.float32 and not bool(value.isfinite().all()):
        raise ValueError(f"{where}: {name} must be finite, got NaN or Inf")
    # Every float but the first moment: a root is taken of the second.
    if dtype is torch.float32 and name != "state1" and bool((value < 0).any()):
        raise ValueError(f"{where}: {name} must not be negative, got {value.min().item()}")
    return value.reshape(shape)
