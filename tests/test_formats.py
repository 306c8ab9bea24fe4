"""The code tables against the papers that define them, and the generated C++ header."""

from __future__ import annotations

import re
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest

from nf4 import formats

HEADER = Path(__file__).parent.parent / "csrc" / "include" / "nf4" / "codes.h"
# Appendix E of QLoRA, arXiv:2305.14314.
QLORA = [
    *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453),
    *(-0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0),
    *(0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224),
    *(0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
]
FP4 = ["0", "1/192", "2/3", "1", "1/3", "1/2", "1/6", "1/4"]

every_format = pytest.mark.parametrize("fmt", formats.FORMATS.values(), ids=lambda f: f.name)


def test_nf4_is_the_table_of_the_paper() -> None:
    assert formats.NF4.values.tolist() == QLORA
    assert formats.NF4.order == tuple(range(16))
    assert formats.NF4.zero_code == 7


def test_nf4_follows_from_normal_quantiles() -> None:
    """Section 3 of the paper: 8 positive and 7 negative quantiles of N(0, 1), and zero."""
    from statistics import NormalDist

    offset = (1 - 1 / (2 * 15) + 1 - 1 / (2 * 16)) / 2
    quantile = NormalDist().inv_cdf
    positive = [quantile(p) for p in np.linspace(offset, 0.5, 9)[:-1]]
    negative = [-quantile(p) for p in np.linspace(offset, 0.5, 8)[:-1]]
    values = np.array(sorted([*positive, 0.0, *negative])) / max(positive)
    np.testing.assert_allclose(formats.NF4.values, values, atol=2e-7)


def test_fp4_is_the_documented_table() -> None:
    magnitudes = [np.float32(float(Fraction(m))) for m in FP4]
    assert formats.FP4.values[:8].tolist() == magnitudes
    assert formats.FP4.values[8:].tolist() == [-m for m in magnitudes]
    assert not np.signbit(formats.FP4.values[8])  # the second zero is +0
    assert formats.FP4.order == (11, 10, 13, 12, 15, 14, 9, 0, 8, 1, 6, 7, 4, 5, 2, 3)
    assert formats.FP4.zero_code == 0


@pytest.mark.parametrize("signed", [True, False], ids=["signed", "unsigned"])
def test_dynamic_map_has_the_documented_shape(signed: bool) -> None:
    """Seven decades, each twice as finely divided as the one below; 0 and 1 complete the map."""
    fmt = formats.DYNAMIC8 if signed else formats.DYNAMIC8_UNSIGNED
    values = fmt.values
    assert values.size == 256 and (np.diff(values) > 0).all()
    assert {0.0, 1.0} < set(values.tolist())
    rest = values[(values > 0) & (values < 1)]
    for decade in range(7):
        top = 10.0 ** (decade - 6)
        inside = rest[(rest > 0.1 * top) & (rest < top)]
        parts = 2 ** (decade + (0 if signed else 1))
        middles = (np.arange(parts) + 0.5) * (0.9 / parts) + 0.1
        np.testing.assert_allclose(inside, middles * top, rtol=3e-7)
    if signed:
        assert sorted(-values[values < 0]) == sorted(rest)
    else:
        assert values.min() == 0


@every_format
def test_thresholds_are_float32_midpoints(fmt: formats.Format) -> None:
    ordered = [Fraction(float(fmt.values[code])) for code in fmt.order]
    assert ordered == sorted(ordered)
    assert fmt.thresholds.dtype == np.float32 and fmt.thresholds.size == len(fmt.codes) - 1
    for low, high, threshold in zip(ordered, ordered[1:], fmt.thresholds, strict=False):
        middle = (low + high) / 2
        error = abs(Fraction(float(threshold)) - middle)
        for neighbour in (-np.inf, np.inf):
            other = np.nextafter(threshold, np.float32(neighbour))
            assert error <= abs(Fraction(float(other)) - middle)


@every_format
def test_codes_are_float32_and_numbered(fmt: formats.Format) -> None:
    assert len(fmt.codes) == 2**fmt.bits
    assert sorted(fmt.order) == list(range(len(fmt.codes)))
    assert all(float(np.float32(code)) == code for code in fmt.codes)
    assert formats.BY_ID[fmt.id] is formats.FORMATS[fmt.name] is fmt
    assert fmt.values[fmt.zero_code] == 0


@pytest.mark.parametrize("numel", [0, 1, 2, 3, 64, 2**33 + 1])
def test_packed_bytes(numel: int) -> None:
    assert formats.NF4.packed_bytes(numel) == formats.FP4.packed_bytes(numel) == -(-numel // 2)
    assert formats.DYNAMIC8.packed_bytes(numel) == numel


def test_header_is_up_to_date() -> None:
    """If this fails, run ``python -m nf4.formats``."""
    assert HEADER.read_text() == formats.codes_header()


@every_format
def test_header_holds_the_exact_values(fmt: formats.Format) -> None:
    """The C++ literals, parsed back, are the tables bit for bit."""
    text = HEADER.read_text().replace("\\\n", " ")
    for name, table in (("CODES", fmt.values), ("THRESHOLDS", fmt.thresholds)):
        body = re.search(rf"#define NF4_{fmt.name.upper()}_{name}\s+\{{(.*?)\}}", text).group(1)
        literals = [item.strip() for item in body.split(",")]
        assert all(literal.endswith("f") for literal in literals)
        parsed = np.array([float.fromhex(item[:-1]) for item in literals], np.float32)
        assert np.array_equal(parsed.view(np.int32), table.view(np.int32))
