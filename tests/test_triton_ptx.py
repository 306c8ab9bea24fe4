"""The inline PTX of the Triton kernels, evaluated instruction by instruction on a CPU."""

from __future__ import annotations

import re

import numpy as np
import pytest
import torch
from cases import DTYPES, dtype_id

from nf4 import formats
from nf4.backends import triton_launch

pytest.importorskip("triton")

FOUR_BIT = (formats.NF4, formats.FP4)


def _prmt(a: int, b: int, selector: int) -> int:
    """PRMT in its default mode: each selector nibble takes a byte, or its sign eight times."""
    raw = (b << 32 | a).to_bytes(8, "little")
    out = []
    for i in range(4):
        nibble = selector >> (4 * i) & 0xF
        byte = raw[nibble & 7]
        out.append(0xFF * (byte >> 7) if nibble & 8 else byte)
    return int.from_bytes(bytes(out), "little")


def _lop3(a: int, b: int, c: int, table: int) -> int:
    """LOP3: bit ``4 a + 2 b + c`` of the table for each bit of the operands."""
    index = [4 * (a >> i & 1) + 2 * (b >> i & 1) + (c >> i & 1) for i in range(32)]
    return sum((table >> j & 1) << i for i, j in enumerate(index))


def _run_ptx(text: str, packed: int) -> list[int]:
    """The output registers of ``decode_asm``'s text for four packed bytes."""
    operations = {
        "and.b32": lambda a, b: a & b,
        "or.b32": lambda a, b: a | b,
        "shr.u32": lambda a, b: a >> b,
        "shl.b32": lambda a, b: a << b & 0xFFFFFFFF,
        "prmt.b32": _prmt,
        "lop3.b32": _lop3,
        "mov.u32": lambda a: a,
    }
    outputs = len(set(re.findall(r"\$\d+", text))) - 1
    lane = np.random.default_rng().integers(32)
    below = (1 << int(lane)) - 1
    registers = {
        f"${outputs}": packed,
        "%lanemask_lt": below,
        "%lanemask_ge": 0xFFFFFFFF - below,
    }

    def value(operand: str) -> int:
        return registers[operand] if operand in registers else int(operand, 0)

    for line in text.replace("{ ", "").splitlines():
        if line.startswith((".reg", "}")):
            continue
        name, rest = line.rstrip(";").split(" ", 1)
        target, *operands = (o.strip() for o in rest.split(","))
        registers[target] = operations[name](*map(value, operands))
    return [registers[f"${i}"] for i in range(outputs)]


@pytest.mark.parametrize("fmt", FOUR_BIT, ids=lambda f: f.name)
@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
def test_decode_ptx(fmt: formats.Format, dtype: torch.dtype) -> None:
    """The inline PTX, evaluated here, decodes all 256 bytes as the plain form does."""
    from nf4.kernels._codes import decode_asm

    codes = triton_launch.codes(fmt.id, dtype)
    names = {torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16"}
    text, constraints = decode_asm(codes, names[dtype])
    order = np.random.default_rng().permutation(256)
    for four in order.reshape(-1, 4):
        words = _run_ptx(text, int.from_bytes(bytes(four.tolist()), "little"))
        assert constraints == ",".join(["=r"] * len(words) + ["r"])
        values = torch.from_numpy(np.array(words, np.uint32).view(np.int32)).view(dtype).tolist()
        first = [codes[b >> 4] for b in four]
        second = [codes[b & 15] for b in four]
        if dtype is torch.float32:
            assert values == first + second
        else:  # pairs of neighbours, as the weight lies in memory
            assert values == [v for pair in zip(first, second, strict=True) for v in pair]


def _float(bits: int) -> np.float32:
    return np.uint32(bits).view(np.float32)


def _bits(value: float) -> int:
    return int(np.float32(value).view(np.uint32))


def _run_lanes(text: str, registers: dict[str, int], tables: dict[str, list[int]]) -> dict:
    """The registers after PTX of one lane. ``tables``: registers of all 32 lanes, for SHFL."""
    lane = int(np.random.default_rng().integers(32))
    registers = registers | {name: table[lane] for name, table in tables.items()}

    def value(operand: str) -> int:
        if operand in registers:
            return registers[operand]
        return int(operand[2:], 16) if operand.startswith("0f") else int(operand, 0)

    def shuffle(source: str, index: str, control: str, mask: str) -> int:
        assert value(mask) == 0xFFFFFFFF and value(control) & 0x1F == 0x1F
        segment = value(control) >> 8
        return tables[source][lane & segment | value(index) & ~segment & 0x1F]

    operations = {
        "mov.b32": value,
        "shr.u32": lambda a, b: value(a) >> value(b),
        "add.u32": lambda a, b: value(a) + value(b),
        "setp.gt.f32": lambda a, b: int(_float(value(a)) > _float(value(b))),
        "shfl.sync.idx.b32": shuffle,
        # Exact in float64 but for the last rounding.
        "fma.rn.f32": lambda a, b, c: _bits(
            float(_float(value(a))) * float(_float(value(b))) + float(_float(value(c)))
        ),
    }
    for line in text.splitlines():
        if line.startswith(("{", "}")):
            line = line.strip("{} ").split(";")[-1]
        if line.startswith("@"):
            predicate, line = line[1:].split(" ", 1)
            if not registers[predicate]:
                continue
        if line:
            name, rest = line.rstrip(";").split(" ", 1)
            target, *operands = (o.strip() for o in rest.split(","))
            registers[target] = operations[name](*operands)
    return registers


@pytest.mark.parametrize("fmt", FOUR_BIT, ids=lambda f: f.name)
def test_dot_ptx(fmt: formats.Format) -> None:
    """The inline PTX of a single row, evaluated here, looks up all 256 bytes and adds in order."""
    from nf4.kernels._codes import dot_asm

    text, constraints = dot_asm()
    assert constraints.split(",") == ["=r"] * 4 + ["r"] * 5 + ["f"] * 8
    values = fmt.values.astype(np.float32)
    random = np.random.default_rng()
    for four in random.permutation(256).reshape(-1, 4):
        x = random.standard_normal(8).astype(np.float32)
        order = [x[0], x[2], x[4], x[6], x[1], x[3], x[5], x[7]]
        registers = {f"${9 + i}": _bits(v) for i, v in enumerate(order)}
        registers["$4"] = int.from_bytes(bytes(four.tolist()), "little")
        lanes = [_bits(values[i % 16]) for i in range(32)]
        got = _float(_run_lanes(text, registers, {"$5": lanes})["$0"])
        codes = [c for b in four.tolist() for c in (b >> 4, b & 15)]
        expected = sum(float(values[c]) * float(v) for c, v in zip(codes, x, strict=True))
        assert abs(got - expected) < 1e-5


def test_encode_ptx() -> None:
    """The inline PTX, evaluated here, gives NF4's code on both sides of all it decides by."""
    from nf4.kernels._codes import encode_asm

    buckets = triton_launch.LANE_BUCKETS
    table = triton_launch.lane_entries(formats.NF4)
    assert table is not None and triton_launch.lane_entries(formats.FP4) is None
    text, constraints = encode_asm(buckets)
    assert constraints == "=r,r,r,r"
    lanes = {"$2": (table >> 32 & 0xFFFFFFFF).tolist(), "$3": (table & 0xFFFFFFFF).tolist()}
    thresholds = formats.NF4.thresholds
    edges = ((np.arange(2 * buckets) + 0.5) / buckets - 1).astype(np.float32)
    near = np.concatenate([thresholds, edges, np.float32([-1, -0.0, 0, 1])])
    values = [near, np.nextafter(near, np.float32(2)), np.nextafter(near, np.float32(-2))]
    values.append(np.random.default_rng().uniform(-1, 1, 200).astype(np.float32))
    for v in np.concatenate(values):
        code = _run_lanes(text, {"$1": _bits(v)}, lanes)["$0"]
        assert code == np.searchsorted(thresholds, v), v
