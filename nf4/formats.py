"""The single source of truth for the storage formats: code tables, thresholds, byte layout.

Everything else is derived from the tables here: the thresholds, the Triton constants, and the
C++ header ``csrc/include/nf4/codes.h``, which ``python -m nf4.formats`` writes.

Byte layout. Weights are flattened in row-major order and cut into blocks of ``block_size``
elements; blocks may cross rows and the last block may be short. A 4-bit format stores element
``2i`` in the high nibble of byte ``i`` and element ``2i + 1`` in the low nibble; an odd count is
padded with the code of zero. An 8-bit format stores one code a byte.

Quantization rule (identical on every backend, bit for bit), in IEEE float32:

* ``absmax`` is the largest magnitude of the block; NaN if the block holds one (the largest of the
  magnitudes' bit patterns as unsigned integers is both).
* ``v = x * (1 / max(absmax, ABSMAX_FLOOR))``.
* A short last block of a 4-bit format divides instead, ``v = x / max(absmax, ABSMAX_FLOOR)``,
  and stores that maximum. (bitsandbytes' CPU path does the same; 8-bit formats have no such case.)
* The code is the number of thresholds strictly below ``v``, mapped to code order. A threshold is
  the float32 midpoint of two codes that are neighbours in value, so a tie takes the lower value.

Dequantization is ``code * absmax`` in float32, rounded once to the output dtype. Nested scales are
first decoded as ``map[u8] * nested_absmax`` and then ``+ offset``, two float32 roundings.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np

ABSMAX_FLOOR = 1e-38
BLOCK_SIZES = (32, 64, 128, 256, 512, 1024, 2048, 4096)
NESTED_BLOCK_SIZE = 256
# The offset of nested scales is summed in fp64 over chunks of this many, in index order.
OFFSET_CHUNK = 256


@dataclass(frozen=True)
class Format:
    """One code table. ``codes[i]`` is the float32 value of code ``i``, in code order."""

    name: str
    id: int
    bits: int
    codes: tuple[float, ...]

    @cached_property
    def values(self) -> np.ndarray:
        """The codes as float32, in code order."""
        return np.array(self.codes, dtype=np.float32)

    @cached_property
    def order(self) -> tuple[int, ...]:
        """Code indices sorted by value; of two equal values the lower code comes first."""
        return tuple(int(i) for i in np.argsort(self.values, kind="stable"))

    @cached_property
    def thresholds(self) -> np.ndarray:
        """float32 midpoints of neighbouring values, ascending, one fewer than the codes."""
        ordered = self.values[list(self.order)]
        return (ordered[:-1] + ordered[1:]) / np.float32(2)

    @cached_property
    def zero_code(self) -> int:
        """The code that a zero gets."""
        rank = int(np.searchsorted(self.thresholds, np.float32(0), side="left"))
        return self.order[rank]

    def packed_bytes(self, numel: int) -> int:
        """Bytes that ``numel`` codes take."""
        return (numel + 1) // 2 if self.bits == 4 else numel


def _dynamic_map(signed: bool) -> tuple[float, ...]:
    """The 8-bit dynamic tree map of Dettmers, "8-Bit Approximations for Parallelism in Deep
    Learning" (arXiv:1511.04561), section 3, as bitsandbytes tabulates it.

    Decade ``e`` from 1e-6 to 1 holds the midpoints of an even division of [0.1, 1] into ``2^e``
    parts (``2^(e+1)`` unsigned); 0 and 1 complete the 256 values. The division points are rounded
    as a fused multiply-add from the nearer end, which reproduces the published tables exactly.
    """
    values: list[float] = [0.0, 1.0]
    low, high = np.float32(0.1), np.float32(1.0)
    for decade in range(7):
        parts = 2**decade if signed else 2 ** (decade + 1)
        index = np.arange(parts + 1)
        step = np.float64((high - low) / np.float32(parts))
        from_low = (step * index + np.float64(low)).astype(np.float32)
        from_high = (np.float64(high) - step * (parts - index)).astype(np.float32)
        points = np.where(index < (parts + 1) // 2, from_low, from_high)
        middles = (points[:-1] + points[1:]) / np.float32(2)
        scaled = np.float32(10.0 ** (decade - 6)) * middles
        values += scaled.tolist()
        if signed:
            values += (-scaled).tolist()
    return tuple(sorted(values))


# QLoRA (arXiv:2305.14314), appendix E.
NF4 = Format(
    "nf4",
    id=0,
    bits=4,
    codes=(
        -1.0,
        -0.6961928009986877,
        -0.5250730514526367,
        -0.39491748809814453,
        -0.28444138169288635,
        -0.18477343022823334,
        -0.09105003625154495,
        0.0,
        0.07958029955625534,
        0.16093020141124725,
        0.24611230194568634,
        0.33791524171829224,
        0.44070982933044434,
        0.5626170039176941,
        0.7229568362236023,
        1.0,
    ),
)

# One sign bit, two exponent bits, one mantissa bit, divided by the largest value 12.
# The negative zero is stored as +0, as bitsandbytes' table has it.
_FP4_MAGNITUDES = (0.0, 0.0625, 8.0, 12.0, 4.0, 6.0, 2.0, 3.0)
FP4 = Format(
    "fp4",
    id=1,
    bits=4,
    codes=tuple(
        float(np.float32(sign * m) / np.float32(12)) + 0.0
        for sign in (1, -1)
        for m in _FP4_MAGNITUDES
    ),
)

DYNAMIC8 = Format("dynamic8", id=2, bits=8, codes=_dynamic_map(signed=True))
# For non-negative data (the second moment of an optimizer); not a weight format.
DYNAMIC8_UNSIGNED = Format("dynamic8_unsigned", id=3, bits=8, codes=_dynamic_map(signed=False))

FORMATS = {f.name: f for f in (NF4, FP4, DYNAMIC8, DYNAMIC8_UNSIGNED)}
WEIGHT_FORMATS = ("nf4", "fp4", "dynamic8")
BY_ID = {f.id: f for f in FORMATS.values()}


def _float_literal(value: np.float32) -> str:
    text = float(value).hex()
    return text + "f"


def _initializer(name: str, items: list[str], per_line: int) -> str:
    lines = [", ".join(items[i : i + per_line]) for i in range(0, len(items), per_line)]
    body = ", \\\n   ".join(lines)
    return f"#define {name} \\\n  {{{body}}}\n"


def codes_header() -> str:
    """The text of ``csrc/include/nf4/codes.h``.

    Tables are initializer-list macros because a namespace-scope constexpr array cannot be indexed
    in device code; a macro fills ``__constant__`` memory and host tables alike.
    """
    out = [
        "// Written by `python -m nf4.formats`. Do not edit: tests compare it with nf4/formats.py.",
        "// clang-format off",
        "#pragma once",
        "",
        f"#define NF4_ABSMAX_FLOOR {_float_literal(np.float32(ABSMAX_FLOOR))}  // {ABSMAX_FLOOR}",
        f"#define NF4_NESTED_BLOCK_SIZE {NESTED_BLOCK_SIZE}",
        f"#define NF4_OFFSET_CHUNK {OFFSET_CHUNK}",
        "",
    ]
    for fmt in FORMATS.values():
        out.append(f"#define NF4_FORMAT_{fmt.name.upper()} {fmt.id}")
    out.append("")
    for fmt in FORMATS.values():
        stem = f"NF4_{fmt.name.upper()}"
        per_line = 4
        out.append("// Value of each code, in code order.")
        out.append(_initializer(f"{stem}_CODES", [_float_literal(v) for v in fmt.values], per_line))
        out.append("// Midpoints of neighbouring values, ascending.")
        out.append(
            _initializer(
                f"{stem}_THRESHOLDS", [_float_literal(v) for v in fmt.thresholds], per_line
            )
        )
        if fmt.bits == 4:
            out.append("// Codes sorted by value.")
            out.append(_initializer(f"{stem}_ORDER", [str(i) for i in fmt.order], 16))
    return "\n".join(out)


def main() -> None:
    from pathlib import Path

    path = Path(__file__).resolve().parent.parent / "csrc" / "include" / "nf4" / "codes.h"
    path.write_text(codes_header())
    print(path)


if __name__ == "__main__":
    main()
