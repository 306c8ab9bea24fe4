"""What the compiler made of the CUDA kernels: registers, spills, access widths, issue slots.

    python -m benchmarks.cuda_static --archs 80 90a [--peer libbitsandbytes_cuda130.so] [--write]

Compiles csrc/cuda with nvcc, reads ptxas's report and the SASS, and compares with the committed
table benchmarks/results/cuda_static.csv. Nothing here is a time. ``slots`` is the number of SASS
instructions in a main loop, all branches counted, times 32 over the elements that a warp handles
in one iteration; quantize and dequantize, which have no loop, are counted along their way
(``hot_path``), as is one pass of adamw_step, and bitsandbytes' quantize whole. Of dequantize there
are also the slots of its unrolled body alone: what a tile twice as long adds to the way.
``ceiling`` is 128 / slots: no SM issues more than four warp instructions a clock, so no more than
this many elements a clock per SM can come out, whatever the memory does. ``memory`` is what an
H200's memory delivers, in elements a clock per SM: 4.3 TB/s over 132 SMs at 1.98 GHz are 16.5 bytes
a clock. Registers and spills of the peer are not read and stand as 0. Every kernel, in the table or
not, is held to no spills.
"""

from __future__ import annotations

import argparse
import csv
import re
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterable
from dataclasses import asdict, dataclass, fields
from pathlib import Path

from benchmarks.sass import (
    demangle,
    functions,
    hot_path,
    main_loop,
    opcode,
    outer_loop,
    resources,
)

ROOT = Path(__file__).resolve().parent.parent
TABLE = ROOT / "benchmarks" / "results" / "cuda_static.csv"
BYTES_A_CLOCK = 4.3e12 / 132 / 1.98e9
NF4_BYTES = 0.5 + 1 / 64 + 4 / 16384  # of a weight with nested scales


@dataclass(frozen=True)
class Target:
    """One main loop: the kernel, what its loop must contain, and elements of a warp's iteration."""

    name: str
    source: str
    kernel: str  # regular expression on the demangled name
    marker: (
        str  # an instruction that only the main loop has in such number: the loop is its maximum
    )
    elements: int
    limit: float | None = None  # slots; None: reported only
    archs: tuple[str, ...] = ()  # that have the kernel; none named: all
    bytes: float = NF4_BYTES  # that memory moves an element
    # (old, new) text of the source that adds ``elements`` to a warp's: only what that adds counts.
    longer: tuple[str, str] | None = None


def _forward(tokens: int, shape: str, elements: int, limit: float | None = None) -> Target:
    kernel = rf"linear_tile_kernel<__nv_bfloat16, .*Shape<{shape}>"
    return Target(f"linear tile, {tokens} tokens", "linear_tile", kernel, "HMMA", elements, limit)


def _hopper(tokens: int, tile: str, weights: str, elements: int) -> Target:
    """A tile of 128 rows by wgmma: a CTA's tensor cores use 2048 / tokens weights a clock."""
    kernel = rf"hopper_tile_kernel<__nv_bfloat16, .*HopperTile<{tile}>"
    name = f"linear, wgmma {tokens} tokens, {weights}"
    return Target(name, "hopper_tile", kernel, "HGMMA", elements, tokens / 16, ("90a",))


def _few(tokens: int, shape: str, archs: tuple[str, ...], limit: float | None = None) -> Target:
    """A unit of 32 rows by 256; ``archs`` have the shared memory for it."""
    kernel = rf"linear_few_kernel<__nv_bfloat16, .*Shape<{shape}, false>"
    name = f"linear, {tokens} tokens"
    return Target(name, "linear_few", kernel, "HMMA", 32 * 256, limit, archs)


def _group(tokens: int, shape: str, elements: int, limit: float | None = None) -> Target:
    kernel = rf"linear_group_kernel<__nv_bfloat16, .*Shape<{shape}>"
    return Target(f"linear group, {tokens} tokens", "linear_group", kernel, "HMMA", elements, limit)


TARGETS = (
    Target(
        "dequantize nf4 64 nested bf16", "dequantize",
        r"dequantize_kernel<__nv_bfloat16, true>", "decode path", 512, 8.5,
        bytes=2 + NF4_BYTES,
    ),
    Target(
        "dequantize nf4 64 bf16", "dequantize",
        r"dequantize_kernel<__nv_bfloat16, false>", "decode path", 512, 8.5,
        bytes=2.5625,
    ),
    Target(
        "dequantize nf4 64 nested bf16, unrolled body", "dequantize",
        r"dequantize_kernel<__nv_bfloat16, true>", "decode path", 512, 4.0,
        bytes=2 + NF4_BYTES, longer=("kWarpTile = 512", "kWarpTile = 1024"),
    ),
    Target(
        "quantize nf4 64 bf16", "quantize",
        r"quantize_kernel<__nv_bfloat16, 0, 8>", "path", 1024, 13.0, bytes=2.5625,
    ),
    # Weights that a warp decodes in one step, of 256 or 64 elements of K.
    _few(8, "1, 11, 2", ("80", "90a", "100"), 4.0),
    _few(16, "2, 11, 2", ("90a", "100")),
    _few(32, "4, 7, 3", ("90a", "100")),
    _forward(8, "8, 1, 1, 1, 4, 3, 2, false", 16 * 256, 4.0),
    _forward(16, "8, 1, 1, 2, 4, 2, 2, false", 16 * 256),
    _forward(32, "8, 1, 1, 4, 4, 2, 1, false", 16 * 256),
    _forward(64, "4, 2, 2, 4, 1, 4, 1, false", 32 * 64),
    _forward(128, "4, 2, 2, 8, 1, 3, 1, true", 32 * 64),
    # Warps of a warpgroup have 16 rows each; the fused loop holds two steps of 64 elements of K.
    _hopper(128, "1, false, 8, true, 1", "nf4 nested", 16 * 128),
    _hopper(256, "2, false, 4, true, 2", "nf4 nested", 16 * 128),
    _hopper(256, "2, false, 4, false, 2", "nf4", 16 * 128),
    _hopper(128, "1, true, 6, false, 2", "16-bit", 16 * 64),
    _hopper(256, "2, true, 4, false, 2", "16-bit", 16 * 64),
    _group(8, "8, 1, 1, 1, 4, 3, 2, false", 16 * 256, 4.0),
    _group(64, "4, 2, 2, 4, 1, 4, 1, false", 32 * 64),
    Target(
        "linear_backward, 128 tokens", "backward_tile",
        r"backward_tile_kernel<__nv_bfloat16, .*Shape<4, 2, 8, 4, true>", "HMMA", 64 * 32,
    ),
    # A CTA's 256 columns of 64 rows of W, an eighth of them for each of its warps.
    Target(
        "linear_backward, wgmma 128 tokens, 16-bit", "hopper_backward",
        r"hopper_backward_kernel<__nv_bfloat16>", "HGMMA", 256 * 64 // 8, 8.0, ("90a",),
    ),
    # A warp's 32 tokens by 64 columns of grad_y or x, for 16 ranks.
    Target(
        "lora backward, ds and db", "lora_pass",
        r"pass_kernel<__nv_bfloat16, true, true>", "HMMA", 2048, 16.0, bytes=2,
    ),
    Target(
        "lora backward, da", "lora_pass",
        r"pass_kernel<__nv_bfloat16, false, true>", "HMMA", 2048, bytes=2,
    ),
    # Float32 parameters move 16 bytes an element, for which an H200 takes 96 slots.
    Target("adamw_step float32, 8 bits", "optimizer", r"adamw_kernel", "pass", 256, 90.0, bytes=16),
)  # fmt: skip

# bitsandbytes' kernels of the same work. elements: of one warp and pass through the counted code.
PEER_TARGETS = (
    Target(
        "bitsandbytes dequantize nf4 bf16", "",
        r"kDequantizeBlockwise<__nv_bfloat16, 512, 64, 8, 2>", "STG", 512, bytes=2.5625,
    ),
    Target(
        "bitsandbytes quantize nf4 bs64 bf16", "",
        r"kQuantizeBlockwiseSmall<__nv_bfloat16, 64, 2>", "", 64, bytes=2.5625,
    ),
    # Each weight costs a lane one look-up, by LDS or SHFL: elements are 32 times those in a loop.
    Target(
        "bitsandbytes gemv, kgemm_4bit_inference_naive", "",
        r"kgemm_4bit_inference_naive<__nv_bfloat16, 128, 16>", "LDS", 1024,
    ),
    *(
        Target(
            f"bitsandbytes gemm_4bit_simt, {tokens} token" + "s" * (tokens > 1), "",
            rf"gemm_4bit_simt<__nv_bfloat16, {tokens}>", "SHFL", 1024,
        )
        for tokens in (1, 2, 4, 8)
    ),
    *(
        Target(
            f"bitsandbytes gemm_4bit_sm80, tile {tile.replace(', ', 'x')}", "",
            rf"gemm_4bit_sm80_m16n8k16<__nv_bfloat16, {tile}>", "SHFL", elements,
        )
        for tile, elements in (
            ("32, 64, 128", 1024), ("32, 256, 128", 4096), ("64, 64, 64", 512),
            ("128, 64, 64", 512), ("128, 128, 64", 1024),
        )
    ),
)  # fmt: skip


@dataclass(frozen=True)
class Row:
    """One line of the table."""

    arch: str
    loop: str
    registers: int
    spill_bytes: int
    stack_bytes: int
    instructions: int
    slots: float
    ceiling: float
    memory: float
    hmma: int
    hgmma: int
    wide_accesses: int
    global_accesses: int


def compile_cubin(
    source: str, arch: str, directory: Path, change: tuple[str, str] | None = None
) -> tuple[Path, str]:
    """The cubin of one file of csrc/cuda, and ptxas's report; ``change``: (old, new) text of it."""
    path = ROOT / "csrc" / "cuda" / f"{source}.cu"
    if change is not None:
        text = path.read_text()
        if text.count(change[0]) != 1:
            raise SystemExit(f"{path.name} must hold {change[0]!r} once")
        path = directory / f"{source}_changed.cu"
        path.write_text(text.replace(*change))
    target = directory / f"{path.stem}_{arch}.cubin"
    command = ["nvcc", "-std=c++17", "-O3", "--fmad=false", "-DNF4_SM90A"]
    command += [f"-I{ROOT / 'csrc' / 'include'}", f"-I{ROOT / 'csrc' / 'cuda'}"]
    command += ["-Xptxas", "-v", "-cubin", f"-arch=sm_{arch}", "-o", str(target), str(path)]
    result = subprocess.run(command, capture_output=True, text=True)
    if result.returncode:
        raise SystemExit(result.stderr)
    if "wgmma.mma_async instructions are serialized" in result.stderr:
        raise SystemExit(f"{source}.cu, sm_{arch}: ptxas waits after every wgmma:\n{result.stderr}")
    return target, result.stderr


def counted(body: list[tuple[int, str]], target: Target) -> Counter[str]:
    """The opcodes of the instructions that a target's figure is taken from."""
    return Counter(map(opcode, _instructions(body, target)))


def _instructions(body: list[tuple[int, str]], target: Target) -> list[str]:
    if target.marker == "path":
        return hot_path(body)
    if target.marker == "decode path":
        return hot_path(body, load=r"LDG\.E(\.CONSTANT)?$", store=r"STG\.E\.EF\.128$")
    if target.marker == "pass":
        return hot_path(body, outer_loop(body))
    return main_loop(body, target.marker) if target.marker else [text for _, text in body]


def find(code: Iterable[str], target: Target) -> str:
    """The mangled name of a target's kernel."""
    names = list(code)
    for mangled, name in zip(names, demangle(names), strict=True):
        if re.search(target.kernel, name):
            return mangled
    raise SystemExit(f"{target.name}: no kernel {target.kernel} among {len(names)}")


def added(arch: str, target: Target, before: Counter[str], directory: Path) -> Counter[str]:
    """What ``target.longer`` adds to the opcodes ``before``; some become fewer."""
    cubin, _ = compile_cubin(target.source, arch, directory, target.longer)
    code = functions(cubin, arch, "")
    after = counted(code[find(code, target)], target)
    after.subtract(before)
    return after


def row(arch: str, target: Target, names: Counter[str], used: tuple[int, int, int]) -> Row:
    memory = {n: c for n, c in names.items() if re.match(r"(LDG|STG|LDGSTS)\b", n)}
    slots = names.total() * 32 / target.elements
    return Row(
        arch,
        target.name,
        *used,
        names.total(),
        round(slots, 2),
        round(128 / slots, 1),
        round(BYTES_A_CLOCK / target.bytes, 1),
        sum(c for n, c in names.items() if n.startswith("HMMA")),
        sum(c for n, c in names.items() if n.startswith("HGMMA")),
        sum(c for n, c in memory.items() if ".128" in n),
        sum(memory.values()),
    )


def spilling(arch: str, used: dict[str, tuple[int, int, int]]) -> list[str]:
    """The kernels that spill registers, and how many bytes."""
    names = dict(zip(used, demangle(list(used)), strict=True))
    spills = {name: count for name, (_, count, _) in used.items() if count > 0}
    return [f"sm_{arch} {names[name]}: {count} bytes" for name, count in spills.items()]


def measure(archs: list[str], peer: Path | None) -> list[Row]:
    """The table, ours first."""
    rows, spilled = [], []
    with tempfile.TemporaryDirectory() as directory:
        for arch in archs:
            targets = [t for t in TARGETS if not t.archs or arch in t.archs]
            for source in sorted(path.stem for path in (ROOT / "csrc" / "cuda").glob("*.cu")):
                cubin, report = compile_cubin(source, arch, Path(directory))
                used = resources(report)
                spilled += spilling(arch, used)
                if all(t.source != source for t in targets):
                    continue
                code = functions(cubin, arch, "")
                for target in (t for t in targets if t.source == source):
                    name = find(code, target)
                    body = counted(code[name], target)
                    if target.longer is not None:
                        body = added(arch, target, body, Path(directory))
                    rows.append(row(arch, target, body, used[name]))
    if spilled:
        raise SystemExit("spilled registers:\n" + "\n".join(spilled))
    if peer is not None:
        code = functions(peer, "90", "kDequantizeBlockwise|kQuantizeBlockwiseSmall|gemm_4bit")
        for target in PEER_TARGETS:
            name = find(code, target)
            rows.append(row("90", target, counted(code[name], target), (0, 0, 0)))
    return rows


def read_table() -> list[Row]:
    with TABLE.open() as file:
        types = {f.name: f.type for f in fields(Row)}
        cast = {"str": str, "int": int, "float": float}
        return [
            Row(**{k: cast[str(types[k])](v) for k, v in line.items()})
            for line in csv.DictReader(file)
        ]


def regressions(rows: list[Row]) -> list[str]:
    """What got worse than the committed table, or is over a limit."""
    limits = {t.name: t.limit for t in TARGETS}
    wgmma = {t.name for t in TARGETS if t.marker == "HGMMA"}
    committed = {(r.arch, r.loop): r for r in read_table()} if TABLE.exists() else {}
    out = []
    for r in rows:
        where = f"{r.loop} on sm_{r.arch}"
        limit = limits.get(r.loop)
        before = committed.get((r.arch, r.loop))
        if r.spill_bytes > (before.spill_bytes if before is not None else 0):
            out.append(f"{where}: {r.spill_bytes} bytes spilled")
        if limit is not None and r.arch == "90a" and r.slots > limit:
            out.append(f"{where}: {r.slots} issue slots per element, at most {limit}")
        if r.loop in wgmma and r.hgmma == 0:
            out.append(f"{where}: no wgmma in its loop")
        if before is not None and r.slots > 1.05 * before.slots:
            out.append(f"{where}: {r.slots} issue slots per element, {before.slots} committed")
    return out


def main() -> int:
    parser = argparse.ArgumentParser(description="static table of the CUDA kernels")
    parser.add_argument("--archs", nargs="+", default=["80", "90a"])
    parser.add_argument("--peer", type=Path, help="libbitsandbytes_cuda130.so")
    parser.add_argument("--write", action="store_true", help="write the committed table")
    args = parser.parse_args()
    rows = measure(args.archs, args.peer)
    for r in rows:
        print(*asdict(r).values(), sep=", ")
    if args.write:
        if args.peer is None:  # its rows stay
            rows += [r for r in read_table() if r.loop.startswith("bitsandbytes")]
        with TABLE.open("w", newline="") as file:
            writer = csv.DictWriter(file, [f.name for f in fields(Row)])
            writer.writeheader()
            writer.writerows(asdict(r) for r in rows)
    problems = regressions(rows)
    print(*problems, sep="\n", file=sys.stderr)
    return bool(problems)


if __name__ == "__main__":
    raise SystemExit(main())
