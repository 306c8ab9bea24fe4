"""Tile functions between codes and values, and the PTX that decodes eight codes at a time.

A 4-bit table reaches a kernel as constexpr tuples (``nf4.formats`` is the source of the numbers),
an 8-bit table as a pointer to its 256 float32 values or 255 thresholds.
"""

import struct

import triton
import triton.language as tl


def decode_asm(codes, dtype):
    """PTX that turns 4 packed bytes into 8 values of ``dtype``, and its constraints.

    ``codes`` are the 16 values, exact in ``dtype`` ("fp32", "fp16" or "bf16"). Each byte plane of
    the table lies in four 32-bit words. PRMT looks up four codes in the eight entries below 8 and
    in the eight above, and a LOP3 takes one or the other by bit 3 of each code, which a PRMT that
    replicates sign bits spread to a mask; further PRMTs zip the planes into values. 21 integer
    instructions decode 8 codes to 16 bits, where a tree of selects takes 15 a code. Inline PTX,
    because Triton has no byte permute; the plain form in ``decode`` is what the interpreter runs,
    and a test evaluates this text against it for all 256 bytes.
    """
    pack = {"fp32": "<f", "fp16": "<e", "bf16": "<f"}[dtype]
    raw = [struct.pack(pack, c) for c in codes]
    if dtype == "bf16":
        raw = [r[2:] for r in raw]
    width = len(raw[0])
    outputs = 2 * width
    q = f"${outputs}"
    lines = [
        "{ .reg .b32 index, mask, up, below, above, zero, plane<4>, zip<2>;",
        # An instruction takes one constant. The other must be in a register, and ptxas moves a
        # known one there for every use, 64 moves in 350 instructions: so it must not know.
        "mov.u32 zero, %lanemask_lt;",
        "mov.u32 up, %lanemask_ge;",
        "and.b32 zero, zero, up;",
        f"and.b32 index, {q}, 0x77777777;",
        f"shl.b32 up, {q}, 4;",
    ]
    for pair in range(2):  # codes of bytes 0-1, then of bytes 2-3
        if pair:
            lines.append("shr.u32 index, index, 16;")
        lines.append(f"prmt.b32 mask, {q}, up, {(0x9D8C, 0xBFAE)[pair]:#x};")
        for plane in range(width):
            # Entries 0-3, 4-7, 8-11, 12-15.
            a, b, c, d = struct.unpack("<4I", bytes(r[plane] for r in raw))
            lines += [
                f"or.b32 below, zero, 0x{a:08x};",
                f"or.b32 above, zero, 0x{c:08x};",
                f"prmt.b32 below, below, 0x{b:08x}, index;",
                f"prmt.b32 above, above, 0x{d:08x}, index;",
                f"lop3.b32 plane{plane}, below, above, mask, 0xd8;",
            ]
        # Byte i of a plane belongs to code i of (second, first, second, first).
        if width == 2:
            lines += [
                f"prmt.b32 ${2 * pair}, plane0, plane1, 0x4051;",
                f"prmt.b32 ${2 * pair + 1}, plane0, plane1, 0x6273;",
            ]
        else:
            for half, selector in enumerate(("0x5140", "0x7362")):
                lines += [
                    f"prmt.b32 zip0, plane0, plane1, {selector};",
                    f"prmt.b32 zip1, plane2, plane3, {selector};",
                    f"prmt.b32 ${2 * pair + half}, zip0, zip1, 0x7632;",
                    f"prmt.b32 ${4 + 2 * pair + half}, zip0, zip1, 0x5410;",
                ]
    return "\n".join([*lines, "}"]), ",".join(["=r"] * outputs + ["r"])


def dot_asm():
    """PTX that multiplies 8 codes (operand 4, packed bytes) with 8 values of x and adds them up.

    Lane i of each half warp holds the value of code i in operand 5, and a shuffle looks it up: one
    instruction and a shift a code, in the load unit, where PRMT takes 5.6 in the unit that also
    shifts. x comes as the 4 first elements of the bytes (operands 9 to 12) and the 4 second ones.
    Output 0 is the sum, the others are nothing; the plain form in ``linear_row`` is what the
    interpreter runs, and a test evaluates this text against it.
    """
    lines = ["{ .reg .b32 code, value; .reg .f32 sum;", "mov.b32 sum, 0;"]
    for i in range(8):
        lines += [
            f"shr.u32 code, $4, {8 * (i // 2) + 4 * (1 - i % 2)};",
            "shfl.sync.idx.b32 value, $5, code, 0x101f, 0xffffffff;",
            f"fma.rn.f32 sum, value, ${9 + i // 2 + 4 * (i % 2)}, sum;",
        ]
    lines += ["mov.b32 $0, sum;", *(f"mov.b32 ${i}, 0;" for i in (1, 2, 3))]
    return "\n".join([*lines, "}"]), ",".join(["=r"] * 4 + ["r"] * 5 + ["f"] * 8)


def encode_asm(buckets):
    """PTX that finds the code of a value (operand 1), and its constraints.

    Lane i holds the threshold of bucket i (operand 2) and the code below it (operand 3), as
    ``encode4`` reads them from memory: two shuffles for a load of 8 scattered bytes a thread.
    """
    first = struct.unpack("<I", struct.pack("<f", 12582912.0 + buckets))[0]
    scale = struct.unpack("<I", struct.pack("<f", float(buckets)))[0]
    lines = (
        "{ .reg .b32 bucket, threshold; .reg .pred above;",
        # Its low bits are round(v * buckets) + buckets.
        f"fma.rn.f32 bucket, $1, 0f{scale:08X}, 0f{first:08X};",
        "shfl.sync.idx.b32 threshold, $2, bucket, 0x1f, 0xffffffff;",
        "shfl.sync.idx.b32 $0, $3, bucket, 0x1f, 0xffffffff;",
        "setp.gt.f32 above, $1, threshold;",
        "@above add.u32 $0, $0, 1;",
        "}",
    )
    return "\n".join(lines), "=r,r,r,r"


@triton.jit
def lane_entry(table_ptr, LANES: tl.constexpr):
    """Entry ``lane % LANES`` of a table: to Triton a scalar, and in truth one a lane.

    Only operands of inline PTX may use it: what Triton computes with it must be elementwise.
    """
    lane = tl.inline_asm_elementwise(
        "mov.u32 $0, %laneid;", "=r", [], dtype=tl.int32, is_pure=True, pack=1
    )
    return tl.load(table_ptr + (lane & (LANES - 1)))


@triton.jit
def _select16(code, VALUES: tl.constexpr):
    """VALUES[code], by a tree of selects."""
    b0 = (code & 1) != 0
    b1 = (code & 2) != 0
    b2 = (code & 4) != 0
    v0 = tl.where(b0, VALUES[1], VALUES[0])
    v1 = tl.where(b0, VALUES[3], VALUES[2])
    v2 = tl.where(b0, VALUES[5], VALUES[4])
    v3 = tl.where(b0, VALUES[7], VALUES[6])
    v4 = tl.where(b0, VALUES[9], VALUES[8])
    v5 = tl.where(b0, VALUES[11], VALUES[10])
    v6 = tl.where(b0, VALUES[13], VALUES[12])
    v7 = tl.where(b0, VALUES[15], VALUES[14])
    below = tl.where(b2, tl.where(b1, v3, v2), tl.where(b1, v1, v0))
    above = tl.where(b2, tl.where(b1, v7, v6), tl.where(b1, v5, v4))
    return tl.where((code & 8) != 0, above, below)


@triton.jit
def decode(
    packed,
    CODES: tl.constexpr,
    ASM: tl.constexpr,
    CONSTRAINTS: tl.constexpr,
    DTYPE: tl.constexpr,
):
    """Values of the first and the second element of each byte, of DTYPE and the shape of packed.

    ASM None takes the plain form, the same values from the same table.
    """
    if ASM is None:
        wide = packed.to(tl.int32)
        first = _select16(wide >> 4, CODES).to(DTYPE)
        second = _select16(wide & 15, CODES).to(DTYPE)
    else:
        if tl.float32 == DTYPE:
            first, second = tl.inline_asm_elementwise(
                ASM, CONSTRAINTS, [packed], dtype=(tl.float32, tl.float32), is_pure=True, pack=4
            )
        else:
            both = tl.inline_asm_elementwise(
                ASM, CONSTRAINTS, [packed], dtype=tl.uint32, is_pure=True, pack=4
            )
            first = both.to(tl.uint16).to(DTYPE, bitcast=True)
            second = (both >> 16).to(tl.uint16).to(DTYPE, bitcast=True)
    return first, second


@triton.jit
def interleave(first, second):
    """[A, B] and [A, B] to [A, 2B], in element order."""
    pairs = tl.join(first, second)  # [A, B, 2]
    return tl.reshape(pairs, (first.shape[0], 2 * first.shape[1]))


@triton.jit
def encode4(v, bucket_ptr, BUCKETS: tl.constexpr):
    """4-bit codes (int32) of float32 values in [-1, 1].

    round(v * BUCKETS) picks a bucket, which has at most one threshold: ``bucket_ptr`` [4 * BUCKETS]
    int64 holds that threshold's bits above the code past it (bits 4-7) and the code up to it. One
    load and one compare where a tree of selects took 46 instructions an element on sm_90, most
    of them saving predicates. Any other value, NaN too, gets a code without leaving the table.
    """
    # Has steps of 1 / BUCKETS, and low bits that are round(v * BUCKETS) + BUCKETS.
    shifted = (v + (12582912.0 / BUCKETS + 1.0)).to(tl.int32, bitcast=True)
    entry = tl.load(bucket_ptr + (shifted & (4 * BUCKETS - 1)))
    threshold = (entry >> 32).to(tl.int32).to(tl.float32, bitcast=True)
    both = entry.to(tl.int32)
    return tl.where(v > threshold, both >> 4, both) & 15


@triton.jit
def encode8(v, threshold_ptr):
    """Codes (int32) of scaled float32 values in an 8-bit table of ascending values.

    A binary search over the 255 thresholds, which stay in the first-level cache.
    """
    rank = tl.zeros_like(v).to(tl.int32)
    for level in tl.static_range(8):
        step = 128 >> level
        threshold = tl.load(threshold_ptr + rank + (step - 1))
        rank += tl.where(v > threshold, step, 0)
    return rank
