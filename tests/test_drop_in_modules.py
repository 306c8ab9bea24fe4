"""The modules and functions that nf4.drop_in presents, beside bitsandbytes' own.

Where a test runs on both libraries, an expected failure on bitsandbytes is one of the defects that
nf4 must not have; each names what bitsandbytes 0.50.2 does.
"""

from __future__ import annotations

import copy
import importlib
import pickle
import sys
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import nf4

pytestmark = pytest.mark.usefixtures("one_thread")


def _imported_apart() -> SimpleNamespace:
    """nf4.drop_in's modules without its being active in the tests' process."""
    early = {n: sys.modules.pop(n) for n in ("transformers", "peft", "trl") if n in sys.modules}
    try:
        drop_in = importlib.import_module("nf4.drop_in")
        drop_in.uninstall()
    finally:
        sys.modules.update(early)
    return SimpleNamespace(
        nn=importlib.import_module("nf4.drop_in.modules"),
        functional=importlib.import_module("nf4.drop_in.functional"),
    )


def _library(name: str) -> Any:
    if name == "nf4":
        return _imported_apart()
    return pytest.importorskip("bitsandbytes")


OURS = pytest.param("nf4")


def defect(reason: str, strict: bool = True) -> Any:
    """Both libraries, bitsandbytes failing."""
    theirs = pytest.param("bitsandbytes", marks=pytest.mark.xfail(reason=reason, strict=strict))
    return pytest.mark.parametrize("library", [OURS, theirs])


both = pytest.mark.parametrize("library", ["nf4", "bitsandbytes"])


def layer(library: Any, *, bias: bool = True, seed: int = 0, **kwargs: Any) -> nn.Module:
    """A quantized 96 -> 64 layer, the same in both libraries."""
    torch.manual_seed(seed)
    made = library.nn.Linear4bit(96, 64, bias=bias, quant_type="nf4", **kwargs)
    return made.to("cpu")


# What bitsandbytes' users rely on: the same bytes, keys, dtypes and errors.


@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_functions_agree_with_bitsandbytes(quant_type: str, nested: bool, dtype: Any) -> None:
    ours, theirs = _library("nf4").functional, _library("bitsandbytes").functional
    # Whole blocks a row: bitsandbytes' CPU dequantize decodes other shapes wrongly.
    weight = torch.randn(96, 128).to(dtype)
    kwargs = {"quant_type": quant_type, "compress_statistics": nested}
    codes, state = ours.quantize_4bit(weight, **kwargs)
    their_codes, their_state = theirs.quantize_4bit(weight, **kwargs)
    assert torch.equal(codes, their_codes) and codes.shape == their_codes.shape
    if not nested:
        assert torch.equal(state.absmax, their_state.absmax)
    for mine, other in zip(state[:], their_state[:], strict=True):
        assert type(mine) is type(other) or isinstance(mine, ours.QuantState)
    decoded = ours.dequantize_4bit(codes, state)
    their_decoded = theirs.dequantize_4bit(their_codes, their_state)
    assert decoded.dtype is dtype
    # The nested offset may be an ulp from theirs, which moves a scale to the next code at times.
    error = (decoded.float() - their_decoded.float()).abs().max()
    assert error <= (0.03 if nested else 0.01) * their_decoded.float().abs().max()

    packed, their_packed = state.as_dict(packed=True), their_state.as_dict(packed=True)
    assert packed.keys() == their_packed.keys()
    assert {k: v.dtype for k, v in packed.items()} == {k: v.dtype for k, v in their_packed.items()}
    assert state.as_dict().keys() == their_state.as_dict().keys()
    # Each reads what the other wrote. On some CPUs the last bit of their float16 differs.
    rounding = 2.0**-10 if dtype is torch.float16 else 0.0
    read = ours.QuantState.from_dict({f"w.weight.{k}": v for k, v in their_packed.items()}, "cpu")
    back = theirs.QuantState.from_dict(dict(packed), torch.device("cpu"))
    for one, other in (
        (ours.dequantize_4bit(their_codes, read), their_decoded),
        (theirs.dequantize_4bit(codes, back), decoded),
    ):
        torch.testing.assert_close(one, other, rtol=rounding, atol=rounding * 2.0**-14)
    assert read == ours.QuantState.from_dict(dict(their_packed), "cpu") and read != 3


@pytest.mark.parametrize("blocksize", [64, 256, 4096])
def test_blockwise_agrees_with_bitsandbytes(blocksize: int) -> None:
    ours, theirs = _library("nf4").functional, _library("bitsandbytes").functional
    x = torch.randn(7, 1000)
    codes, state = ours.quantize_blockwise(x, blocksize=blocksize)
    their_codes, their_state = theirs.quantize_blockwise(x, blocksize=blocksize)
    assert codes.shape == x.shape and torch.equal(state.absmax, their_state.absmax)
    # Nearly the same codes, and ours the nearer where they differ.
    assert (codes != their_codes).float().mean() < 0.01
    error = (ours.dequantize_blockwise(codes, state) - x).abs()
    their_error = (theirs.dequantize_blockwise(their_codes, their_state) - x).abs()
    assert (error <= their_error + 1e-6).all()
    assert torch.equal(
        ours.dequantize_blockwise(their_codes, absmax=their_state.absmax, blocksize=blocksize),
        theirs.dequantize_blockwise(their_codes, their_state),
    )
    assert torch.equal(ours.create_dynamic_map(), theirs.create_dynamic_map().float())
    nested_codes, nested = ours.quantize_blockwise(x, blocksize=64, nested=True)
    assert nested.nested and (ours.dequantize_blockwise(nested_codes, nested) - x).abs().max() < 0.2
    with pytest.raises(ValueError, match="dynamic8 table"):
        ours.quantize_blockwise(x, code=torch.linspace(-1, 1, 256))


@both
def test_matmul_4bit(library: str) -> None:
    lib = _library(library)
    matmul = lib.functional.matmul_4bit if library == "nf4" else lib.matmul_4bit
    weight, x, bias = torch.randn(64, 96), torch.randn(5, 96, requires_grad=True), torch.randn(64)
    codes, state = lib.functional.quantize_4bit(weight, quant_type="nf4")
    dense = lib.functional.dequantize_4bit(codes, state)
    y = matmul(x, codes.t(), quant_state=state, bias=bias)
    assert torch.allclose(y, x @ dense.t() + bias, atol=1e-4)
    (grad,) = torch.autograd.grad(y.sum(), x)
    assert torch.allclose(grad, dense.sum(0).expand(5, -1), atol=1e-4)


@both
def test_a_layer_quantizes_on_its_first_move(library: str) -> None:
    lib = _library(library)
    made = lib.nn.LinearNF4(96, 64)
    float_weights = {"weight": torch.randn(64, 96), "bias": torch.randn(64)}
    assert made.weight.shape == (64, 96) and set(made.state_dict()) == {"weight", "bias"}
    made.load_state_dict(float_weights)
    made = made.to(torch.bfloat16)
    assert made.weight.shape == (64, 96)  # a dtype alone does not quantize
    made = made.to("cpu")
    assert made.weight.dtype is torch.uint8 and made.weight.shape == (3072, 1)
    assert not made.weight.requires_grad and made.weight.quant_state.dtype is torch.bfloat16
    codes = made.weight.data.clone()
    assert torch.equal(made.to("cpu").weight.data, codes)  # once only
    assert isinstance(made, lib.nn.Linear4bit) and isinstance(made.weight, lib.nn.Params4bit)
    for x in (torch.randn(3, 96), torch.randn(2, 3, 96), torch.randn(0, 96)):
        assert made(x).dtype is torch.float32 and made(x).shape == (*x.shape[:-1], 64)
    # The output has the input's dtype also under autocast.
    with torch.autocast("cpu", torch.bfloat16):
        assert made(torch.randn(3, 96)).dtype is torch.float32


def test_state_dict_has_bitsandbytes_keys_and_bytes() -> None:
    ours, theirs = layer(_library("nf4")), layer(_library("bitsandbytes"))
    mine, other = ours.state_dict(), theirs.state_dict()
    assert mine.keys() == other.keys()
    for key in mine:
        assert mine[key].dtype is other[key].dtype and mine[key].shape == other[key].shape, key
        if "quant_state" not in key and "nested" not in key and key != "weight.absmax":
            assert torch.equal(mine[key], other[key]), key


def test_copies_are_independent() -> None:
    made, x = layer(_library("nf4")), torch.randn(3, 96)
    expected = made(x)
    for other in (copy.deepcopy(made), pickle.loads(pickle.dumps(made))):
        assert type(other.weight) is type(made.weight) and torch.equal(other(x), expected)
        other.weight.data.zero_()
        other.weight.quant_state.absmax.zero_()
    assert torch.equal(made(x), expected)


def test_isinstance_holds_for_nf4s_own_layers() -> None:
    modules = _library("nf4").nn
    own, fp4 = nf4.NF4Linear(64, 64), nf4.NF4Linear(64, 64, format="fp4")
    assert isinstance(own, modules.Linear4bit) and isinstance(own, modules.LinearNF4)
    assert not isinstance(own, modules.LinearFP4) and isinstance(fp4, modules.LinearFP4)
    assert isinstance(nf4.NF4Embedding(8, 64), modules.EmbeddingNF4)
    assert isinstance(own.weight, modules.Params4bit)
    for other in (nn.Linear(4, 4), own.bias, torch.zeros(4, 1, dtype=torch.uint8)):
        assert not isinstance(other, (modules.Linear4bit, modules.Params4bit))


def test_an_unquantized_layer_says_so() -> None:
    with pytest.raises(RuntimeError, match=r'\.to\("cpu"\) included'):
        _library("nf4").nn.Linear4bit(96, 64)(torch.randn(1, 96))


@both
def test_embedding(library: str) -> None:
    made = _library(library).nn.EmbeddingNF4(50, 128)
    weight = made.weight.data.clone()
    made = made.to("cpu")
    ids = torch.randint(0, 50, (3, 4))
    assert made(ids).shape == (3, 4, 128)
    assert (made(ids) - weight[ids]).abs().mean() < 0.1


def test_over_meta_and_under_peft() -> None:
    peft = pytest.importorskip("peft")
    lib = _library("nf4")
    source = layer(lib).state_dict()
    made = lib.nn.Linear4bit(96, 64, quant_type="nf4", device="meta")
    assert made.weight.is_meta and made.to_empty(device="cpu").weight.device.type == "cpu"
    made.load_state_dict(source)
    assert all(torch.equal(made.state_dict()[k], source[k]) for k in source)
    model = nn.Sequential(made)
    wrapped = peft.get_peft_model(model, peft.LoraConfig(target_modules=["0"]))
    adapted = wrapped.base_model.model[0]
    assert type(adapted).__name__ == "LoraNF4" and adapted.unfused_reason() is None
    before = made.weight.data.clone()
    wrapped.merge_adapter()
    wrapped.unmerge_adapter()
    assert torch.equal(made.weight.data, before)


# Defects.


def _gradients(made: nn.Module, x: Tensor) -> list[Tensor]:
    """dx of a layer after an adapter-like product, and the adapter's gradient."""
    torch.manual_seed(5)
    scale = torch.randn(96, requires_grad=True)
    x = x.detach().requires_grad_()
    made(x * scale).square().sum().backward()
    assert x.grad is not None and scale.grad is not None, "no gradient"
    return [x.grad, scale.grad]


@defect("B5: an eval() forward repacks the weight and later gradients are lost", strict=False)
def test_gradients_after_an_evaluation(library: str) -> None:
    made, x = layer(_library(library), compute_dtype=torch.bfloat16), torch.randn(4, 96)
    expected = _gradients(made.train(), x)
    with torch.no_grad():
        made.eval()(x)
    for got, reference in zip(_gradients(made.train(), x), expected, strict=True):
        assert torch.equal(got, reference)


@defect("B6: saving after an eval() forward rounds the scales", strict=False)
def test_saved_weights_after_an_evaluation(library: str) -> None:
    # Wide enough for the packing that bitsandbytes does on such CPUs.
    torch.manual_seed(0)
    made = _library(library).nn.LinearNF4(256, 256, bias=False, compute_dtype=torch.bfloat16)
    made = made.to("cpu")
    before = {k: v.clone() for k, v in made.state_dict().items()}
    with torch.no_grad():
        made.eval()(torch.randn(4, 256))
    after = made.state_dict()
    assert before.keys() == after.keys() and all(torch.equal(before[k], after[k]) for k in before)


@defect("B7: packed bytes in a float quant_storage are cast by value")
@pytest.mark.parametrize("cast", ["half", "float", "double"])
def test_a_cast_leaves_float_storage_alone(library: str, cast: str) -> None:
    made, x = layer(_library(library), quant_storage=torch.bfloat16, bias=False), torch.randn(3, 96)
    assert made.weight.dtype is torch.bfloat16 and made.weight.shape == (1536, 1)
    expected = made.train()(x)
    assert torch.equal(getattr(made, cast)()(x), expected)


@defect("B8: strict load_state_dict refuses a quantized state dict")
def test_load_state_dict_of_quantized_weights(library: str) -> None:
    lib = _library(library)
    source, target = layer(lib, seed=0), layer(lib, seed=1)
    target.load_state_dict(source.state_dict())
    x = torch.randn(3, 96)
    assert torch.equal(target(x), source(x))


@defect("B9: the forward casts the bias in place, which dynamo refuses")
def test_compiles_with_a_bias_of_another_dtype(library: str) -> None:
    torch._dynamo.reset()
    made, x = layer(_library(library), compute_dtype=torch.bfloat16), torch.randn(3, 96)
    compiled = torch.compile(made.train(), fullgraph=True, backend="eager")
    assert torch.allclose(compiled(x), made(x), atol=0.05)
    assert made.bias.dtype is torch.float32


@defect("B10: unmerging requantizes: 85 % of the bytes of a layer change")
def test_unmerge_restores_the_bytes(library: str) -> None:
    peft = pytest.importorskip("peft")
    made = layer(_library(library), bias=False)
    model = nn.Sequential(made)
    model.is_loaded_in_4bit = True
    model = peft.get_peft_model(model, peft.LoraConfig(r=8, target_modules=["0"]))
    nn.init.normal_(model.base_model.model[0].lora_B["default"].weight)
    before = model.base_model.model[0].base_layer.weight.data.clone()
    model.merge_adapter()
    model.unmerge_adapter()
    assert torch.equal(model.base_model.model[0].base_layer.weight.data, before)


@defect("merging requantizes code points: 0.6 to 4 % of a small adapter stays")
def test_merging_keeps_a_small_adapter(library: str) -> None:
    peft = pytest.importorskip("peft")
    lib = _library(library)
    made = lib.nn.LinearNF4(512, 512, bias=False).to("cpu")
    model = nn.Sequential(made)
    model.is_loaded_in_4bit = True
    model = peft.get_peft_model(model, peft.LoraConfig(r=8, target_modules=["0"]))
    layer = model.base_model.model[0]

    def weight() -> Tensor:
        now = layer.base_layer.weight
        if now.dtype is torch.uint8:
            return lib.functional.dequantize_4bit(now.data, now.quant_state)
        return now.detach().clone()

    before, up = weight(), layer.lora_B["default"].weight
    nn.init.normal_(up)
    up.data *= 0.01 * before.norm() / layer.get_delta_weight("default").norm()
    delta = layer.get_delta_weight("default").detach()
    model.merge_adapter()
    assert ((weight() - before) * delta).sum() / delta.square().sum() > 0.95


def test_defaults_are_qloras() -> None:
    """B14: bitsandbytes' defaults are fp4, single quantization and float32."""
    ours = nf4.NF4Config()
    assert (ours.format, ours.double_quant, ours.compute_dtype) == ("nf4", True, None)
    transformers = pytest.importorskip("transformers")
    theirs = transformers.BitsAndBytesConfig(load_in_4bit=True)
    assert (theirs.bnb_4bit_quant_type, theirs.bnb_4bit_use_double_quant) == ("fp4", False)
    assert theirs.bnb_4bit_compute_dtype is torch.float32
