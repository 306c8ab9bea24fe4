"""nf4.quantize, dequantize, linear and linear_lora: autograd, checks, compile, autocast."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable

import pytest
import torch
from cases import K, N, R, lora_arguments
from torch import Tensor
from torch.utils.checkpoint import checkpoint

import nf4
from nf4.backends import reference


def leaves(arguments: dict) -> list[Tensor]:
    """The tensors of ``lora_arguments`` that take gradients."""
    return [arguments[name] for name in ("x", "bias", "lora_a", "lora_b")]


def grads(y: Tensor, arguments: dict) -> list[Tensor]:
    """Gradients of a fixed, uneven function of y."""
    loss = (y.float() * torch.linspace(-1, 1, y.numel(), device=y.device).view(y.shape)).sum()
    return list(torch.autograd.grad(loss, leaves(arguments)))


def assert_all_equal(ours: list[Tensor], theirs: list[Tensor]) -> None:
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


class TestGradients:
    @pytest.mark.parametrize("dropout_p", [0.0, 0.3])
    @pytest.mark.parametrize("double_quant", [False, True])
    def test_gradcheck(self, dropout_p: float, double_quant: bool) -> None:
        """Numerical against analytic derivatives in float64, on the reference."""
        q = nf4.quantize(torch.randn(5, 13), block_size=32, double_quant=double_quant)
        seed = torch.tensor([11])
        x, a, b, bias = (
            torch.randn(shape, dtype=torch.float64, requires_grad=True)
            for shape in ((2, 3, 13), (2, 13), (5, 2), (5,))
        )

        def lora(x: Tensor, a: Tensor, b: Tensor, bias: Tensor) -> Tensor:
            return nf4.linear_lora(x, q, a, b, 0.7, bias, dropout_p, seed=seed)

        with nf4.use_backend("reference"):
            assert torch.autograd.gradcheck(lora, (x, a, b, bias))
            assert torch.autograd.gradcheck(lambda x, bias: nf4.linear(x, q, bias), (x, bias))

    def test_only_the_reference_takes_float64(self, backend: str, device: torch.device) -> None:
        q = nf4.quantize(torch.randn(N, K, device=device))
        x = torch.randn(3, K, dtype=torch.float64, device=device)
        if backend == "reference":
            assert nf4.linear(x, q).dtype is torch.float64
            return
        with pytest.raises((RuntimeError, TypeError)):
            nf4.linear(x, q)

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
    def test_gradients_are_those_of_the_op(
        self, dtype: torch.dtype, backend: str, device: torch.device
    ) -> None:
        """And each has the dtype and shape of its leaf, with float32 adapters beside 16-bit x."""
        i = lora_arguments(device, dtype, torch.float32)
        seed = torch.tensor([5], device=device)
        y = nf4.linear_lora(**i, dropout_p=0.25, seed=seed)
        grad_y = torch.randn_like(y)
        dx, dbias, da, db = torch.autograd.grad(y, leaves(i), grad_y)

        ops = getattr(torch.ops, nf4.backends.namespace())
        weight, lora = i["q"].tensors, (i["lora_a"], i["lora_b"], 0.5, 0.25, seed)
        expected_y, s = ops.linear_lora(i["x"], *weight, i["bias"], *lora, N, *i["q"].layout)
        expected = ops.linear_lora_backward(
            grad_y, i["x"], s, *weight, *lora, *i["q"].layout, True, True
        )
        assert torch.equal(y, expected_y)
        assert_all_equal([dx, da, db], list(expected))
        torch.testing.assert_close(dbias, grad_y.sum((0, 1)))
        for gradient, leaf in zip((dx, dbias, da, db), leaves(i), strict=True):
            assert gradient.dtype is leaf.dtype and gradient.shape == leaf.shape

    def test_every_choice_of_leaves(self, backend: str, device: torch.device) -> None:
        """A leaf that takes no gradient changes none of the others."""
        i = lora_arguments(device)
        y = nf4.linear_lora(**i)
        grad_y = torch.randn_like(y)
        names = ("x", "bias", "lora_a", "lora_b")
        everything = dict(zip(names, torch.autograd.grad(y, leaves(i), grad_y), strict=True))
        for chosen in itertools.product((False, True), repeat=4):
            fresh = {n: i[n].detach().requires_grad_(c) for n, c in zip(names, chosen, strict=True)}
            y = nf4.linear_lora(**{**i, **fresh})
            assert y.requires_grad == any(chosen)
            if not any(chosen):
                continue
            y.backward(grad_y)
            for name, leaf in fresh.items():
                assert (leaf.grad is not None) == leaf.requires_grad
                if leaf.grad is not None:
                    assert torch.equal(leaf.grad, everything[name])

    def test_linear(self, backend: str, device: torch.device) -> None:
        i = lora_arguments(device)
        x, q, bias = i["x"], i["q"], i["bias"]
        grad_y = torch.randn(2, 5, N, device=device)
        dx, dbias = torch.autograd.grad(nf4.linear(x, q, bias), (x, bias), grad_y)
        dense = nf4.dequantize(q, torch.float32).double()
        torch.testing.assert_close(dx.double(), grad_y.double() @ dense, rtol=1e-5, atol=1e-4)
        torch.testing.assert_close(dbias, grad_y.sum((0, 1)))
        assert not nf4.linear(x.detach(), q).requires_grad

    def test_what_is_saved_for_the_backward(self, backend: str, device: torch.device) -> None:
        """x, the r-wide product, the seed and the parameters: no mask and no dense weight."""
        i = lora_arguments(device)
        saved: list[Tensor] = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
            nf4.linear_lora(**i, dropout_p=0.5)
        given = {t.data_ptr() for t in (*leaves(i), *i["q"].tensors)}
        new = [t for t in saved if t.data_ptr() not in given]
        assert sorted(t.numel() for t in new) == [1, 10 * R]

    def test_an_eval_forward_changes_no_gradient(self, backend: str, device: torch.device) -> None:
        """bitsandbytes repacks its weight in an eval forward and then loses gradients."""
        i = lora_arguments(device)
        fresh = grads(nf4.linear_lora(**i, dropout_p=0.0), i)
        before = [t.clone() for t in i["q"].tensors]
        with torch.no_grad():
            nf4.linear_lora(**i, training=False)
            nf4.linear(i["x"][:, :1], i["q"])
        with torch.inference_mode():
            nf4.linear_lora(**i, training=False)
        assert_all_equal(list(i["q"].tensors), before)
        assert_all_equal(grads(nf4.linear_lora(**i, dropout_p=0.0), i), fresh)

    def test_the_backward_stays_on_the_backend_of_the_forward(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        i = lora_arguments(torch.device("cpu"))
        calls = []
        original = reference.linear_lora_backward

        def counted(*args: object) -> tuple[Tensor, Tensor, Tensor]:
            calls.append(args)
            return original(*args)

        monkeypatch.setattr(reference, "linear_lora_backward", counted)
        with nf4.use_backend("reference"):
            y = nf4.linear_lora(**i)
        y.sum().backward()
        assert len(calls) == 1

    def test_second_derivatives_are_refused(self, backend: str, device: torch.device) -> None:
        i = lora_arguments(device)
        (dx,) = torch.autograd.grad(nf4.linear_lora(**i).square().sum(), i["x"], create_graph=True)
        with pytest.raises(RuntimeError, match="once_differentiable"):
            dx.sum().backward()


class TestDropout:
    def test_seed_fixes_the_mask(self, backend: str, device: torch.device) -> None:
        i = lora_arguments(device)
        seed = torch.tensor([77], device=device)
        first, second = (nf4.linear_lora(**i, dropout_p=0.5, seed=seed) for _ in range(2))
        assert torch.equal(first, second)
        other = nf4.linear_lora(**i, dropout_p=0.5, seed=seed + 1)
        assert not torch.equal(first, other)

    def test_torch_seed_fixes_the_mask(self, backend: str, device: torch.device) -> None:
        i = lora_arguments(device)
        torch.manual_seed(3)
        first, second = (nf4.linear_lora(**i, dropout_p=0.5) for _ in range(2))
        assert not torch.equal(first, second)
        torch.manual_seed(3)
        assert torch.equal(nf4.linear_lora(**i, dropout_p=0.5), first)

    def test_eval_drops_nothing(self, backend: str, device: torch.device) -> None:
        i = lora_arguments(device)
        plain = nf4.linear_lora(**i)
        assert torch.equal(nf4.linear_lora(**i, dropout_p=0.5, training=False), plain)

    @pytest.mark.parametrize("use_reentrant", [False, True])
    def test_checkpointing_sees_the_same_mask(
        self, use_reentrant: bool, backend: str, device: torch.device
    ) -> None:
        i = lora_arguments(device)

        def layer(x: Tensor) -> Tensor:
            return nf4.linear_lora(**{**i, "x": x}, dropout_p=0.5)

        torch.manual_seed(9)
        plain = layer(i["x"])
        plain_grads = grads(plain, i)
        torch.manual_seed(9)
        y = checkpoint(layer, i["x"], use_reentrant=use_reentrant)
        assert torch.equal(y, plain)
        loss = (y * torch.linspace(-1, 1, y.numel(), device=device).view(y.shape)).sum()
        loss.backward()
        assert_all_equal([t.grad for t in leaves(i)], plain_grads)


class TestAutocast:
    @pytest.mark.parametrize("x_dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
    def test_like_nn_linear(self, x_dtype: torch.dtype, backend: str, device: torch.device) -> None:
        """x is cast first, the output has the autocast dtype, gradients the leaves' dtypes."""
        i = lora_arguments(device, x_dtype, torch.float32)
        layer = torch.nn.Linear(K, N, device=device, dtype=x_dtype)
        with torch.autocast(device.type, torch.bfloat16):
            y = nf4.linear_lora(**i, dropout_p=0.25)
            base = nf4.linear(i["x"], i["q"], i["bias"])
            expected = layer(i["x"])
        assert y.dtype is base.dtype is expected.dtype is torch.bfloat16
        assert [g.dtype for g in grads(y, i)] == [t.dtype for t in leaves(i)]

        cast = {**i, "x": i["x"].bfloat16(), "bias": i["bias"].bfloat16()}
        assert torch.equal(base, nf4.linear(cast["x"], i["q"], cast["bias"]))

    def test_statistics_are_not_cast(self, backend: str, device: torch.device) -> None:
        i = lora_arguments(device)
        x = i["x"].detach()
        with torch.autocast(device.type, torch.bfloat16):
            q = nf4.quantize(torch.randn(N, K, device=device))
            assert nf4.dequantize(q).dtype is torch.float32
            y = nf4.linear(x, i["q"])
        assert q.nested_absmax.dtype is torch.float32
        assert torch.equal(y, nf4.linear(x.bfloat16(), i["q"]))


class TestCompile:
    """torch.compile(fullgraph=True): no graph break, the eager numbers."""

    def run(self, compiler: str, i: dict, function: Callable[..., Tensor], seed: int) -> None:
        compiled = torch.compile(function, backend=compiler, fullgraph=True)
        torch.manual_seed(seed)
        eager = function(i)
        torch.manual_seed(seed)
        y = compiled(i)
        torch.testing.assert_close(y, eager)
        for ours, theirs in zip(grads(y, i), grads(eager, i), strict=True):
            torch.testing.assert_close(ours, theirs)

    @pytest.fixture(autouse=True)
    def fresh_dynamo(self) -> None:
        torch._dynamo.reset()

    def test_lora(self, backend: str, device: torch.device) -> None:
        i = lora_arguments(device)
        seed = torch.tensor([5], device=device)

        def function(i: dict) -> Tensor:
            return torch.relu(nf4.linear_lora(**i, dropout_p=0.5, seed=seed)) * 2

        self.run("aot_eager", i, function, 1)

    @pytest.mark.timeout(300)  # compilers are started
    def test_inductor_and_a_drawn_seed(self, device_of_choice: torch.device) -> None:
        """The default compiler, with dropout whose seed is drawn inside the graph."""
        i = lora_arguments(device_of_choice)
        compiled = torch.compile(
            lambda i: torch.relu(nf4.linear_lora(**i, dropout_p=0.5)) * 2, fullgraph=True
        )
        y = compiled(i)
        assert not torch.equal(compiled(i), y)
        assert all(g.isfinite().all() for g in grads(y, i))
        self.run("inductor", i, lambda i: torch.relu(nf4.linear_lora(**i)) * 2, 1)

    def test_dynamic_batch(self, backend: str, device: torch.device) -> None:
        i = lora_arguments(device)
        compiled = torch.compile(
            lambda x: nf4.linear_lora(**{**i, "x": x}),
            backend="aot_eager",
            fullgraph=True,
            dynamic=True,
        )
        for rows in (2, 3, 8):
            x = torch.randn(rows, K, device=device)
            torch.testing.assert_close(compiled(x), nf4.linear_lora(**{**i, "x": x}))

    def test_quantize_and_dequantize(self, backend: str, device: torch.device) -> None:
        """Ops only: the finiteness check of nf4.quantize reads a flag and is no part of a graph."""
        weight = torch.randn(N, K, device=device)

        def round_trip(w: Tensor) -> Tensor:
            ops = getattr(torch.ops, nf4.backends.namespace())
            packed, absmax = ops.quantize(w, 64, 0)
            nested = ops.double_quantize(absmax)
            return ops.dequantize(packed, *nested, w.shape, 64, 0, torch.bfloat16)

        compiled = torch.compile(round_trip, backend="aot_eager", fullgraph=True)
        assert torch.equal(compiled(weight), round_trip(weight))

    def test_use_backend_is_guarded(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """A compiled function follows use_backend instead of keeping its first choice."""
        i = lora_arguments(torch.device("cpu"))
        compiled = torch.compile(
            lambda i: nf4.linear(i["x"].detach(), i["q"]), backend="aot_eager", fullgraph=True
        )
        calls = []
        original = reference.linear
        monkeypatch.setattr(reference, "linear", lambda *a: calls.append(a) or original(*a))
        compiled(i)
        by_default = len(calls)
        with nf4.use_backend("reference"):
            compiled(i)
        assert len(calls) == by_default + 1


class TestQuantize:
    @pytest.mark.parametrize("format", ["nf4", "fp4", "dynamic8"])
    @pytest.mark.parametrize("double_quant", [False, True])
    def test_fields(
        self, format: str, double_quant: bool, backend: str, device: torch.device
    ) -> None:
        weight = torch.randn(5, 33, dtype=torch.bfloat16, device=device)
        q = nf4.quantize(weight, 32, double_quant, format)
        assert (q.shape, q.dtype, q.block_size, q.format) == (
            weight.shape,
            weight.dtype,
            32,
            format,
        )
        assert q.nested is double_quant and q.device.type == device.type
        w = nf4.dequantize(q)
        assert w.dtype is weight.dtype and w.shape == weight.shape
        out = torch.empty(5, 33, device=device)
        assert nf4.dequantize(q, out=out) is out
        assert torch.equal(out, nf4.dequantize(q, torch.float32))

    def test_a_parameter_is_not_tracked(self, backend: str, device: torch.device) -> None:
        weight = torch.nn.Parameter(torch.randn(5, 33, device=device))
        q = nf4.quantize(weight)
        assert not any(t.requires_grad for t in q.tensors)

    @pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf], ids=str)
    @pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
    def test_non_finite_weights_are_refused(
        self, bad: float, dtype: torch.dtype, backend: str, device: torch.device
    ) -> None:
        weight = torch.randn(7, 70, dtype=dtype, device=device)
        row, column = (int(torch.randint(size, ())) for size in weight.shape)
        weight[row, column] = bad
        with pytest.raises(ValueError, match="must be finite") as error:
            nf4.quantize(weight)
        assert f"{bad} at index [{row}, {column}]" in str(error.value)
