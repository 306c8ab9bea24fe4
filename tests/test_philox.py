"""The generator of dropout masks: known vectors, an independent count, and statistics."""

from __future__ import annotations

import math

import pytest
import torch

from nf4.backends import philox as philox_words
from nf4.backends import reference

# kat_vectors of Random123 1.14: counter, key, output of philox4x32 with 10 rounds.
KNOWN = [
    (
        "00000000 00000000 00000000 00000000",
        "00000000 00000000",
        "6627e8d5 e169c58d bc57ac4c 9b00dbd8",
    ),
    (
        "ffffffff ffffffff ffffffff ffffffff",
        "ffffffff ffffffff",
        "408f276d 41c83b0e a20bc7c6 6d5451fd",
    ),
    (
        "243f6a88 85a308d3 13198a2e 03707344",
        "a4093822 299f31d0",
        "d16cfe09 94fdcceb 5001e420 24126ea1",
    ),
]


def _words(text: str) -> list[int]:
    return [int(word, 16) for word in text.split()]


def philox(counter: list[int], key: list[int]) -> list[int]:
    """Philox4x32-10 on Python integers."""
    mask = 2**32 - 1
    c, (k0, k1) = list(counter), key
    for _ in range(10):
        p0, p1 = 0xD2511F53 * c[0], 0xCD9E8D57 * c[2]
        c = [(p1 >> 32) ^ c[1] ^ k0, p1 & mask, (p0 >> 32) ^ c[3] ^ k1, p0 & mask]
        k0, k1 = (k0 + 0x9E3779B9) & mask, (k1 + 0xBB67AE85) & mask
    return c


@pytest.mark.parametrize("counter, key, output", KNOWN)
def test_known_vectors(counter: str, key: str, output: str) -> None:
    assert philox(_words(counter), _words(key)) == _words(output)
    got = philox_words.philox4x32_10(
        tuple(torch.tensor([word]) for word in _words(counter)),
        tuple(torch.tensor(word) for word in _words(key)),
    )
    assert [word.item() for word in got] == _words(output)


@pytest.mark.parametrize("seed", [0, 1, -1, 2**32 + 5, 2**63 - 1, -(2**63), None], ids=str)
@pytest.mark.parametrize("p", [0.0, 2.0**-32, 0.05, 0.5, 0.9, 1 - 2.0**-32])
def test_mask_follows_the_rule(p: float, seed: int | None) -> None:
    """Element e: word e % 4 of the counter e // 4 under the seed, as nf4.ops states it."""
    if seed is None:
        seed = int(torch.randint(-(2**63), 2**63 - 1, ()).item())
    shape = torch.Size((3, 67))
    mask = reference.dropout_mask(shape, p, torch.tensor([seed])).view(-1)

    key = [seed & 0xFFFFFFFF, (seed >> 32) & 0xFFFFFFFF]
    kept_value = torch.tensor(1.0 / (1.0 - p), dtype=torch.float32)
    for e, value in enumerate(mask):
        word = philox([e // 4, 0, 0, 0], key)[e % 4]
        assert value == (kept_value if word >= round(p * 2**32) else 0)


@pytest.mark.parametrize("first", [0, 4, 2**33, 2**34 - 4, 2**34, 2**40])
def test_counters_beyond_32_bits(first: int) -> None:
    """A stream may start anywhere; counters cross into their high word at element 2^34."""
    words = philox_words.random_words(9, torch.tensor([99]), first)
    for i, word in enumerate(words.tolist()):
        block = (first + i) // 4
        assert word == philox([block % 2**32, block >> 32, 0, 0], [99, 0])[(first + i) % 4]


@pytest.mark.parametrize("p", [0.05, 0.1, 0.5, 0.9])
def test_statistics(p: float) -> None:
    """The share of dropped elements, and the independence of neighbours, rows and seeds.

    Limits are five standard deviations: one run in a million fails.
    """
    rows, columns = 1000, 1024
    seed = torch.randint(-(2**63), 2**63 - 1, (1,))
    dropped = reference.dropout_mask(torch.Size((rows, columns)), p, seed) == 0
    deviation = math.sqrt(p * (1 - p) / dropped.numel())
    assert abs(dropped.double().mean().item() - p) < 5 * deviation

    other = reference.dropout_mask(torch.Size((rows, columns)), p, seed + 1) == 0
    flat = dropped.view(-1)
    pairs = {
        "neighbours": (flat[1:], flat[:-1]),
        "words of one counter and the next": (flat[4:], flat[:-4]),
        "rows": (dropped[1:], dropped[:-1]),
        "seeds": (dropped, other),
    }
    for name, (a, b) in pairs.items():
        correlation = ((a.double() - p) * (b.double() - p)).mean().item() / (p * (1 - p))
        assert abs(correlation) < 5 / math.sqrt(a.numel()), name


def test_mask_is_the_same_for_any_shape() -> None:
    """Only the flat index counts: checkpointing may reshape x."""
    seed = torch.tensor([1234])
    flat = reference.dropout_mask(torch.Size((120,)), 0.5, seed)
    for shape in ((2, 60), (3, 5, 8)):
        assert torch.equal(reference.dropout_mask(torch.Size(shape), 0.5, seed).view(-1), flat)
    assert torch.equal(reference.dropout_mask(torch.Size((7,)), 0.5, seed), flat[:7])
    assert reference.dropout_mask(torch.Size((0, 4)), 0.5, seed).shape == (0, 4)
