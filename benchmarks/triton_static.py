"""Resource table of the Triton kernels, compiled ahead of time: needs no GPU.

The launchers of nf4.backends.triton run on meta tensors while launches are recorded, so that what
compiled here is what they would launch for those shapes on that device. Registers, shared memory,
spills, access widths and tensor-core instructions are then read from the machine code. Nothing in
the table is a time.

    python benchmarks/triton_static.py [--all] [--csv benchmarks/results/triton_static.csv]
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

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
# One common device of each architecture: the launchers plan grids by its number of SMs.
SM_COUNT = {75: 40, 80: 108, 86: 84, 89: 128, 90: 132, 100: 148, 120: 170}


@dataclass(frozen=True)
class Row:
    """One kernel on one architecture. Instruction counts are static, over the machine code."""

    case: str
    kernel: str
    arch: int
    config: str
    registers: int
    spills: int  # instructions on local memory
    shared: int  # bytes
    wide_accesses: int  # 16-byte instructions on global memory, copies to shared included
    tensor_core: str  # HMMA, HGMMA, UTCHMMA or nothing
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
            if value % 16 == 0:
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
    return " ".join([*sizes, f"warps{launch.num_warps}", f"stages{launch.num_stages}"])


def measure(case: str, launch: Launch, arch: int) -> Row:
    """Compile one launch for one architecture and read its machine code."""
    import triton
    from triton.backends.compiler import GPUTarget

    compiled = triton.compile(
        _source(launch),
        target=GPUTarget("cuda", arch, 32),
        options={
            "num_warps": launch.num_warps,
            "num_stages": launch.num_stages,
            "enable_fp_fusion": not launch.exact,
        },
    )
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        usage = _run(_tool("cuobjdump"), "--dump-resource-usage", file.name)
        sass = _run(_tool("cuobjdump"), "-sass", file.name)
    instructions = _instructions(sass)
    texts = [t for _, t in instructions]
    matrix = sorted({m.group(0) for t in texts if (m := re.search(r"\w*(?:HMMA|HGMMA)\b", t))})
    loop = _matrix_loop(instructions)
    weights = _weights_a_step(launch)
    registers = re.search(r"REG:(\d+)", usage)
    assert registers is not None, usage
    return Row(
        case=case,
        kernel=launch.kernel.fn.__name__,
        arch=arch,
        config=_config(launch),
        registers=int(registers.group(1)),
        spills=sum(bool(re.search(r"\b(?:STL|LDL)\b", t)) for t in texts),
        shared=compiled.metadata.shared,
        wide_accesses=sum(bool(re.search(r"\b(?:LDG|STG|LDGSTS)\b\S*\.128", t)) for t in texts),
        tensor_core=" ".join(matrix),
        loop_instructions=len(loop),
        instructions_per_weight=round(len(loop) * launch.num_warps * 32 / weights, 2)
        if weights and loop
        else 0.0,
    )


def _run(*command: str) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout
