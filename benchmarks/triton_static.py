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
from pathlib import Path
from typing import Any

import torch

from benchmarks import triton_static_loops as loops
from benchmarks.triton_static_plan import plan, source
from nf4.backends.triton_launch import Launch

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

# The configurations have no spill under this Triton. Under another one the compiler may still move
# two registers to memory and back, outside of loops.
TUNED_WITH = "3.9."
SPILLS_ELSEWHERE = 4

# Kernels without a loop, in which each element takes the same way.
ELEMENTWISE = ("quantize_kernel", "dequantize_kernel")

RESULTS = Path(__file__).parent / "results" / "triton_static.csv"


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
    loop_instructions: int  # of the innermost loop with the matrix instructions, or of all code
    instructions_per_weight: float  # those, times threads, over the weights that they handle


def _tool(name: str) -> str:
    import triton

    return str(Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name)


def _weights(launch: Launch) -> int:
    """Of one step of a matmul's loop, or of a program that has no loop."""
    a = launch.args
    if launch.kernel.fn.__name__ in ELEMENTWISE:
        return a["BLOCK_SIZE"] * a["BLOCKS"]
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
    return triton.compile(source(launch), target=GPUTarget("cuda", arch, 32), options=options)


def measure(case: str, launch: Launch, arch: int) -> Row:
    """Compile one launch for one architecture and read its machine code."""
    import triton

    kernel = compiled(launch, arch)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        usage = _run(_tool("cuobjdump"), "--dump-resource-usage", file.name)
        code = loops.instructions(_run(_tool("cuobjdump"), "-sass", file.name))
    texts = [t for _, t in code if t != "NOP"]
    matrix = sorted({m.group(0) for t in texts if (m := re.search(r"\w*(?:HMMA|HGMMA)\b", t))})
    wide = r"\b(?:LDG|STG|LDGSTS)\b\S*\.(?:128|256)"
    loop = texts if launch.kernel.fn.__name__ in ELEMENTWISE else loops.matrix_loop(code)
    weights = _weights(launch)
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
    if row.kernel in ELEMENTWISE and sixteen_bit and row.wide_accesses == 0:
        found.append("no 16-byte access to global memory")
    return found


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
