"""What benchmarks.triton_static compiles: the launches of every op, recorded without a GPU."""

from __future__ import annotations

from functools import cache
from typing import Any

import torch

from nf4.backends import triton as ops
from nf4.backends.triton_launch import Launch, recording
from nf4.backends.tuning import Target

# One common device of each architecture: the launchers plan grids by its number of SMs.
SM_COUNT = {75: 40, 80: 108, 86: 84, 89: 128, 90: 132, 100: 148, 120: 170}

DIM = 4096  # N and K of the default cases
RANK = 16

_TYPES = {
    torch.float32: "*fp32",
    torch.float64: "*fp64",
    torch.float16: "*fp16",
    torch.bfloat16: "*bf16",
    torch.uint8: "*u8",
    torch.int64: "*i64",
    torch.int32: "*i32",
}


def source(launch: Launch) -> Any:
    """The specialized source that the just-in-time launch would compile."""
    from triton.compiler import ASTSource

    signature, constexprs, attrs = {}, {}, {}
    for i, param in enumerate(launch.kernel.params):
        value = launch.args[param.name]
        if isinstance(value, torch.Tensor):
            signature[param.name] = _TYPES[value.dtype]
            attrs[(i,)] = [["tt.divisibility", 16]]
        elif param.is_constexpr or value is None or (isinstance(value, int) and value == 1):
            signature[param.name] = "constexpr"
            constexprs[param.name] = value
        elif isinstance(value, int):
            signature[param.name] = "i32" if abs(value) < 2**31 else "i64"
            if value % 16 == 0 and not param.do_not_specialize_on_alignment:
                attrs[(i,)] = [["tt.divisibility", 16]]
        else:
            signature[param.name] = "fp32"
    return ASTSource(launch.kernel, signature, constexprs, attrs)


def _weight(dtype: torch.dtype, n: int, k: int, block_size: int, format: int) -> tuple:
    w = torch.empty(n, k, dtype=dtype, device="meta")
    packed, absmax = ops.quantize(w, block_size, format)
    return packed, *ops.double_quantize(absmax)


def lora_case(
    dtype: torch.dtype,
    m: int,
    p: float,
    k: int = DIM,
    block_size: int = 64,
    format: int = 0,
    r: int = RANK,
) -> None:
    """Every op of a LoRA layer, with float32 adapters as PEFT keeps them."""
    weight = _weight(dtype, DIM, k, block_size, format)
    x = torch.empty(m, k, dtype=dtype, device="meta")
    a, b = torch.empty(r, k, device="meta"), torch.empty(DIM, r, device="meta")
    seed = torch.empty(1, dtype=torch.int64, device="meta")
    grad_y = torch.empty(m, DIM, dtype=dtype, device="meta")
    layout = (block_size, format)
    ops.dequantize(*weight, [DIM, k], *layout, dtype)
    ops.linear(x, *weight, None, DIM, *layout)
    ops.linear_backward(grad_y, *weight, k, *layout)
    _, s = ops.linear_lora(x, *weight, None, a, b, 2.0, p, seed, DIM, *layout)
    ops.linear_lora_backward(grad_y, x, s, *weight, a, b, 2.0, p, seed, *layout, True, True)


def group_case(dtype: torch.dtype, m: int, p: float, ranks: tuple[int, ...]) -> None:
    """Forward and backward of layers that share x."""
    layout, count = (64, 0), len(ranks)
    parts = zip(*(_weight(dtype, DIM, DIM, *layout) for _ in ranks), strict=True)
    weights = tuple(list(part) for part in parts)
    x = torch.empty(m, DIM, dtype=dtype, device="meta")
    a = [torch.empty(r, DIM, device="meta") for r in ranks]
    b = [torch.empty(DIM, r, device="meta") for r in ranks]
    seeds = torch.empty(count, dtype=torch.int64, device="meta")
    lora = (a, b, [2.0] * count, p, seeds)
    grad_ys = [torch.empty(m, DIM, dtype=dtype, device="meta")] * count
    _, ss = ops.linear_lora_group(x, *weights, [None] * count, *lora, *layout)
    ops.linear_lora_group_backward(grad_ys, x, ss, *weights, *lora, *layout, True, True)


@cache
def plan(arch: int, everything: bool) -> list[tuple[str, Launch]]:
    """The launches to compile for an architecture: one a kernel, or all that differ."""
    dtype = torch.bfloat16 if arch >= 80 else torch.float16
    cases: dict[str, tuple[Any, ...]] = {
        "M=1": (dtype, 1, 0.0),
        "M=8": (dtype, 8, 0.0),
        "M=2048": (dtype, 2048, 0.05),
    }
    groups: dict[str, tuple[Any, ...]] = {}
    if everything:
        dtypes = (torch.float16, torch.bfloat16, torch.float32)
        for kind in dtypes if arch >= 80 else (torch.float16, torch.float32):
            name = str(kind).removeprefix("torch.")
            for m in (1, 8, 16, 32, 64, 256, 2048):
                cases[f"{name} M={m}"] = (kind, m, 0.05)
            cases[f"{name} M=16 block 32"] = (kind, 16, 0.0, DIM, 32)
            cases[f"{name} M=16 block 4096"] = (kind, 16, 0.0, DIM, 4096)
            cases[f"{name} M=64 fp4"] = (kind, 64, 0.0, DIM, 64, 1)
            cases[f"{name} M=64 dynamic8"] = (kind, 64, 0.0, DIM, 64, 2)
            cases[f"{name} M=5 K=3421"] = (kind, 5, 0.05, 3421)
            for m in (16, 2048):
                cases[f"{name} M={m} rank 64"] = (kind, m, 0.05, DIM, 64, 0, 64)
                groups[f"{name} M={m} group"] = (kind, m, 0.0, (RANK,) * 3)
                groups[f"{name} M={m} group, dropout"] = (kind, m, 0.05, (RANK,) * 3)
    found: dict[str, tuple[str, Launch]] = {}
    for case, arguments in [*cases.items(), *groups.items()]:
        with recording(Target(arch, SM_COUNT[arch])) as launches:
            (group_case if case in groups else lora_case)(*arguments)
        for launch in launches:
            name = launch.kernel.fn.__name__
            # The specialized source holds everything that compilation depends on.
            key = f"{source(launch).hash()} {launch.num_warps} {launch.num_stages}"
            found.setdefault(key if everything else name, (case, launch))
    return list(found.values())
