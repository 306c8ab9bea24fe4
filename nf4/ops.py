"""The schemas and fake kernels of every nf4 op: the contract that each backend implements.

Every op exists in five namespaces. ``nf4::<op>`` is what users reach: native kernels register there
at their device's dispatch key, and ``backends`` registers a fallback that chooses in Python.
``nf4_<backend>::<op>`` is the same op on one named backend, for tests, benchmarks and
``use_backend``.

Conventions shared by all schemas:

* A quantized weight ``[N, K]`` travels as ``packed`` (uint8 ``[bytes, 1]``), ``absmax`` (float32
  ``[blocks]``; uint8 codes when nested), ``nested_absmax`` (float32 ``[ceil(blocks / 256)]``) and
  ``offset`` (float32, 0-dim), the last two None when not nested, with ``block_size`` and ``format``
  (``nf4.formats.Format.id``).
* ``x`` is ``[..., K]`` and ``grad_y`` is ``[..., N]``, float32, float16 or bfloat16; outputs are
  new tensors of that dtype. Strided inputs are made contiguous by the backend.
* ``lora_a`` is ``[r, K]`` and ``lora_b`` is ``[N, r]``, of one dtype, which may differ from x's.
* ``seed`` is int64 ``[1]`` on x's device, needed when ``dropout_p > 0``. Element ``e`` of the
  flattened x is kept when word ``e % 4`` of ``Philox4x32-10(key=seed, counter=e // 4)`` is at
  least ``round(dropout_p * 2**32)``, and is then multiplied by ``1 / (1 - dropout_p)``. The key is
  (low, high) 32 bits of the seed, the counter (low, high) 32 bits of ``e // 4``, then two zeros.
* ``linear_lora_group`` is ``linear_lora`` for members that share x and its columns, the block size,
  the format, ``dropout_p`` and the adapters' dtype; N and r may differ. Lists have one entry for
  each member. ``seeds`` is int64 ``[members]``: every member has a mask of its own.
* ``adamw_step`` updates many parameters in one launch; ``nf4.optim.adamw`` states its arithmetic.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

_WEIGHT = "Tensor packed, Tensor absmax, Tensor? nested_absmax, Tensor? offset"
_LAYOUT = "int block_size, int format"
_LORA = "Tensor lora_a, Tensor lora_b, float scaling, float dropout_p, Tensor? seed"
_WEIGHTS = "Tensor[] packed, Tensor[] absmax, Tensor?[] nested_absmax, Tensor?[] offset"
_LORAS = "Tensor[] lora_a, Tensor[] lora_b, float[] scaling, float dropout_p, Tensor? seeds"

SCHEMAS: dict[str, str] = {
    "quantize": f"(Tensor x, {_LAYOUT}) -> (Tensor packed, Tensor absmax)",
    "double_quantize": "(Tensor absmax) -> (Tensor codes, Tensor nested_absmax, Tensor offset)",
    "dequantize": f"({_WEIGHT}, SymInt[] shape, {_LAYOUT}, ScalarType dtype) -> Tensor",
    "dequantize_out": f"({_WEIGHT}, {_LAYOUT}, Tensor(a!) out) -> ()",
    "linear": f"(Tensor x, {_WEIGHT}, Tensor? bias, SymInt n, {_LAYOUT}) -> Tensor",
    # dx = grad_y W
    "linear_backward": f"(Tensor grad_y, {_WEIGHT}, SymInt k, {_LAYOUT}) -> Tensor",
    # y = x W^T + bias + scaling * s lora_b^T with s = dropout(x) lora_a^T, float32 [..., r].
    "linear_lora": (
        f"(Tensor x, {_WEIGHT}, Tensor? bias, {_LORA}, SymInt n, {_LAYOUT}) -> (Tensor y, Tensor s)"
    ),
    # With ds = scaling * grad_y lora_b: dx = grad_y W + mask(ds lora_a),
    # da = ds^T dropout(x) and db = scaling * grad_y^T s, in the adapters' dtype.
    # dx has no elements when needs_dx is False; da and db when needs_dab is False.
    "linear_lora_backward": (
        f"(Tensor grad_y, Tensor x, Tensor s, {_WEIGHT}, {_LORA}, {_LAYOUT}, "
        "bool needs_dx, bool needs_dab) -> (Tensor dx, Tensor da, Tensor db)"
    ),
    "linear_lora_group": (
        f"(Tensor x, {_WEIGHTS}, Tensor?[] bias, {_LORAS}, {_LAYOUT}) -> (Tensor[] ys, Tensor[] ss)"
    ),
    # dx is the sum over the members.
    "linear_lora_group_backward": (
        f"(Tensor[] grad_ys, Tensor x, Tensor[] ss, {_WEIGHTS}, {_LORAS}, {_LAYOUT}, "
        "bool needs_dx, bool needs_dab) -> (Tensor dx, Tensor[] das, Tensor[] dbs)"
    ),
    # One list entry per parameter, all contiguous and on one device. state1 and state2 are uint8
    # codes with absmax float32 [ceil(numel / 256)], or float32 moments with an empty absmax.
    # hyper is float32 [8]: see nf4.optim.adamw. With seed (int64 [1]) float16 and bfloat16
    # parameters are rounded stochastically, element i by random word offsets[p] + i (offsets are
    # multiples of 4). skipped is int64 [1], and is increased by the blocks left as they were.
    "adamw_step": (
        "(Tensor(a!)[] params, Tensor[] grads, Tensor(b!)[] state1, Tensor(c!)[] state2, "
        "Tensor(d!)[] absmax1, Tensor(e!)[] absmax2, Tensor hyper, Tensor? seed, int[] offsets, "
        "Tensor(f!) skipped) -> ()"
    ),
}

BACKENDS = ("cpu", "cuda", "triton", "reference")
NAMESPACES = ("nf4", *(f"nf4_{name}" for name in BACKENDS))

_FLOATS = (torch.float32, torch.float16, torch.bfloat16)


def _blocks(numel: int, block_size: int) -> int:
    return -(-numel // block_size)


def _check_float(op: str, name: str, t: Tensor) -> None:
    torch._check(
        t.dtype in _FLOATS or t.dtype is torch.float64,
        lambda: f"nf4.{op}: {name} must be a floating-point tensor, got {t.dtype}",
    )


def _check_features(op: str, name: str, t: Tensor, size: int) -> None:
    torch._check(
        t.dim() >= 1 and t.shape[-1] == size,
        lambda: f"nf4.{op}: {name} must have {size} features, got shape {list(t.shape)}",
    )


def _quantize(x: Tensor, block_size: int, format: int) -> tuple[Tensor, Tensor]:
    _check_float("quantize", "x", x)
    n = x.numel()
    packed = x.new_empty((n if format >= 2 else (n + 1) // 2, 1), dtype=torch.uint8)
    return packed, x.new_empty(_blocks(n, block_size), dtype=torch.float32)


def _double_quantize(absmax: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    torch._check(
        absmax.dtype is torch.float32,
        lambda: f"nf4.double_quantize: absmax must be float32, got {absmax.dtype}",
    )
    n = absmax.numel()
    return (
        torch.empty_like(absmax, dtype=torch.uint8),
        absmax.new_empty(_blocks(n, 256)),
        absmax.new_empty(()),
    )


def _dequantize(
    packed: Tensor,
    absmax: Tensor,
    nested_absmax: Tensor | None,
    offset: Tensor | None,
    shape: Sequence[int],
    block_size: int,
    format: int,
    dtype: torch.dtype,
) -> Tensor:
    return packed.new_empty(tuple(shape), dtype=dtype)


def _dequantize_out(
    packed: Tensor,
    absmax: Tensor,
    nested_absmax: Tensor | None,
    offset: Tensor | None,
    block_size: int,
    format: int,
    out: Tensor,
) -> None:
    return None


def _linear(
    x: Tensor,
    packed: Tensor,
    absmax: Tensor,
    nested_absmax: Tensor | None,
    offset: Tensor | None,
    bias: Tensor | None,
    n: int,
    block_size: int,
    format: int,
) -> Tensor:
    _check_float("linear", "x", x)
    return x.new_empty((*x.shape[:-1], n))


def _linear_backward(
    grad_y: Tensor,
    packed: Tensor,
    absmax: Tensor,
    nested_absmax: Tensor | None,
    offset: Tensor | None,
    k: int,
    block_size: int,
    format: int,
) -> Tensor:
    _check_float("linear_backward", "grad_y", grad_y)
    return grad_y.new_empty((*grad_y.shape[:-1], k))


def _linear_lora(
    x: Tensor,
    packed: Tensor,
    absmax: Tensor,
    nested_absmax: Tensor | None,
    offset: Tensor | None,
    bias: Tensor | None,
    lora_a: Tensor,
    lora_b: Tensor,
    scaling: float,
    dropout_p: float,
    seed: Tensor | None,
    n: int,
    block_size: int,
    format: int,
) -> tuple[Tensor, Tensor]:
    _check_float("linear_lora", "x", x)
    _check_features("linear_lora", "x", x, lora_a.shape[1])
    s_dtype = torch.float64 if x.dtype is torch.float64 else torch.float32
    s = x.new_empty((*x.shape[:-1], lora_a.shape[0]), dtype=s_dtype)
    return x.new_empty((*x.shape[:-1], n)), s


def _linear_lora_backward(
    grad_y: Tensor,
    x: Tensor,
    s: Tensor,
    packed: Tensor,
    absmax: Tensor,
    nested_absmax: Tensor | None,
    offset: Tensor | None,
    lora_a: Tensor,
    lora_b: Tensor,
    scaling: float,
    dropout_p: float,
    seed: Tensor | None,
    block_size: int,
    format: int,
    needs_dx: bool,
    needs_dab: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    dx = x.new_empty(x.shape if needs_dx else (0,))
    da = lora_a.new_empty(lora_a.shape if needs_dab else (0,))
    db = lora_b.new_empty(lora_b.shape if needs_dab else (0,))
    return dx, da, db


def _linear_lora_group(
    x: Tensor,
    packed: list[Tensor],
    absmax: list[Tensor],
    nested_absmax: list[Tensor | None],
    offset: list[Tensor | None],
    bias: list[Tensor | None],
    lora_a: list[Tensor],
    lora_b: list[Tensor],
    scaling: list[float],
    dropout_p: float,
    seeds: Tensor | None,
    block_size: int,
    format: int,
) -> tuple[list[Tensor], list[Tensor]]:
    _check_float("linear_lora_group", "x", x)
    for a in lora_a:
        _check_features("linear_lora_group", "x", x, a.shape[1])
    s_dtype = torch.float64 if x.dtype is torch.float64 else torch.float32
    return (
        [x.new_empty((*x.shape[:-1], b.shape[0])) for b in lora_b],
        [x.new_empty((*x.shape[:-1], a.shape[0]), dtype=s_dtype) for a in lora_a],
    )


def _linear_lora_group_backward(
    grad_ys: list[Tensor],
    x: Tensor,
    ss: list[Tensor],
    packed: list[Tensor],
    absmax: list[Tensor],
    nested_absmax: list[Tensor | None],
    offset: list[Tensor | None],
    lora_a: list[Tensor],
    lora_b: list[Tensor],
    scaling: list[float],
    dropout_p: float,
    seeds: Tensor | None,
    block_size: int,
    format: int,
    needs_dx: bool,
    needs_dab: bool,
) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    return (
        x.new_empty(x.shape if needs_dx else (0,)),
        [a.new_empty(a.shape if needs_dab else (0,)) for a in lora_a],
        [b.new_empty(b.shape if needs_dab else (0,)) for b in lora_b],
    )


def _adamw_step(
    params: list[Tensor],
    grads: list[Tensor],
    state1: list[Tensor],
    state2: list[Tensor],
    absmax1: list[Tensor],
    absmax2: list[Tensor],
    hyper: Tensor,
    seed: Tensor | None,
    offsets: list[int],
    skipped: Tensor,
) -> None:
    for p in params:
        _check_float("adamw_step", "every parameter", p)


_FAKES: dict[str, Callable] = {
    "quantize": _quantize,
    "double_quantize": _double_quantize,
    "dequantize": _dequantize,
    "dequantize_out": _dequantize_out,
    "linear": _linear,
    "linear_backward": _linear_backward,
    "linear_lora": _linear_lora,
    "linear_lora_backward": _linear_lora_backward,
    "linear_lora_group": _linear_lora_group,
    "linear_lora_group_backward": _linear_lora_group_backward,
    "adamw_step": _adamw_step,
}


def _define() -> dict[str, torch.library.Library]:
    libraries = {}
    for namespace in NAMESPACES:
        library = torch.library.Library(namespace, "DEF")
        for name, schema in SCHEMAS.items():
            library.define(name + schema, tags=(torch.Tag.pt2_compliant_tag,))
            torch.library.register_fake(f"{namespace}::{name}", _FAKES[name], lib=library)
        libraries[namespace] = library
    return libraries


# Kept alive for the life of the process: a Library that is collected takes its ops with it.
LIBRARIES = _define()


def numel(shape: Sequence[int]) -> int:
    """Number of elements of a shape."""
    return math.prod(shape)
