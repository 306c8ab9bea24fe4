"""The functions that users call: argument checks, then ``QuantizedTensor`` to op calls."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from nf4 import autograd, backends
from nf4.formats import BLOCK_SIZES, DYNAMIC8, FORMATS, NESTED_BLOCK_SIZE, WEIGHT_FORMATS
from nf4.tensor import QuantizedTensor

_FLOATS = (torch.float32, torch.float16, torch.bfloat16)


def quantize(
    weight: Tensor,
    block_size: int = 64,
    double_quant: bool = True,
    format: str = "nf4",
) -> QuantizedTensor:
    """Quantize a float32, float16 or bfloat16 tensor of any shape, blockwise.

    ``format`` is "nf4" (QLoRA, arXiv:2305.14314), "fp4" or "dynamic8" (8-bit dynamic map,
    arXiv:1511.04561); ``double_quant`` quantizes the scales to 8 bits as well (QLoRA, section 3).
    The result equals bitsandbytes' CPU bytes; ``nf4.formats`` states the rule. Allocates the result
    only. Raises ValueError for a block size or format that does not exist and for NaN or infinite
    elements (naming the first one's position), TypeError for other dtypes.
    """
    if format not in WEIGHT_FORMATS:
        raise ValueError(
            f"nf4.quantize: format must be one of {', '.join(WEIGHT_FORMATS)}, got {format!r}"
        )
    if block_size not in BLOCK_SIZES:
        raise ValueError(
            f"nf4.quantize: block_size must be one of {', '.join(map(str, BLOCK_SIZES))}, "
            f"got {block_size}"
        )
    if weight.dtype not in _FLOATS:
        raise TypeError(
            f"nf4.quantize: weight must be float32, float16 or bfloat16, got {weight.dtype}"
        )
    ops = getattr(torch.ops, backends.namespace())
    weight = weight.detach()
    packed, absmax = ops.quantize(weight, block_size, FORMATS[format].id)
    nested_absmax = offset = None
    if double_quant:
        absmax, nested_absmax, offset = ops.double_quantize(absmax)
    check_finite("nf4.quantize", weight, absmax if offset is None else offset)
    return QuantizedTensor(
        packed, absmax, nested_absmax, offset, weight.shape, weight.dtype, block_size, format
    )


def check_finite(what: str, weight: Tensor, scales: Tensor) -> None:
    """Raise ValueError, naming the position, if ``weight`` holds a NaN or an infinity.

    Reads only ``scales``, the absmax or the offset: a block's absmax is NaN or infinite if an
    element is (``nf4.formats``), and so is the offset, their mean, which no finite absmax makes
    so. The weight is searched just to report the place.
    """
    if weight.is_meta or scales.numel() == 0:
        return
    largest = scales if scales.dim() == 0 else scales.amax()  # NaN if one is
    if math.isfinite(largest.item()):
        return
    finite = torch.isfinite(weight)
    index = (~finite).nonzero()[0].tolist()
    count = int((~finite).sum())
    raise ValueError(
        f"{what}: weight must be finite, got {weight[tuple(index)].item()} at index {index} "
        f"({count} such elements in shape {list(weight.shape)})"
    )


def dequantize(
    q: QuantizedTensor, dtype: torch.dtype | None = None, *, out: Tensor | None = None
) -> Tensor:
    """The values of ``q`` in ``q.shape``.

    ``dtype``: float32, float16 or bfloat16; None is the dtype that was quantized. With ``out`` (a
    contiguous tensor of that shape) nothing is allocated and ``out`` is returned.
    """
    ops = getattr(torch.ops, backends.namespace())
    if out is None:
        dtype = dtype or q.dtype
        if dtype not in _FLOATS:
            raise TypeError(
                f"nf4.dequantize: dtype must be float32, float16 or bfloat16, got {dtype}"
            )
        return ops.dequantize(*q.tensors, list(q.shape), *q.layout, dtype)
    if out.shape != q.shape or not out.is_contiguous() or out.dtype not in _FLOATS:
        raise ValueError(
            f"nf4.dequantize: out must be contiguous float32, float16 or bfloat16 of shape "
            f"{list(q.shape)}, got {out.dtype} {list(out.shape)} with strides {out.stride()}"
        )
    if dtype is not None and out.dtype is not dtype:
        raise ValueError(f"nf4.dequantize: out must have dtype {dtype}, got {out.dtype}")
    if out.device != q.device:
        raise ValueError(f"nf4.dequantize: out must be on {q.device}, got {out.device}")
    ops.dequantize_out(*q.tensors, *q.layout, out)
    return out


def scales(q: QuantizedTensor) -> Tensor:
    """The float32 scale of each block, ``[blocks]``, decoded if double quantized."""
    if q.nested_absmax is None or q.offset is None:
        return q.absmax
    codes = QuantizedTensor(
        q.absmax.view(-1, 1),
        q.nested_absmax,
        None,
        None,
        q.absmax.shape,
        torch.float32,
        NESTED_BLOCK_SIZE,
        DYNAMIC8.name,
    )
    return dequantize(codes) + q.offset


def _prepare_x(op: str, x: Tensor, q: QuantizedTensor) -> Tensor:
    """Check x against q, and cast it as autocast casts the input of nn.Linear."""
    if len(q.shape) != 2:
        raise ValueError(f"{op}: q must be a matrix [N, K], got shape {list(q.shape)}")
    if x.dim() == 0 or x.shape[-1] != q.shape[1]:
        got = x.shape[-1] if x.dim() else "a scalar"
        raise ValueError(
            f"{op}: x must have {q.shape[1]} features (q is {list(q.shape)}), got {got}"
        )
    if x.device != q.device:
        raise ValueError(f"{op}: x must be on {q.device} like q, got {x.device}")
    if not x.is_floating_point():
        raise TypeError(f"{op}: x must be a floating-point tensor, got {x.dtype}")
    kind = x.device.type
    # The meta device has no autocast, not even to ask for.
    if kind != "meta" and torch.is_autocast_enabled(kind) and x.dtype is not torch.float64:
        x = x.to(torch.get_autocast_dtype(kind))
    return x


def _prepare_bias(op: str, bias: Tensor | None, n: int, x: Tensor) -> Tensor | None:
    if bias is None:
        return None
    if bias.shape != (n,):
        raise ValueError(f"{op}: bias must have shape [{n}], got {list(bias.shape)}")
    if bias.device != x.device:
        raise ValueError(f"{op}: bias must be on {x.device} like x, got {bias.device}")
    return bias if bias.dtype is x.dtype else bias.to(x.dtype)


def _check_adapter(op: str, x: Tensor, q: QuantizedTensor, lora_a: Tensor, lora_b: Tensor) -> None:
    n, k = q.shape
    if lora_a.dim() != 2 or lora_a.shape[1] != k:
        raise ValueError(f"{op}: lora_a must have shape [r, {k}], got {list(lora_a.shape)}")
    r = lora_a.shape[0]
    if lora_b.shape != (n, r):
        raise ValueError(f"{op}: lora_b must have shape [{n}, {r}], got {list(lora_b.shape)}")
    if lora_a.dtype is not lora_b.dtype:
        raise TypeError(
            f"{op}: lora_a and lora_b must have one dtype, got {lora_a.dtype} and {lora_b.dtype}"
        )
    if not lora_a.is_floating_point():
        raise TypeError(f"{op}: lora_a must be a floating-point tensor, got {lora_a.dtype}")
    if lora_a.device != x.device or lora_b.device != x.device:
        raise ValueError(
            f"{op}: lora_a and lora_b must be on {x.device} like x, "
            f"got {lora_a.device} and {lora_b.device}"
        )


def _check_dropout(op: str, dropout_p: float) -> None:
    if not 0.0 <= dropout_p < 1.0:
        raise ValueError(f"{op}: dropout_p must be in [0, 1), got {dropout_p}")


def _prepare_seed(
    op: str, name: str, seed: Tensor | None, count: int, dropout_p: float, device: torch.device
) -> Tensor | None:
    """The seeds of ``count`` dropout masks: drawn where none is given, None without dropout."""
    if dropout_p == 0.0:
        return None
    if seed is None:
        return torch.randint(2**63 - 1, (count,), device=device)
    if seed.dtype is not torch.int64 or seed.shape != (count,) or seed.device != device:
        raise ValueError(
            f"{op}: {name} must be int64 [{count}] on {device}, "
            f"got {seed.dtype} {list(seed.shape)} on {seed.device}"
        )
    return seed


def _records_grad(*tensors: Tensor | None) -> bool:
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)


def linear(x: Tensor, q: QuantizedTensor, bias: Tensor | None = None) -> Tensor:
    """``y = x W^T + bias`` with W the quantized q ``[N, K]``: x ``[..., K]``, y ``[..., N]``.

    x is float32, float16 or bfloat16 (float64 on the reference backend), cast first under autocast
    as ``nn.Linear``'s; y has its dtype. Accumulates in float32. Differentiable in x and bias.
    W is never materialised by the native kernels.
    """
    x = _prepare_x("nf4.linear", x, q)
    n = q.shape[0]
    bias = _prepare_bias("nf4.linear", bias, n, x)
    namespace = backends.namespace()
    if _records_grad(x, bias):
        return autograd.Linear.apply(x, *q.tensors, bias, n, *q.layout, namespace)
    return getattr(torch.ops, namespace).linear(x, *q.tensors, bias, n, *q.layout)


def linear_lora(
    x: Tensor,
    q: QuantizedTensor,
    lora_a: Tensor,
    lora_b: Tensor,
    scaling: float,
    bias: Tensor | None = None,
    dropout_p: float = 0.0,
    *,
    training: bool = True,
    seed: Tensor | None = None,
) -> Tensor:
    """``y = x W^T + bias + scaling * dropout(x) A^T B^T`` (LoRA, arXiv:2106.09685, eq. 3).

    x ``[..., K]``, q ``[N, K]``, lora_a ``[r, K]``, lora_b ``[N, r]``, y ``[..., N]`` in x's dtype.
    The adapters may be float32 beside 16-bit x; their gradients have their dtype. Dropout applies
    to the adapter's input only, with probability ``dropout_p`` and only when ``training``; ``seed``
    (int64 ``[1]`` on x's device; None draws one) fixes the mask, which no backend stores.
    Differentiable in x, lora_a, lora_b and bias. Raises ValueError for sizes that do not fit.
    """
    op = "nf4.linear_lora"
    x = _prepare_x(op, x, q)
    n = q.shape[0]
    _check_adapter(op, x, q, lora_a, lora_b)
    _check_dropout(op, dropout_p)
    bias = _prepare_bias(op, bias, n, x)
    if not training:
        dropout_p = 0.0
    seed = _prepare_seed(op, "seed", seed, 1, dropout_p, x.device)
    namespace = backends.namespace()
    lora = (lora_a, lora_b, float(scaling), dropout_p, seed)
    if _records_grad(x, lora_a, lora_b, bias):
        return autograd.LinearLora.apply(x, *q.tensors, bias, *lora, n, *q.layout, namespace)
    y, _ = getattr(torch.ops, namespace).linear_lora(x, *q.tensors, bias, *lora, n, *q.layout)
    return y


def linear_lora_group(
    x: Tensor,
    qs: Sequence[QuantizedTensor],
    lora_as: Sequence[Tensor],
    lora_bs: Sequence[Tensor],
    scalings: Sequence[float],
    biases: Sequence[Tensor | None] | None = None,
    dropout_p: float = 0.0,
    *,
    training: bool = True,
    seeds: Tensor | None = None,
) -> list[Tensor]:
    """``linear_lora`` for several weights that share x (q/k/v, gate/up): the y of each, in order.

    One call reads x once: x ``[..., K]``, qs[i] ``[N_i, K]``, lora_as[i] ``[r_i, K]``, lora_bs[i]
    ``[N_i, r_i]``, biases[i] ``[N_i]`` or None, ys[i] ``[..., N_i]`` in x's dtype. N and r may
    differ; block size, format and the adapters' dtype must not. Every member has a dropout mask of
    its own, that of ``linear_lora(..., seed=seeds[i : i + 1])``; ``seeds`` is int64 ``[members]``
    on x's device, None draws them. Differentiable in x and in every adapter and bias; on the
    reference and cpu backends all results equal those of separate calls bit for bit. Raises
    ValueError or TypeError for what does not fit, naming the member.
    """
    op = "nf4.linear_lora_group"
    members = len(qs)
    biases = [None] * members if biases is None else biases
    if members == 0 or {len(lora_as), len(lora_bs), len(scalings), len(biases)} != {members}:
        raise ValueError(
            f"{op}: qs, lora_as, lora_bs, scalings and biases must have one length of at least 1, "
            f"got {members}, {len(lora_as)}, {len(lora_bs)}, {len(scalings)} and {len(biases)}"
        )
    _check_dropout(op, dropout_p)
    added: list[Tensor | None] = []
    given = x
    for i, (q, a, b) in enumerate(zip(qs, lora_as, lora_bs, strict=True)):
        where = f"{op}: member {i}"
        x = _prepare_x(where, given, q)
        _check_adapter(where, x, q, a, b)
        added.append(_prepare_bias(where, biases[i], q.shape[0], x))
        if (q.block_size, q.format) != (qs[0].block_size, qs[0].format):
            raise ValueError(
                f"{where} must have block size {qs[0].block_size} and format {qs[0].format!r} like "
                f"member 0, got {q.block_size} and {q.format!r}"
            )
        if a.dtype is not lora_as[0].dtype:
            raise TypeError(
                f"{where} must have adapters of {lora_as[0].dtype} like member 0, got {a.dtype}"
            )
    if not training:
        dropout_p = 0.0
    seeds = _prepare_seed(op, "seeds", seeds, members, dropout_p, x.device)
    namespace, layout = backends.namespace(), qs[0].layout
    scales = tuple(float(scaling) for scaling in scalings)
    if _records_grad(x, *lora_as, *lora_bs, *added):
        tensors = zip((q.tensors for q in qs), added, lora_as, lora_bs, strict=True)
        flat = [t for weight, *rest in tensors for t in (*weight, *rest)]
        ys = autograd.LinearLoraGroup.apply(x, seeds, scales, dropout_p, *layout, namespace, *flat)
        return list(ys)
    weights = [list(parts) for parts in zip(*(q.tensors for q in qs), strict=True)]
    lora = (list(lora_as), list(lora_bs), list(scales), dropout_p, seeds)
    ys, _ = getattr(torch.ops, namespace).linear_lora_group(x, *weights, added, *lora, *layout)
    return list(ys)
