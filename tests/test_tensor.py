"""QuantizedTensor: its fields, moves, and what its state dict refuses to read."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import nf4

State = dict[str, Tensor]
META = "weight.quant_state.bitsandbytes__nf4"


def encoded(value: object) -> Tensor:
    """The bytes of a value's JSON, as the state dict holds them."""
    return torch.tensor(list(json.dumps(value).encode()), dtype=torch.uint8)


def meta(**changes: Any) -> Callable[[State], None]:
    """A change of the JSON; None removes an entry."""

    def change(state: State) -> None:
        values = {**json.loads(bytes(state[META].tolist())), **changes}
        state[META] = encoded({k: v for k, v in values.items() if v is not None})

    return change


def drop(key: str) -> Callable[[State], None]:
    def change(state: State) -> None:
        del state[key]

    return change


def replace(key: str, function: Callable[[Tensor], Tensor]) -> Callable[[State], None]:
    def change(state: State) -> None:
        state[key] = function(state[key])

    return change


@pytest.mark.parametrize(
    ("change", "kind", "message"),
    [
        (drop("weight"), KeyError, "missing key 'weight'"),
        (drop("weight.absmax"), KeyError, r"missing key 'weight\.absmax'"),
        (drop("weight.nested_absmax"), KeyError, r"missing key 'weight\.nested_absmax'"),
        (drop(META), KeyError, r"missing key 'weight\.quant_state"),
        (replace("weight", lambda t: t[:-3]), ValueError, "packed must have 2400 elements"),
        (replace("weight.absmax", lambda t: t[1:]), ValueError, "absmax must have 75 elements"),
        (replace("weight.absmax", Tensor.float), ValueError, "absmax must be uint8 codes"),
        (replace("weight.nested_absmax", lambda t: t.repeat(2)), ValueError, "nested_absmax must"),
        (
            replace("weight.nested_absmax", Tensor.half),
            ValueError,
            "float32, got .*float16",
        ),
        (replace("weight.nested_absmax", lambda t: t / 0), ValueError, "nested_absmax.* finite"),
        (replace("weight.quant_map", lambda t: t.flip(0)), ValueError, "must be the nf4 table"),
        (replace(META, lambda t: t[:-1]), ValueError, "must hold JSON"),
        (replace(META, lambda t: t[:0]), ValueError, "must hold JSON"),
        (replace(META, lambda t: t + 100), ValueError, "must hold JSON"),
        (replace(META, lambda _: encoded([1])), ValueError, r"JSON object, got \[1\]"),
        (meta(quant_type="nf5"), ValueError, "quant_type must be one of nf4, .*got 'nf5'"),
        (meta(blocksize=0), ValueError, "blocksize must be one of 32, .*got 0"),
        (meta(blocksize="64"), ValueError, "blocksize must be one of .*got '64'"),
        (meta(dtype="int8"), ValueError, "dtype must be one of float32, .*got 'int8'"),
        (meta(dtype="__doc__"), ValueError, "dtype must be one of"),
        (meta(shape=[48, -100]), ValueError, r"shape must be a list of sizes, got \[48, -100\]"),
        (meta(shape="48"), ValueError, "shape must be a list of sizes, got '48'"),
        (meta(shape=[48, 101]), ValueError, "packed must have 2424 elements"),
        (meta(nested_blocksize=128), ValueError, "nested_blocksize must be 256, got 128"),
        (meta(nested_offset="x"), ValueError, "nested_offset must be a number, got 'x'"),
        (meta(nested_offset=float("nan")), ValueError, "nested_offset must be finite"),
        (meta(blocksize=None, shape=None), KeyError, "must name blocksize, shape"),
        (meta(nested_blocksize=None), KeyError, "must name nested_blocksize"),
    ],
)
def test_what_cannot_be_read_is_refused(
    change: Callable[[State], None], kind: type[Exception], message: str
) -> None:
    state = nf4.quantize(torch.randn(48, 100)).state_dict()
    change(state)
    with pytest.raises(kind, match=message):
        nf4.QuantizedTensor.from_state_dict(state)


def test_scales_that_are_not_finite_are_refused() -> None:
    for bad in (torch.nan, torch.inf):
        state = nf4.quantize(torch.randn(48, 100), double_quant=False).state_dict()
        state["weight.absmax"][7] = bad
        with pytest.raises(ValueError, match="weight: absmax must be finite"):
            nf4.QuantizedTensor.from_state_dict(state)


@pytest.mark.parametrize("format", ["nf4", "fp4", "dynamic8"])
@pytest.mark.parametrize("double_quant", [False, True])
@pytest.mark.parametrize("shape", [(), (0,), (48, 100), (3, 5, 7)], ids=str)
def test_state_dict_round_trip(format: str, double_quant: bool, shape: tuple[int, ...]) -> None:
    q = nf4.quantize(torch.randn(shape).bfloat16(), 128, double_quant, format)
    state = q.state_dict("layer.weight")
    state["another.weight"] = torch.zeros(1)
    back = nf4.QuantizedTensor.from_state_dict(state, "layer.weight")
    assert repr(back) == repr(q) and back.nbytes == q.nbytes and back.numel() == q.numel()
    for ours, theirs in zip(q.tensors, back.tensors, strict=True):
        assert (ours is None) == (theirs is None)
        assert ours is None or (ours.dtype is theirs.dtype and torch.equal(ours, theirs))


def test_moves_keep_the_layout() -> None:
    q = nf4.quantize(torch.randn(48, 100))
    there = q.to("meta")
    assert there.device.type == "meta" and all(t.is_meta for t in there.tensors if t is not None)
    assert (there.shape, there.dtype, there.layout) == (q.shape, q.dtype, q.layout)
    assert q.nbytes == 48 * 100 // 2 + 75 + 4 + 4
