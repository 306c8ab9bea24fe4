"""What the functions of nf4 say of wrong arguments: ``op: rule, got value``."""

from __future__ import annotations

import math

import pytest
import torch
from cases import K, N, R, lora_arguments
from torch import Tensor

import nf4


@pytest.mark.parametrize(
    "arguments, kind, message",
    [
        ({"block_size": 48}, ValueError, r"block_size must be one of 32, .*4096, got 48"),
        ({"block_size": 0}, ValueError, r"got 0"),
        ({"block_size": 8192}, ValueError, r"got 8192"),
        ({"format": "nf5"}, ValueError, r"format must be one of nf4, .*got 'nf5'"),
        ({"format": "dynamic8_unsigned"}, ValueError, r"format must be"),
        ({"weight": torch.ones(4, dtype=torch.int32)}, TypeError, r"got torch.int32"),
        ({"weight": torch.ones(4, dtype=torch.float64)}, TypeError, r"got torch.float64"),
        ({"weight": torch.ones(4, dtype=torch.complex64)}, TypeError, r"got torch.complex64"),
    ],
)
def test_quantize(arguments: dict, kind: type[Exception], message: str) -> None:
    with pytest.raises(kind, match=rf"^nf4\.quantize: .*{message}"):
        nf4.quantize(**{"weight": torch.randn(4, 64), **arguments})


@pytest.mark.parametrize(
    "arguments, kind, message",
    [
        ({"dtype": torch.int8}, TypeError, r"dtype must be .*got torch.int8"),
        ({"dtype": torch.float64}, TypeError, r"dtype must be .*got torch.float64"),
        ({"out": torch.empty(3, 64)}, ValueError, r"out must be .*\[4, 64\], got .*\[3, 64\]"),
        ({"out": torch.empty(64, 4).t()}, ValueError, r"out must be contiguous"),
        ({"out": torch.empty(4, 64, dtype=torch.int8)}, ValueError, r"out must be .*int8"),
        (
            {"out": torch.empty(4, 64, device="meta")},
            ValueError,
            r"out must be on cpu, got meta",
        ),
        (
            {"out": torch.empty(4, 64), "dtype": torch.float16},
            ValueError,
            r"out must have dtype torch.float16, got torch.float32",
        ),
    ],
)
def test_dequantize(arguments: dict, kind: type[Exception], message: str) -> None:
    with pytest.raises(kind, match=rf"^nf4\.dequantize: .*{message}"):
        nf4.dequantize(nf4.quantize(torch.randn(4, 64)), **arguments)


WRONG_X = (
    (
        torch.randn(3, K - 1),
        ValueError,
        rf"x must have {K} features \(q is \[{N}, {K}\]\), got {K - 1}",
    ),
    (torch.tensor(1.0), ValueError, rf"x must have {K} features .*got a scalar"),
    (torch.randn(3, 0), ValueError, r"x must have .*got 0"),
    (torch.ones(3, K, dtype=torch.int64), TypeError, r"x must be a floating-point .*int64"),
    (torch.randn(3, K, device="meta"), ValueError, r"x must be on cpu like q, got meta"),
)


@pytest.mark.parametrize("x, kind, message", WRONG_X)
def test_x(x: Tensor, kind: type[Exception], message: str) -> None:
    i = lora_arguments(torch.device("cpu"))
    with pytest.raises(kind, match=rf"^nf4\.linear: {message}"):
        nf4.linear(x, i["q"])
    with pytest.raises(kind, match=rf"^nf4\.linear_lora: {message}"):
        nf4.linear_lora(**{**i, "x": x})


@pytest.mark.parametrize(
    "arguments, kind, message",
    [
        (
            {"bias": torch.randn(N + 1)},
            ValueError,
            rf"bias must have shape \[{N}\], got \[{N + 1}\]",
        ),
        ({"bias": torch.randn(1, N)}, ValueError, rf"bias must have shape \[{N}\]"),
        ({"lora_a": torch.randn(R, K + 1)}, ValueError, rf"lora_a must have shape \[r, {K}\]"),
        ({"lora_a": torch.randn(K)}, ValueError, rf"lora_a must have shape \[r, {K}\]"),
        (
            {"lora_b": torch.randn(N, R + 1)},
            ValueError,
            rf"lora_b must have shape \[{N}, {R}\]",
        ),
        ({"lora_b": torch.randn(R, N)}, ValueError, rf"lora_b must have shape \[{N}, {R}\]"),
        (
            {"lora_a": torch.randn(R, K).half()},
            TypeError,
            r"lora_a and lora_b must have one dtype, got .*float16 and .*float32",
        ),
        (
            {"lora_a": torch.randn(R, K, device="meta")},
            ValueError,
            r"lora_a and lora_b must be on cpu like x, got meta and cpu",
        ),
        (
            {"bias": torch.randn(N, device="meta")},
            ValueError,
            r"bias must be on cpu like x, got meta",
        ),
        ({"dropout_p": 1.0}, ValueError, r"dropout_p must be in \[0, 1\), got 1.0"),
        ({"dropout_p": -0.1}, ValueError, r"dropout_p must be in \[0, 1\), got -0.1"),
        ({"dropout_p": math.nan}, ValueError, r"dropout_p must be in \[0, 1\), got nan"),
    ],
)
def test_linear_lora(arguments: dict, kind: type[Exception], message: str) -> None:
    with pytest.raises(kind, match=rf"^nf4\.linear_lora: {message}"):
        nf4.linear_lora(**{**lora_arguments(torch.device("cpu")), **arguments})


def test_seed() -> None:
    i = {**lora_arguments(torch.device("cpu")), "dropout_p": 0.5}
    rule = r"^nf4\.linear_lora: seed must be int64 \[1\] on cpu, got "
    for seed in (
        torch.tensor([1], dtype=torch.int32),
        torch.tensor([1, 2]),
        torch.tensor(1),
        torch.tensor([1], device="meta"),
    ):
        with pytest.raises(ValueError, match=rule):
            nf4.linear_lora(**i, seed=seed)


def test_integer_adapters() -> None:
    i = lora_arguments(torch.device("cpu"))
    whole = {name: torch.ones_like(i[name], dtype=torch.int8) for name in ("lora_a", "lora_b")}
    with pytest.raises(TypeError, match=r"^nf4\.linear_lora: lora_a .*floating-point.*int8"):
        nf4.linear_lora(**{**i, **whole})


def test_weight_is_no_matrix() -> None:
    q = nf4.quantize(torch.randn(2, 3, 64))
    with pytest.raises(ValueError, match=r"q must be a matrix \[N, K\], got shape \[2, 3, 64\]"):
        nf4.linear(torch.randn(1, 64), q)
