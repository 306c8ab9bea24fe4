"""NF4Linear, Linear4bitLoRA and NF4Embedding as modules: state, casts, copies, gradients."""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch
from torch import nn

import nf4

LAYOUTS = [
    {"block_size": 64, "double_quant": True, "format": "nf4"},
    {"block_size": 128, "double_quant": False, "format": "fp4"},
    {"block_size": 32, "double_quant": True, "format": "dynamic8"},
]


def _layer(bias: bool = True, **layout: object) -> nf4.Linear4bitLoRA:
    linear = nn.Linear(100, 48, bias=bias)
    layer = nf4.Linear4bitLoRA.from_linear(linear, r=4, **layout)
    nn.init.normal_(layer.lora_B)
    return layer


def _same_bytes(a: nf4.NF4Linear, b: nf4.NF4Linear) -> None:
    for left, right in zip(a.q.tensors, b.q.tensors, strict=True):
        assert (left is None) == (right is None)
        if left is not None:
            assert left.dtype is right.dtype and torch.equal(left, right)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_state_dict_round_trip_is_strict_and_exact(layout: dict) -> None:
    layer, other = _layer(**layout), _layer(**layout)
    file = io.BytesIO()
    torch.save(layer.state_dict(), file)
    file.seek(0)
    assert other.load_state_dict(torch.load(file, weights_only=True), strict=True)
    _same_bytes(layer, other)
    x = torch.randn(3, 100)
    assert torch.equal(layer(x), other(x))


@pytest.mark.parametrize("layout", LAYOUTS[:2])
def test_loads_bitsandbytes_keys_and_adopts_their_layout(layout: dict) -> None:
    layer = nf4.NF4Linear.from_linear(nn.Linear(100, 48, bias=False), **layout)
    other = nf4.NF4Linear(100, 48, bias=False)
    other.load_state_dict(layer.q.state_dict(), strict=True)
    _same_bytes(layer, other)
    assert (other.block_size, other.format) == (layer.block_size, layer.format)
    with pytest.raises(ValueError, match=r"weight must have shape \[48, 99\], got \[48, 100\]"):
        nf4.NF4Linear(99, 48, bias=False).load_state_dict(layer.q.state_dict())


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("cast", ["half", "bfloat16", "double", "to"])
def test_casts_leave_codes_and_scales(layout: dict, cast: str) -> None:
    layer = _layer(**layout)
    arguments = ("cpu", torch.float16) if cast == "to" else ()
    cast_layer = getattr(copy.deepcopy(layer), cast)(*arguments)
    _same_bytes(layer, cast_layer)
    assert cast_layer.lora_A.dtype is not torch.float32
    assert cast_layer.bias.dtype is cast_layer.lora_A.dtype


def test_to_meta_and_back_allocates_the_same_layout() -> None:
    layer = _layer()
    empty = copy.deepcopy(layer).to("meta")
    assert all(t is None or t.is_meta for t in empty.q.tensors)
    restored = empty.to_empty(device="cpu")
    restored.load_state_dict(layer.state_dict())
    _same_bytes(layer, restored)


def test_copies_are_independent() -> None:
    layer = _layer()
    x = torch.randn(3, 100)
    expected = layer(x)
    for duplicate in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert torch.equal(duplicate(x), expected)
        duplicate.weight.data.zero_()
        assert torch.equal(layer(x), expected)


def test_lora_layer_starts_as_its_base() -> None:
    linear = nn.Linear(100, 48)
    base = nf4.NF4Linear.from_linear(linear)
    layer = nf4.Linear4bitLoRA.from_linear(linear, r=4)
    x = torch.randn(3, 100)
    torch.testing.assert_close(layer(x), base(x), rtol=0, atol=0)
    assert layer.scaling == 32 / 4
    assert nf4.Linear4bitLoRA.from_linear(linear, r=4, use_rslora=True).scaling == 32 / 2


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_output_dtype_rules(dtype: torch.dtype) -> None:
    layer = _layer()
    x = torch.randn(2, 3, 100, dtype=dtype)
    assert layer(x).dtype is dtype and layer(x).shape == (2, 3, 48)
    layer.compute_dtype = torch.bfloat16
    assert layer(x).dtype is dtype
    layer.compute_dtype = None
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert layer(x).dtype is torch.bfloat16


def test_an_eval_forward_changes_no_gradient() -> None:
    """bitsandbytes repacks the weight in place on the first eval forward (ecosystem B5)."""
    layer = _layer()
    x = torch.randn(5, 100).bfloat16()

    def gradients() -> list[torch.Tensor]:
        layer.train().zero_grad()
        inputs = x.clone().requires_grad_()
        layer(inputs).float().square().sum().backward()
        return [inputs.grad, layer.lora_A.grad.clone(), layer.lora_B.grad.clone()]

    state = copy.deepcopy(layer.state_dict())
    before = gradients()
    with torch.inference_mode():
        layer.eval()(x)
    for a, b in zip(before, gradients(), strict=True):
        assert torch.equal(a, b)
    for key, value in layer.state_dict().items():
        assert torch.equal(value, state[key])


@pytest.mark.parametrize("width", [64, 128, 100])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_embedding_rows_equal_the_dequantized_table(width: int, layout: dict) -> None:
    embedding = nn.Embedding(33, width)
    module = nf4.NF4Embedding.from_embedding(embedding, **layout)
    ids = torch.randint(0, 33, (4, 7))
    assert torch.equal(module(ids), module.dequantize()[ids])
    assert module(ids[:0]).shape == (0, 7, width)
    with pytest.raises(IndexError, match=r"ids must be in \[0, 33\), got 33"):
        module(torch.tensor([1, 33]))


def test_conv1d_comes_back_as_conv1d() -> None:
    conv1d = pytest.importorskip("transformers.pytorch_utils").Conv1D
    old = conv1d(48, 100)
    layer = nf4.NF4Linear.from_linear(old, format="dynamic8")
    x = torch.randn(3, 100)
    torch.testing.assert_close(layer(x), old(x), rtol=0.1, atol=0.01)
    new = layer.to_linear()
    assert type(new) is conv1d and new.weight.shape == old.weight.shape
    torch.testing.assert_close(new(x), layer(x))


def test_merge_without_a_base_warns_and_unmerge_restores_the_bytes() -> None:
    layer = _layer()
    before = [t.clone() for t in layer.q.tensors]
    x = torch.randn(3, 100)
    expected = layer(x)
    with pytest.warns(UserWarning, match="loses most of a small adapter"):
        layer.merge()
    assert layer.merged and not torch.equal(layer.q.packed, before[0])
    layer.merge()  # a second merge changes nothing
    layer.unmerge()
    for old, new in zip(before, layer.q.tensors, strict=True):
        assert torch.equal(old, new)
    assert torch.equal(layer(x), expected)
    with pytest.raises(ValueError, match=r"base must have shape \[48, 100\], got \[3, 3\]"):
        layer.merge(torch.zeros(3, 3))


def test_loading_a_state_undoes_a_merge() -> None:
    layer, other = _layer(), _layer()
    layer.merge(torch.zeros(48, 100))
    layer.load_state_dict(other.state_dict())
    assert not layer.merged
    x = torch.randn(3, 100)
    assert torch.equal(layer(x), other(x))


def test_bad_settings_are_refused() -> None:
    linear = nn.Linear(8, 8)
    with pytest.raises(ValueError, match="r must be at least 1, got 0"):
        nf4.Linear4bitLoRA.from_linear(linear, r=0)
    with pytest.raises(ValueError, match=r"lora_dropout must be in \[0, 1\), got 1"):
        nf4.Linear4bitLoRA.from_linear(linear, lora_dropout=1.0)
    with pytest.raises(ValueError, match="block_size must be one of"):
        nf4.NF4Config(block_size=48)
    with pytest.raises(ValueError, match="format must be one of nf4, fp4, dynamic8"):
        nf4.NF4Config(format="int4")


@pytest.mark.parametrize(
    "settings",
    [{}, {"compute_dtype": torch.bfloat16}, {"lora_dropout": 0.5}],
    ids=["plain", "compute_dtype", "dropout"],
)
def test_compiles_without_a_graph_break(settings: dict) -> None:
    """bitsandbytes breaks where the bias has another dtype than the computation (ecosystem B9)."""
    torch._dynamo.reset()
    layer = _layer(**settings).train()
    x = torch.randn(3, 100, requires_grad=True)

    def step(module: nn.Module) -> list[torch.Tensor]:
        torch.manual_seed(3)
        layer.zero_grad()
        x.grad = None
        y = module(x)
        y.square().sum().backward()
        return [y.detach(), x.grad, layer.lora_A.grad, layer.lora_B.grad]

    expected = step(layer)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    for got, want in zip(step(compiled), expected, strict=True):
        torch.testing.assert_close(got, want)


@pytest.mark.parametrize("kind", ["NF4Linear", "Linear4bitLoRA", "NF4Embedding"])
@pytest.mark.parametrize("strict", [False, True], ids=["traced", "strict"])
def test_exports_and_loads_again(kind: str, strict: bool) -> None:
    torch._dynamo.reset()
    x: torch.Tensor = torch.randn(3, 100)
    module: nn.Module = _layer()
    if kind == "NF4Linear":
        module = nf4.NF4Linear.from_linear(nn.Linear(100, 48))
    elif kind == "NF4Embedding":
        module, x = nf4.NF4Embedding.from_embedding(nn.Embedding(20, 32)), torch.arange(7)
    expected = module.eval()(x)
    rows = torch.export.Dim("rows")
    file = io.BytesIO()
    torch.export.save(
        torch.export.export(module, (x,), dynamic_shapes=({0: rows},), strict=strict), file
    )
    file.seek(0)
    loaded = torch.export.load(file).module()
    assert torch.equal(loaded(x), expected)
    assert torch.equal(loaded(x[:2]), module(x[:2]))
    assert torch.equal(module(x), expected)  # tracing left nothing behind


def test_meta_tensors_pass_through() -> None:
    """Shapes and dtypes without memory, as ``nn.Linear`` gives them."""
    layer = _layer().to("meta")
    x = torch.randn(2, 3, 100, dtype=torch.bfloat16, device="meta", requires_grad=True)
    y = layer(x)
    assert y.device.type == "meta" and y.shape == (2, 3, 48) and y.dtype is torch.bfloat16
    y.sum().backward()
    assert layer.lora_A.grad.shape == (4, 100) and x.grad.shape == x.shape
