"""Every Triton kernel compiled ahead of time for every architecture, and its resources.

The table that these tests read is printed by ``python -m benchmarks.triton_static``.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from types import ModuleType
from typing import Any

import pytest
import torch
from test_adamw_step import hyper_tensor, random_arguments

from nf4 import formats

pytest.importorskip("triton")

ARCHS = (75, 80, 86, 89, 90, 100, 120)

pytestmark = pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") == "1",
    reason="compiling Triton kernels needs a process without TRITON_INTERPRET=1",
)


@pytest.fixture(scope="module")
def static() -> ModuleType:
    from benchmarks import triton_static

    return triton_static


@pytest.fixture(scope="module")
def compiled(static: ModuleType) -> Iterator[dict]:
    """(row, problems) of one configuration a kernel, by architecture."""
    table: dict[int, list] = {arch: [] for arch in ARCHS}
    for row, problems in static.rows():
        print(static.table_line(row))
        table[row.arch].append((row, problems))
    yield table


@pytest.mark.timeout(600)
@pytest.mark.parametrize("arch", ARCHS)
def test_one_configuration(arch: int, compiled: dict, static: ModuleType) -> None:
    """No spill, a matrix instruction where one is meant, and no worse than the committed table."""
    before = static.read_results()
    found = []
    for row, problems in compiled[arch]:
        known = before[row.case, row.kernel, arch]
        found += [f"{row.kernel}: {p}" for p in problems + static.regressions(row, known)]
    assert not found, "\n".join(found)


def test_every_kernel_is_compiled(compiled: dict) -> None:
    """A kernel that no case reaches would pass by absence."""
    from pathlib import Path

    kernels = Path(__file__).parent.parent / "kernels"
    names = {
        line.removeprefix("def ").split("(")[0]
        for path in kernels.glob("*.py")
        for line in path.read_text().splitlines()
        if line.startswith("def ")
        and line.split("(")[0].endswith("_kernel")
        # The optimizer step has a gate of its own.
        and path.stem != "optimizer"
    }
    for arch in ARCHS:
        assert {row.kernel for row, _ in compiled[arch]} == names


def test_a_jump_back_is_not_always_a_loop() -> None:
    """Waits that the compiler put behind the end jump back over code that runs once."""
    from benchmarks import triton_static_loops as loops

    lines = [
        "@!P0 BRA 0x80", "UTCHMMA one", "IADD start", "UTCHMMA in loop", "@!P1 BRA 0xa0",
        "IADD end", "@P2 BRA `(.L_x_1) 0x20", "EXIT",
        "NANOSLEEP before", "BRA 0x10", "NANOSLEEP in loop", "@P1 BRA 0xa0", "BRA 0x50",
    ]  # fmt: skip
    text = "\n".join(f"        /*{i << 4:04x}*/   {t} ;  /* 0x00 */" for i, t in enumerate(lines))

    loop = loops.matrix_loop(loops.instructions(text))

    assert loop == lines[2:7] + lines[10:]


def exact_launches(arch: int) -> list[tuple[str, Any]]:
    """(op, launch) of the ops whose bits are fixed: ragged float32 weights of every format."""
    from nf4.backends import triton as ops
    from nf4.backends.triton_launch import recording
    from nf4.backends.tuning import Target

    found: list[tuple[str, Any]] = []

    def collect(op: str) -> None:
        found.extend((op, launch) for launch in launches[len(found) :])

    with recording(Target(arch, 100)) as launches:
        weight = torch.empty(4097, 63, device="meta")
        shape = list(weight.shape)
        for fmt in (formats.NF4, formats.FP4, formats.DYNAMIC8):
            packed, absmax = ops.quantize(weight, 64, fmt.id)
            collect(f"quantize to {fmt.bits} bits")
            ops.dequantize(packed, absmax, None, None, shape, 64, fmt.id, torch.bfloat16)
            collect("dequantize")
            nested = ops.double_quantize(absmax)
            collect("double_quantize")
            ops.dequantize(packed, *nested, shape, 64, fmt.id, torch.bfloat16)
            collect("dequantize nested")
        arguments = random_arguments((5000,), dtypes=(torch.float32,), bits=(8,))
        arguments.call(ops.adamw_step, hyper_tensor(1), None, torch.zeros(1, dtype=torch.int64))
        collect("adamw_step")
    return found


# Where products and sums fuse if the launch lets them: the nested scale, whose product must be
# rounded before the offset is added, and the moments of AdamW.
FUSIBLE = {"dequantize nested", "adamw_step"}


def of_code(ptx: str) -> str:
    """PTX without the step of ``encode_asm`` that is written as a fused one: it names a bucket, and
    a comparison with the exact threshold follows."""
    return re.sub(r"fma\.rn\.f32 bucket,.*", "", ptx)


@pytest.mark.parametrize("arch", [75, 90, 120])
def test_exact_ops_round_every_step(arch: int, static: ModuleType) -> None:
    """As they are launched they hold no fused multiply-add, and none that ptxas may make.

    A PTX product or sum that names its rounding (``mul.rn``) is never contracted. Compiled with
    fusion on, the same launches show which of them depend on being launched without it.
    """
    fused = set()
    for op, launch in exact_launches(arch):
        assert launch.exact, op
        ptx = of_code(static.compiled(launch, arch).asm["ptx"])
        assert re.search(r"\b(mul|add|sub|div)\.rn\.f(32|64)", ptx), op  # the search finds some
        loose = re.findall(r"\b(?:fma\.|(?:mul|add|sub|div)\.(?!rn\.)(?:\w+\.)*f\d).*", ptx)
        assert not loose, f"{op}: {loose[0]}"
        if re.search(r"\bfma\.", of_code(static.compiled(launch, arch, fuse=True).asm["ptx"])):
            fused.add(op)
    assert fused == FUSIBLE


@pytest.mark.parametrize("arch", [80, 90])
def test_matmuls_access_16_bytes(arch: int, static: ModuleType) -> None:
    """No load and no store of single 16-bit elements where rows begin at multiples of 16.

    An index that hides from the compiler that columns are neighbours splits every access, and
    keeps a tile out of the pipeline of asynchronous copies.
    """
    from benchmarks.triton_static_plan import lora_case
    from nf4.backends.triton_launch import recording
    from nf4.backends.tuning import Target

    with recording(Target(arch, 100)) as launches:
        for m in (64, 512):
            lora_case(torch.bfloat16, m, 0.0)
    names = ("linear_kernel", "dense_lora_kernel", "linear_backward_kernel")
    seen = set()
    for launch in launches:
        name = launch.kernel.fn.__name__
        if name not in names:
            continue
        if launch.args.get("K") == 0:  # LoRA's term alone, before cuBLAS adds the product
            seen.add(name)
            continue
        ptx = static.compiled(launch, arch).asm["ptx"]
        narrow = re.findall(r"\b(?:ld|st)\.global\S*\.b16\b.*", ptx)
        assert not narrow, f"{name}: {len(narrow)}, the first {narrow[0]}"
        assert re.search(r"st\.global\S*\.v4\.b32", ptx), name
        assert re.search(r"cp\.async\.cg\S* .*0x10\b", ptx), name
        seen.add(name)
    assert seen == set(names)


def test_launches_set_the_fusion(monkeypatch: pytest.MonkeyPatch) -> None:
    """The choice is part of every launch, whatever the environment makes Triton's default."""
    from nf4.backends import triton_launch

    class Kernel:
        def __getitem__(self, grid: tuple[int, ...]) -> Any:
            return lambda **options: seen.append(options["enable_fp_fusion"])

    seen: list[bool] = []
    for exact in (True, False):
        triton_launch.launch(Kernel(), (1,), {}, torch.device("cpu"), exact=exact)
    assert seen == [False, True]


@pytest.mark.check
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("arch", ARCHS)
def test_every_configuration(arch: int, static: ModuleType) -> None:
    """Every dtype, row count, block size and format that changes what is compiled."""
    found = [
        f"{row.kernel} {row.case} {row.config}: {p}"
        for row, problems in static.rows(everything=True, archs=[arch])
        for p in problems
    ]
    assert not found, "\n".join(found)
