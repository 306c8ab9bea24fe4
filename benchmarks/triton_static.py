"""Resource table of the Triton kernels, compiled ahead of time: needs no GPU.

The launchers of nf4.backends.triton run on meta tensors while launches are recorded, so that what
is compiled here is what they would launch for those shapes on that device. Registers, shared
memory, spills, access widths and matrix instructions are then read from the machine code. Bytes
and flops are counted from the shapes. Nothing in the table is a time.

    python -m benchmarks.triton_static [--all] [--arch 90 ...] [--csv FILE]
"""

from __future__ import annotations

import argparse
import csv
import multiprocessing
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, fields
from functools import cache
from pathlib import Path
from typing import Any

import torch

from nf4.backends import triton as ops
from nf4.backends.triton_launch import Launch, recording
from nf4.backends.tuning import Target

# Shared memory that one program can have, in bytes (CUDA C++ Programming Guide, "Technical
# Specifications per Compute Capability"); compilation ahead of time does not check it.
SHARED_LIMIT = {
    75: 64 * 1024,
    80: 163 * 1024,
    86: 99 * 1024,
    89: 99 * 1024,
    90: 227 * 1024,
    100: 227 * 1024,
    120: 99 * 1024,
}
# One common device of each architecture: the launchers plan grids by its number of SMs.
SM_COUNT = {75: 40, 80: 108, 86: 84, 89: 128, 90: 132, 100: 148, 120: 170}


# The configurations have no spill under this Triton. Under another one the compiler may still move
# two registers to memory and back, outside of loops.
TUNED_WITH = "3.9."
SPILLS_ELSEWHERE = 4

RESULTS = Path(__file__).parent / "results" / "triton_static.csv"
DIM = 4096  # N and K of the default cases
RANK = 16


@dataclass(frozen=True)
class Row:
    """One kernel on one architecture. Instruction counts are static, over the machine code."""

    case: str
    kernel: str
    arch: int
    config: str
    triton: str
    bytes: int  # that the kernel must move to and from memory, each tensor once
    flops: int  # multiplications and additions of its matrix products
    registers: int
    spills: int  # instructions on local memory
    shared: int  # bytes
    wide_accesses: int  # 16-byte instructions on global memory, copies to shared included
    tensor_core: str  # HMMA, HGMMA, UTCHMMA or nothing
    fused_multiply_adds: int
    loop_instructions: int  # of the innermost loop with the matrix instructions
    instructions_per_weight: float  # those, times threads, over the weights of a step


def _tool(name: str) -> str:
    import triton

    return str(Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name)


_TYPES = {
    torch.float32: "*fp32",
    torch.float64: "*fp64",
    torch.float16: "*fp16",
    torch.bfloat16: "*bf16",
    torch.uint8: "*u8",
    torch.int64: "*i64",
    torch.int32: "*i32",
}


def _source(launch: Launch) -> Any:
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


def _instructions(sass: str) -> list[tuple[int, str]]:
    """(address, text) of every instruction."""
    found = re.findall(r"/\*([0-9a-f]{4,})\*/\s+(.*?);", sass)
    return [(int(address, 16), text.strip()) for address, text in found]


def _matrix_loop(instructions: list[tuple[int, str]]) -> list[str]:
    """Body of the innermost loop with the most matrix instructions, or nothing."""
    best: list[str] = []
    for address, text in instructions:
        target = re.search(r"\bBRA\S*\s.*?(0x[0-9a-f]+)", text)
        if not target or int(target.group(1), 16) >= address:
            continue
        start = int(target.group(1), 16)
        body = [t for a, t in instructions if start <= a <= address]
        count = sum("MMA" in t for t in body)
        best_count = sum("MMA" in t for t in best)
        if count > best_count or (count and count == best_count and len(body) < len(best)):
            best = body
    return best


def _weights_a_step(launch: Launch) -> int:
    a = launch.args
    return a["BLOCK_N"] * a["BLOCK_K"] if "CODES" in a and "BLOCK_K" in a else 0


def _config(launch: Launch) -> str:
    sizes = [f"{k.removeprefix('BLOCK_')}{v}" for k, v in launch.args.items() if k[:6] == "BLOCK_"]
    sizes += [f"split{v}" for k, v in launch.args.items() if k in ("SPLIT", "SLICES")]
    return " ".join([*sizes, f"warps{launch.num_warps}", f"stages{launch.num_stages}"])


def _cost(launch: Launch) -> tuple[int, int]:
    """Bytes of every tensor of a launch, each once, and flops of its matrix products."""
    a = launch.args
    # Tables stay in cache, and a placeholder is named twice.
    tensors = {
        id(t): t.numel() * t.element_size()
        for name, t in a.items()
        if isinstance(t, torch.Tensor) and name not in ("map_ptr", "table_ptr", "threshold_ptr")
    }
    m, n, k = a.get("M", 0), a.get("N", 0), a.get("K", 0)
    r = a["R"] if a.get("b_ptr") is not None or a.get("a_ptr") is not None or "u_ptr" in a else 0
    flops = {
        "linear_kernel": 2 * m * n * (k + r),
        "linear_backward_kernel": 2 * m * k * (n + r),
        "dense_lora_kernel": 2 * m * n * (k + a.get("R", 0)),
        "lora_down_kernel": 2 * m * k * a.get("R", 0),
        "lora_grad_y_kernel": (4 if a.get("s_ptr") is not None else 2) * m * n * a.get("R", 0),
        "lora_grad_a_kernel": 2 * m * k * a.get("R", 0),
    }
    return sum(tensors.values()), flops.get(launch.kernel.fn.__name__, 0)


def compiled(launch: Launch, arch: int, fuse: bool | None = None) -> Any:
    """What Triton makes of a launch; ``fuse`` overrides the launch's floating-point fusion."""
    import triton
    from triton.backends.compiler import GPUTarget

    options = {
        "num_warps": launch.num_warps,
        "num_stages": launch.num_stages,
        "enable_fp_fusion": not launch.exact if fuse is None else fuse,
    }
    return triton.compile(_source(launch), target=GPUTarget("cuda", arch, 32), options=options)


def measure(case: str, launch: Launch, arch: int) -> Row:
    """Compile one launch for one architecture and read its machine code."""
    import triton

    kernel = compiled(launch, arch)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        usage = _run(_tool("cuobjdump"), "--dump-resource-usage", file.name)
        sass = _run(_tool("cuobjdump"), "-sass", file.name)
    instructions = _instructions(sass)
    texts = [t for _, t in instructions]
    matrix = sorted({m.group(0) for t in texts if (m := re.search(r"\w*(?:HMMA|HGMMA)\b", t))})
    wide = r"\b(?:LDG|STG|LDGSTS)\b\S*\.(?:128|256)"
    loop = _matrix_loop(instructions)
    weights = _weights_a_step(launch)
    registers = re.search(r"REG:(\d+)", usage)
    assert registers is not None, usage
    moved, flops = _cost(launch)
    return Row(
        case=case,
        kernel=launch.kernel.fn.__name__,
        arch=arch,
        config=_config(launch),
        triton=triton.__version__,
        bytes=moved,
        flops=flops,
        registers=int(registers.group(1)),
        spills=sum(bool(re.search(r"\b(?:STL|LDL)\b", t)) for t in texts),
        shared=kernel.metadata.shared,
        wide_accesses=sum(bool(re.search(wide, t)) for t in texts),
        tensor_core=" ".join(matrix),
        fused_multiply_adds=sum(bool(re.search(r"\b[FD]FMA\b", t)) for t in texts),
        loop_instructions=len(loop),
        instructions_per_weight=round(len(loop) * launch.num_warps * 32 / weights, 2)
        if weights and loop
        else 0.0,
    )


def _run(*command: str) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def allowed_spills(row: Row) -> int:
    """Instructions on local memory that are no problem."""
    return 0 if row.triton.startswith(TUNED_WITH) else SPILLS_ELSEWHERE


def problems(row: Row, launch: Launch) -> list[str]:
    """What is wrong with a kernel, each in words."""
    found = []
    if row.spills > allowed_spills(row):
        found.append(f"{row.spills} instructions spill registers")
    if row.shared > SHARED_LIMIT[row.arch]:
        found.append(f"{row.shared} bytes of shared memory, {SHARED_LIMIT[row.arch]} exist")
    meant = "DTYPE" in launch.args and launch.args["PRECISION"] is None and row.arch >= 80
    if meant and not row.tensor_core:
        found.append("no matrix instruction where one is meant")
    sixteen_bit = any(
        isinstance(t, torch.Tensor) and t.dtype in (torch.float16, torch.bfloat16)
        for t in launch.args.values()
    )
    if row.kernel == "dequantize_kernel" and row.fused_multiply_adds:
        found.append(f"{row.fused_multiply_adds} fused multiply-adds change its rounding")
    elementwise = row.kernel in ("quantize_kernel", "dequantize_kernel")
    if elementwise and sixteen_bit and row.wide_accesses == 0:
        found.append("no 16-byte access to global memory")
    return found


def _weight(dtype: torch.dtype, n: int, k: int, block_size: int, format: int) -> tuple:
    w = torch.empty(n, k, dtype=dtype, device="meta")
    packed, absmax = ops.quantize(w, block_size, format)
    return packed, *ops.double_quantize(absmax)


def _lora_case(
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


def _group_case(dtype: torch.dtype, m: int, p: float, ranks: tuple[int, ...]) -> None:
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
    cases: dict[str, tuple[Any, ...]] = {"M=1": (dtype, 1, 0.0), "M=2048": (dtype, 2048, 0.05)}
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
            (_group_case if case in groups else _lora_case)(*arguments)
        for launch in launches:
            name = launch.kernel.fn.__name__
            # The specialized source holds everything that compilation depends on.
            key = f"{_source(launch).hash()} {launch.num_warps} {launch.num_stages}"
            found.setdefault(key if everything else name, (case, launch))
    return list(found.values())


def _one(task: tuple[int, bool, int]) -> tuple[Row, list[str]]:
    arch, everything, index = task
    case, launch = plan(arch, everything)[index]
    row = measure(case, launch, arch)
    return row, problems(row, launch)


def rows(
    everything: bool = False, archs: Iterable[int] = tuple(SHARED_LIMIT)
) -> Iterator[tuple[Row, list[str]]]:
    """Compile and read every planned kernel, on as many processes as it has CPUs."""
    tasks = [
        (arch, everything, index) for arch in archs for index in range(len(plan(arch, everything)))
    ]
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(len(os.sched_getaffinity(0)), mp_context=context) as pool:
        yield from pool.map(_one, tasks, chunksize=4)


def read_results() -> dict[tuple[str, str, int], Row]:
    """The committed table by case, kernel and architecture: the first launch of each."""
    table: dict[tuple[str, str, int], Row] = {}
    with RESULTS.open(newline="") as file:
        for line in csv.DictReader(file):
            row = Row(**{f.name: _parse(f.type, line[f.name]) for f in fields(Row)})
            table.setdefault((row.case, row.kernel, row.arch), row)
    return table


def _parse(type_name: Any, text: str) -> Any:
    return {"int": int, "float": float, "str": str}[type_name](text)


def regressions(row: Row, before: Row) -> list[str]:
    """What got worse than the committed table, under the same Triton."""
    if row.triton != before.triton:
        return []
    found = []
    if row.spills > before.spills:
        found.append(f"spills {row.spills}, were {before.spills}")
    if before.tensor_core and not row.tensor_core:
        found.append(f"{before.tensor_core} is gone")
    if row.instructions_per_weight > 1.1 * before.instructions_per_weight:
        was = before.instructions_per_weight
        found.append(f"{row.instructions_per_weight} instructions a weight, were {was}")
    if row.wide_accesses < before.wide_accesses // 2:
        found.append(f"{row.wide_accesses} wide accesses, were {before.wide_accesses}")
    return found


def table_line(row: Row) -> str:
    """One row for people."""
    return (
        f"sm_{row.arch:<4}{row.kernel:<24}{row.case:<24}{row.config:<44}"
        f"{row.registers:>4} regs {row.spills:>3} spills {row.shared:>7} B shared "
        f"{row.wide_accesses:>3} wide {row.tensor_core:<8} {row.instructions_per_weight:>6} /weight"
    )


def main() -> int:
    """Print the table; nonzero where a kernel has a problem."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--all", action="store_true", help="every configuration, not one a kernel")
    parser.add_argument("--csv", type=Path, help="also write the table there")
    parser.add_argument("--arch", type=int, nargs="*", default=list(SHARED_LIMIT))
    arguments = parser.parse_args()
    failed, table = 0, []
    for row, found in rows(arguments.all, arguments.arch):
        print(table_line(row), *(f"<- {p}" for p in found), flush=True)
        failed += bool(found)
        table.append(row)
    if arguments.csv:
        arguments.csv.parent.mkdir(parents=True, exist_ok=True)
        with arguments.csv.open("w", newline="") as file:
            writer = csv.DictWriter(file, [f.name for f in fields(Row)], lineterminator="\n")
            writer.writeheader()
            writer.writerows(asdict(row) for row in table)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
