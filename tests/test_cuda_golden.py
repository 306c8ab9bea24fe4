"""Every PTX wrapper against plain arithmetic, on a GPU and under emulation by the same probes.

tests/cuda_probes.cu calls one wrapper a function. The layouts below are those of the PTX ISA,
written down once more: on a GPU they pin the wrappers, under emulation they pin the emulation.
"""

from __future__ import annotations

import ctypes
import shutil
import subprocess
import sys
from ctypes import c_int64, c_void_p
from pathlib import Path

import pytest
import torch
from torch import Tensor

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
SOURCE = HERE / "cuda_probes.cu"
sys.path.insert(0, str(HERE))

from cuda_on_cpu import build  # noqa: E402

BF16, F16 = torch.bfloat16, torch.float16


class Probes:
    """The probe library of one place, and the device of its tensors."""

    def __init__(self, library: Path, device: str) -> None:
        self._c = ctypes.CDLL(str(library))
        self.device = torch.device(device)

    @property
    def is_hopper(self) -> bool:
        """Whether the wrappers of hopper.cuh run here."""
        return self.device.type == "cpu" or torch.cuda.get_device_capability() == (9, 0)

    def call(self, name: str, *args: Tensor | int | c_int64 | None) -> None:
        """Run one probe; a status, or a defect that the emulation reports, fails."""
        passed = [
            c_void_p(a.data_ptr()) if isinstance(a, Tensor) else c_void_p(None) if a is None else a
            for a in args
        ]
        status = getattr(self._c, f"probe_{name}")(*passed)
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        else:
            self._c.nf4_emulation_reports.restype = ctypes.c_char_p
            reports = self._c.nf4_emulation_reports().decode()
            assert not reports, reports
        assert status == 0


@pytest.fixture(scope="module", params=["gpu", "emulation"])
def probes(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Probes:
    if request.param == "emulation":
        if (reason := build.missing()) is not None:
            pytest.skip(reason)
        return Probes(build.build("race", kernels=[SOURCE]), "cpu")
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    if (nvcc := shutil.which("nvcc")) is None:
        pytest.skip("no nvcc on PATH")
    major, minor = torch.cuda.get_device_capability()
    arch = f"{major}{minor}" + ("a" if (major, minor) == (9, 0) else "")
    library = tmp_path_factory.mktemp("probes") / "probes.so"
    command = [nvcc, "-std=c++17", "-shared", "-Xcompiler=-fPIC", f"-arch=sm_{arch}"]
    command += [f"-I{ROOT / 'csrc' / name}" for name in ("include", "cuda")]
    subprocess.run([*command, str(SOURCE), "-o", str(library)], check=True)
    return Probes(library, "cuda")


@pytest.fixture
def hopper(probes: Probes) -> Probes:
    if not probes.is_hopper:
        pytest.skip("wgmma and TMA need sm_90")
    return probes


def words(t: Tensor) -> Tensor:
    """Pairs of 16-bit elements along the last dimension, as int32."""
    return t.contiguous().view(torch.int32)


def a_fragments(a: Tensor) -> Tensor:
    """[..., 16, 16] -> [..., 32 lanes, 4] registers: rows g, g + 8; columns 2t, 2t + 8."""
    pairs = words(a)  # [..., 16 rows, 8 pairs]
    lane = torch.arange(32)
    g, t = lane // 4, lane % 4
    return torch.stack([pairs[..., g + 8 * (i % 2), t + 4 * (i // 2)] for i in range(4)], dim=-1)


def c_indices() -> tuple[Tensor, Tensor]:
    """Row and column of each of the 4 registers of a 16 x 8 result, [32, 4] each."""
    lane, i = torch.arange(32)[:, None], torch.arange(4)[None, :]
    return lane // 4 + 8 * (i // 2), 2 * (lane % 4) + i % 2


@pytest.mark.parametrize("dtype", [BF16, F16], ids=str)
def test_mma(probes: Probes, dtype: torch.dtype) -> None:
    a, b = torch.randn(16, 16, dtype=dtype), torch.randn(8, 16, dtype=dtype)
    c = torch.randn(16, 8)
    lane = torch.arange(32)
    b_pairs = words(b)  # [8 columns, 8 pairs]
    b_registers = torch.stack([b_pairs[lane // 4, lane % 4 + 4 * i] for i in range(2)], dim=-1)
    rows, columns = c_indices()
    out = c[rows, columns].to(probes.device)
    fragments = a_fragments(a).to(probes.device), b_registers.contiguous().to(probes.device)

    probes.call("mma", *fragments, out, int(dtype is BF16))

    exact = c.double() + a.double() @ b.double().t()
    torch.testing.assert_close(out.cpu().double(), exact[rows, columns], rtol=0, atol=1e-4)


@pytest.mark.parametrize("transpose", [False, True])
def test_load_matrix(probes: Probes, transpose: bool) -> None:
    tiles = torch.randint(-(2**15), 2**15, (4, 8, 8), dtype=torch.int16)
    out = torch.empty(32, 4, dtype=torch.int32, device=probes.device)

    probes.call("load_matrix", tiles.to(probes.device), out, int(transpose))

    pairs = words(tiles.transpose(1, 2) if transpose else tiles)  # [4, 8 rows, 4 pairs]
    lane = torch.arange(32)
    assert torch.equal(out.cpu(), pairs[:, lane // 4, lane % 4].t())


def test_cp_async(probes: Probes) -> None:
    data = torch.randint(0, 256, (64, 16), dtype=torch.uint8)
    out = torch.empty_like(data, device=probes.device)

    probes.call("cp_async", data.to(probes.device), out)

    valid = torch.arange(16)[None, :] < (torch.arange(64) % 17)[:, None]
    assert torch.equal(out.cpu(), data * valid)


def test_and_or(probes: Probes) -> None:
    data = torch.randint(-(2**31), 2**31, (32, 3), dtype=torch.int32)
    out = torch.empty(32, dtype=torch.int32, device=probes.device)

    probes.call("and_or", data.to(probes.device), out)

    assert torch.equal(out.cpu(), data[:, 0] & data[:, 1] | data[:, 2])


def test_moderate_square_roots_and_quotients_are_rounded_as_ieee_wants(probes: Probes) -> None:
    blocks = 4096 if probes.device == "cuda" else 4
    data = torch.empty(32 * blocks, 2).uniform_(1, 2) * 2.0 ** torch.randint(
        -60, 60, (32 * blocks, 2)
    )
    data[:64] = 2.0 ** torch.randint(-60, 60, (64, 2))
    out = torch.empty_like(data, device=probes.device)

    probes.call("moderate", data.to(probes.device), out, blocks)

    exact = data.double()  # wide enough that rounding twice changes nothing
    wanted = torch.stack([exact[:, 0].sqrt(), exact[:, 1] / exact[:, 0]], 1).float()
    assert torch.equal(out.cpu(), wanted)


@pytest.mark.parametrize("dtype", [BF16, F16], ids=["bf16", "fp16"])
def test_larger_magnitudes(probes: Probes, dtype: torch.dtype) -> None:
    data = torch.randint(-(2**15), 2**15, (32, 2, 2), dtype=torch.int16)  # lane, operand, half
    data[:4] = torch.tensor([0, -1, 1, -(2**15)])[:, None, None] + torch.tensor([[0, 1], [1, 0]])
    out = torch.empty(32, 2, dtype=torch.int16, device=probes.device)

    probes.call("larger_magnitudes", data.to(probes.device), out, int(dtype is BF16))

    values = data.view(dtype).float().abs()
    assert torch.equal(out.cpu().view(dtype).float().nan_to_num(-1), values.amax(1).nan_to_num(-1))


def test_mbarrier(hopper: Probes) -> None:
    data = torch.randint(-(2**31), 2**31, (7, 2), dtype=torch.int32)
    out = torch.empty_like(data, device=hopper.device)

    hopper.call("mbarrier", data.to(hopper.device), out, 7)

    assert torch.equal(out.cpu(), data.flip(1))


def swizzled(box: Tensor) -> Tensor:
    """[rows, bytes] as TMA lays it out: 16-byte pieces exchanged by the number of 128 bytes."""
    rows, width = box.shape
    pieces = box.reshape(-1, 16)
    at = torch.arange(len(pieces))
    out = torch.empty_like(pieces)
    out[at ^ (at // 8 % (width // 16))] = pieces
    return out.view(rows, width)


@pytest.mark.parametrize("at", [(0, 0), (32, 5), (64, 70)], ids=str)
def test_tma_of_rows(hopper: Probes, at: tuple[int, int]) -> None:
    """A box of 32 bytes x 128 rows, partly outside: zero there."""
    data = torch.randint(0, 256, (150, 80), dtype=torch.uint8)
    out = torch.empty(128, 32, dtype=torch.uint8, device=hopper.device)

    hopper.call("tma_32", data.to(hopper.device), out, c_int64(150), c_int64(80), *at)

    box = torch.zeros(128, 32, dtype=torch.uint8)
    inside = data[at[1] : at[1] + 128, at[0] : at[0] + 32]
    box[: inside.shape[0], : inside.shape[1]] = inside
    assert torch.equal(out.cpu(), swizzled(box))


@pytest.mark.parametrize("at", [(0, 0), (64, 3)], ids=str)
def test_tma_of_even_and_odd_rows(hopper: Probes, at: tuple[int, int]) -> None:
    data = torch.randint(-(2**15), 2**15, (144, 88), dtype=torch.int16)
    out = torch.empty(128, 128, dtype=torch.uint8, device=hopper.device)

    hopper.call("tma_128", data.to(hopper.device), out, c_int64(144), c_int64(88), *at)

    box = torch.zeros(128, 64, dtype=torch.int16)
    inside = data[16 * at[1] : 16 * at[1] + 128, at[0] : at[0] + 64]
    box[: inside.shape[0], : inside.shape[1]] = inside
    box = box.view(8, 8, 2, 64).transpose(1, 2).reshape(128, 64)
    assert torch.equal(out.cpu(), swizzled(box.contiguous().view(torch.uint8)))


def test_tma_store(hopper: Probes) -> None:
    """Boxes of 8 rows x 64 columns from shared memory; what lies outside the tensor is left out."""
    rows, columns, first = 22, 152, 8
    data = torch.randint(-(2**15), 2**15, (3, 16, 64), dtype=torch.int16)
    boxes = [swizzled(half.view(torch.uint8)) for step in data for half in step.split(8)]
    out = torch.zeros(rows, columns, dtype=torch.int16, device=hopper.device)

    args = c_int64(rows), c_int64(columns), first
    hopper.call("tma_store", out, torch.stack(boxes).to(hopper.device), *args)

    expected = torch.zeros(rows, columns, dtype=torch.int16)
    expected[first:] = data.transpose(0, 1).reshape(16, 192)[: rows - first, :columns]
    assert torch.equal(out.cpu(), expected)


def test_cluster(hopper: Probes) -> None:
    """Two CTAs fill each other's stages, each with half of the rows, the last step ragged."""
    data = torch.randint(-(2**15), 2**15, (16, 312), dtype=torch.int16)
    out = torch.empty(2, 5, 16, 128, dtype=torch.uint8, device=hopper.device)

    hopper.call("cluster", data.to(hopper.device), out, c_int64(312))

    padded = torch.zeros(16, 320, dtype=torch.int16)
    padded[:, :312] = data
    steps = padded.view(16, 5, 64).transpose(0, 1).contiguous().view(torch.uint8)
    expected = torch.stack([swizzled(step) for step in steps])
    assert torch.equal(out.cpu(), expected.expand(2, -1, -1, -1))


@pytest.mark.parametrize("columns", [128, 256])
@pytest.mark.parametrize("source", ["registers", "shared", "shared by rows"])
@pytest.mark.parametrize("dtype", [BF16, F16], ids=str)
def test_wgmma(hopper: Probes, dtype: torch.dtype, source: str, columns: int) -> None:
    """Three steps of 64 through one stage by TMA, the last one ragged: k = 152."""
    k = 152
    x, w = torch.randn(columns, k, dtype=dtype), torch.randn(64, k, dtype=dtype)
    out = torch.empty(4, 32, columns // 8, 4, device=hopper.device)
    fragments = None
    if source == "registers":
        padded = torch.zeros(64, 192, dtype=dtype)
        padded[:, :k] = w
        blocks = padded.view(4, 16, 12, 16).permute(2, 0, 1, 3)  # [k block, warp, 16, 16]
        fragments = a_fragments(blocks).contiguous().to(hopper.device)
    by_rows = source == "shared by rows"

    inputs = (x.t().contiguous() if by_rows else x).to(hopper.device), w.to(hopper.device)
    flags = int(dtype is BF16), int(by_rows), columns // 128
    hopper.call("wgmma", *inputs, fragments, out, c_int64(k), *flags)

    exact = w.double() @ x.double().t()
    torch.testing.assert_close(out.cpu().double(), wgmma_fragments(exact), rtol=0, atol=1e-3)


def wgmma_fragments(d: Tensor) -> Tensor:
    """[64, columns] -> [4 warps, 32 lanes, columns / 8, 4 registers]."""
    rows, columns = c_indices()
    blocks = d.view(4, 16, -1, 8)  # [warp, row, column block, column]
    return blocks[:, rows, :, columns].permute(2, 0, 3, 1)


@pytest.mark.parametrize("to_next", [2048, 8192])
def test_wgmma_reads_rows_where_the_manual_says(hopper: Probes, to_next: int) -> None:
    """The canonical layout of an MN-major operand with a 128-byte swizzle, byte by byte.

    ((T, 8, m), (8, k)) : ((1, T, LBO), (8 T, SBO)) with T = 8 elements, then Swizzle<3, 4, 3>: bits
    4 to 6 of the offset are exclusive-ored with bits 7 to 9.
    """
    a, b = torch.randn(64, 16, dtype=BF16), torch.randn(16, 128, dtype=BF16)
    image = torch.zeros(3 * 4096, dtype=torch.int16)  # elements of 24 KiB
    n, k = torch.arange(128)[None, :], torch.arange(16)[:, None]
    offset = n % 64 * 2 + n // 64 * to_next + k % 8 * 128 + k // 8 * 1024
    image[(offset ^ (offset >> 7 & 7) << 4) // 2] = b.view(torch.int16)
    rows = torch.zeros(64, 64, dtype=BF16)
    rows[:, :16] = a
    image[8192:] = swizzled(rows.view(torch.uint8)).view(torch.int16).flatten()
    out = torch.empty(4, 32, 16, 4, device=hopper.device)

    hopper.call("wgmma_image", image.to(hopper.device), out, to_next)

    exact = a.double() @ b.double()
    torch.testing.assert_close(out.cpu().double(), wgmma_fragments(exact), rtol=0, atol=1e-4)
