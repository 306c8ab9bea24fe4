"""How Triton kernels are reached: lazy import, constant tables, the launch, interpreter repairs."""

from __future__ import annotations

import contextlib
import importlib.util
import os
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache, lru_cache
from importlib import import_module
from typing import Any

import numpy as np
import torch
from torch import Tensor

from nf4 import formats
from nf4.backends.tuning import Target

# Numbers of the interpreter's pretended device: they only choose tiles and splits.
_INTERPRETED = (90, 4)


def interpreted() -> bool:
    """Whether Triton kernels run in its interpreter, on CPU tensors."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def unsupported(device: torch.device) -> str | None:
    """Why Triton kernels cannot run on ``device``, or None."""
    if importlib.util.find_spec("triton") is None:
        return "the package triton is not installed"
    if device.type == "cpu":
        return None if interpreted() else "runs on CPU tensors only under TRITON_INTERPRET=1"
    if device.type != "cuda":
        return "needs a CUDA tensor"
    if not torch.cuda.is_available():
        return "no CUDA device is available"
    if interpreted():
        return "TRITON_INTERPRET=1 is set, which runs kernels on CPU tensors only"
    major, minor = torch.cuda.get_device_capability(device)
    if (major, minor) < (7, 5):
        return f"needs compute capability 7.5, this device has {major}.{minor}"
    return None


@dataclass(frozen=True)
class Launch:
    """One kernel launch, before any compilation."""

    kernel: Any
    grid: tuple[int, ...]
    args: dict[str, Any]
    num_warps: int
    num_stages: int
    exact: bool


# Set by ``recording``: what launches are planned for, and where they go instead of a device.
_recorded: tuple[Target, list[Launch]] | None = None


@contextlib.contextmanager
def recording(target: Target) -> Iterator[list[Launch]]:
    """Collect launches instead of running them; the ops then take tensors of any device.

    The ahead-of-time checks use it to compile exactly what the launchers would run on ``target``.
    """
    global _recorded
    previous = _recorded
    launches: list[Launch] = []
    _recorded = (target, launches)
    try:
        yield launches
    finally:
        _recorded = previous


@cache
def _device_target(device: torch.device) -> Target:
    properties = torch.cuda.get_device_properties(device)
    capability = 10 * properties.major + properties.minor
    return Target(capability, properties.multi_processor_count, properties.name)


def target_of(device: torch.device) -> Target:
    """What launches on ``device`` are planned for."""
    if _recorded is not None:
        return _recorded[0]
    return Target(*_INTERPRETED) if device.type == "cpu" else _device_target(device)


@cache
def kernel(stem: str, name: str) -> Any:
    """The kernel ``name`` of ``kernels/<stem>.py``, imported on first use."""
    if interpreted():
        repair_interpreter()
    return getattr(import_module(f"nf4.kernels.{stem}"), name)


def launch(
    kernel: Any,
    grid: tuple[int, ...],
    args: dict[str, Any],
    device: torch.device,
    *,
    num_warps: int = 4,
    num_stages: int = 2,
    exact: bool = False,
) -> None:
    """Launch on the current stream of ``device``. ``exact`` forbids fused multiply-adds."""
    if _recorded is not None:
        _recorded[1].append(Launch(kernel, grid, args, num_warps, num_stages, exact))
        return
    if device.type != "cuda":
        options = {"num_warps": num_warps, "num_stages": num_stages, "enable_fp_fusion": not exact}
        kernel[grid](**args, **options)
        return
    if device.index == torch.cuda.current_device():  # a guard takes 5 us, a launch 40
        launch_compiled(kernel, grid, args, device, num_warps, num_stages, exact)
        return
    with torch.cuda.device(device):
        launch_compiled(kernel, grid, args, device, num_warps, num_stages, exact)


# Name and whether it is constexpr of each parameter, by the identity of a kernel: its hash is slow.
_parameters: dict[int, tuple[tuple[str, bool], ...]] = {}
# By everything that Triton specializes a kernel on.
_compiled: dict[tuple[Any, ...], Any] = {}


def launch_compiled(
    kernel: Any,
    grid: tuple[int, ...],
    args: dict[str, Any],
    device: torch.device,
    num_warps: int,
    num_stages: int,
    exact: bool,
) -> None:
    """Launch what Triton compiled before without asking it again, which takes most of a launch's
    time on the host. A key may be finer than Triton's own, never coarser.
    """
    key: list[Any] = [id(kernel), device, num_warps, num_stages, exact]
    values: list[Any] = []
    parameters = _parameters.get(id(kernel))
    if parameters is None:
        parameters = tuple((param.name, param.is_constexpr) for param in kernel.params)
        _parameters[id(kernel)] = parameters
    for name, is_constexpr in parameters:
        value = args[name]
        if is_constexpr or value is None:
            key.append(value)
        elif isinstance(value, Tensor):
            key.append(value.dtype)
            value = value.data_ptr()
            key.append(value % 16 == 0)
        elif isinstance(value, int):
            key.append(-1 if value == 1 else value % 16 == 0)
            key.append(value.bit_length() // 32)
        values.append(value)
    found = tuple(key)
    compiled = _compiled.get(found)
    if compiled is None:
        options = {"num_warps": num_warps, "num_stages": num_stages, "enable_fp_fusion": not exact}
        _compiled[found] = kernel[grid](**args, **options)
    else:
        compiled[(*grid, 1, 1)[:3]](*values)


@lru_cache
def codes(format: int, dtype: torch.dtype = torch.float32) -> tuple[float, ...] | None:
    """The values of a 4-bit format, rounded to ``dtype``; None for an 8-bit format."""
    fmt = formats.BY_ID[format]
    if fmt.bits != 4:
        return None
    return tuple(torch.from_numpy(fmt.values.copy()).to(dtype).tolist())


def _buckets(fmt: formats.Format, count: int, buckets: int) -> tuple[np.ndarray, np.ndarray]:
    """(threshold, rank of the value below it) of ``count`` buckets, float32 and integers.

    Bucket ``i`` takes the values that round to ``i / buckets - 1``.
    """
    bounds = fmt.thresholds.astype(np.float64)
    low = (np.arange(count) - 0.5) / buckets - 1
    rank = np.searchsorted(bounds, low, side="left")
    last = len(bounds) - 1
    nearest = np.minimum(rank, last)
    inside = (rank <= last) & (bounds[nearest] <= low + 1 / buckets)
    return np.where(inside, fmt.thresholds[nearest], np.inf).astype(np.float32), rank


def _entries(threshold: np.ndarray, codes: np.ndarray, size: int) -> np.ndarray:
    table = np.zeros(size, dtype=np.int64)
    table[: len(codes)] = threshold.view(np.uint32).astype(np.int64) << 32 | codes
    return table


@lru_cache
def bucket_table(format: int, device: torch.device) -> Tensor:
    """int64 [4 * buckets]: how ``kernels/_codes.encode4`` finds the codes of a 4-bit format.

    There are as few buckets, in a power of two, as leave at most one threshold in each.
    """
    fmt = formats.BY_ID[format]
    buckets = 1
    while 1 / buckets >= np.diff(fmt.thresholds.astype(np.float64)).min():
        buckets *= 2
    threshold, rank = _buckets(fmt, 2 * buckets + 1, buckets)
    order = np.array(fmt.order, dtype=np.int64)
    codes = order[rank] | order[np.minimum(rank + 1, 15)] << 4
    return torch.from_numpy(_entries(threshold, codes, 4 * buckets)).to(device)


# 31 buckets: as many of equal width on both sides of 0 as the lanes of a warp can hold.
LANE_BUCKETS = 15


def lane_entries(fmt: formats.Format) -> np.ndarray | None:
    """int64 [32]: the same for ``kernels/_codes.encode_asm``; None where it cannot be.

    That takes codes in ascending order whose thresholds lie at least a bucket apart: NF4.
    """
    apart = np.diff(fmt.thresholds.astype(np.float64)).min()
    if list(fmt.order) != sorted(fmt.order) or apart <= 1 / LANE_BUCKETS:
        return None
    threshold, rank = _buckets(fmt, 2 * LANE_BUCKETS + 1, LANE_BUCKETS)
    return _entries(threshold, rank.astype(np.int64), 32)


@lru_cache
def lane_table(format: int, device: torch.device) -> Tensor | None:
    """``lane_entries`` on ``device``; None in the interpreter, which runs no PTX."""
    entries = None if interpreted() else lane_entries(formats.BY_ID[format])
    return None if entries is None else torch.from_numpy(entries).to(device)


@lru_cache
def lane_encoder() -> dict[str, Any]:
    """The constexprs of ``kernels/quantize`` with ``lane_table``."""
    asm, constraints = import_module("nf4.kernels._codes").encode_asm(LANE_BUCKETS)
    return {"ASM": asm, "CONSTRAINTS": constraints}


@lru_cache
def decoder(format: int, dtype: torch.dtype) -> dict[str, Any]:
    """The constexprs of ``kernels/_codes.decode``: byte-permute PTX on a GPU, else plain."""
    values = codes(format, dtype)
    if values is None or interpreted():
        return {"CODES": values, "ASM": None, "CONSTRAINTS": None}
    names = {torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16"}
    asm, constraints = import_module("nf4.kernels._codes").decode_asm(values, names[dtype])
    return {"CODES": values, "ASM": asm, "CONSTRAINTS": constraints}


@lru_cache
def dot_decoder(format: int) -> dict[str, Any]:
    """The constexprs of ``kernels/linear_row``: PTX on a GPU, else the plain form."""
    if interpreted():
        return {"CODES": codes(format), "ASM": None, "CONSTRAINTS": None}
    asm, constraints = import_module("nf4.kernels._codes").dot_asm()
    return {"CODES": None, "ASM": asm, "CONSTRAINTS": constraints}


@lru_cache
def value_table(format: int, device: torch.device) -> Tensor:
    """float32: the values of a format on ``device``, 256 of an 8-bit one and 16 of a 4-bit one."""
    return torch.from_numpy(formats.BY_ID[format].values.copy()).to(device)


@lru_cache
def threshold_table(format: int, device: torch.device) -> Tensor:
    """float32 [255]: the thresholds of an 8-bit format on ``device``."""
    return torch.from_numpy(formats.BY_ID[format].thresholds.copy()).to(device)


def repair_interpreter() -> None:
    """Give Triton's interpreter bfloat16 arithmetic as the device has it.

    Up to Triton 3.9 its casts to bfloat16 truncate instead of rounding to nearest even, casts from
    it get denormals wrong, and ``tl.dot`` multiplies the raw bits of bfloat16 operands. All three
    are replaced, once a process. Triton 3.6 also takes scalars out of arrays by ``int``, which
    NumPy 2.4 refuses.
    """
    from triton.language import bfloat16, float32
    from triton.runtime import interpreter

    builder = interpreter.InterpreterBuilder
    if getattr(builder, "_nf4_repaired", False):
        return
    cast_impl, convert, dot = builder.cast_impl, builder.create_fp_to_fp, builder.create_dot
    handle = interpreter.TensorHandle

    def widened(t: Any) -> Any:
        if t.dtype.scalar != bfloat16:
            return t
        return handle((t.data.astype(np.uint32) << 16).view(np.float32), float32)

    def cast(self: Any, src: Any, dst_type: Any) -> Any:
        if dst_type.scalar != bfloat16 or src.dtype.scalar == bfloat16:
            return cast_impl(self, widened(src), dst_type)
        bits = np.asarray(src.data).astype(np.float32).view(np.uint32)
        rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
        nan = (bits & 0x7FFFFFFF) > 0x7F800000
        return handle(np.where(nan, 0x7FC0, rounded).astype(np.uint16), dst_type.scalar)

    def create_dot(self: Any, a: Any, b: Any, *rest: Any) -> Any:
        return dot(self, widened(a), widened(b), *rest)

    def fp_to_fp(self: Any, src: Any, dst_type: Any, rounding_mode: Any) -> Any:
        if bfloat16 in (src.dtype.scalar, dst_type.scalar):
            return cast(self, src, dst_type)
        return convert(self, src, dst_type, rounding_mode)

    patch_tensor = interpreter._patch_lang_tensor

    def patched_tensor(tensor: Any, *rest: Any) -> None:
        patch_tensor(tensor, *rest)
        tensor.__index__ = lambda self: int(self.handle.data.item())

    interpreter._patch_lang_tensor = patched_tensor
    builder.cast_impl = cast
    builder.create_fp_to_fp = fp_to_fp
    builder.create_dot = create_dot
    builder._nf4_repaired = True
