"""The contract of nf4/ops.py on every backend: schemas, fake kernels, opcheck, dispatch."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from cases import DTYPES, Matmul, op
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._pytree import tree_leaves, tree_map_only

import nf4
from nf4 import formats
from nf4.ops import BACKENDS, NAMESPACES, SCHEMAS

CHECKS = (
    "test_schema",
    "test_faketensor",
    "test_autograd_registration",
    "test_aot_dispatch_dynamic",
)
# The optimizer's op takes lists of tensors that it changes in place: tests/test_adamw_step.py.
OPS = [name for name in SCHEMAS if name != "adamw_step"]


def arguments(
    name: str, device: torch.device, dtype: torch.dtype = torch.float32, nested: bool = True
) -> tuple[Any, ...]:
    """Arguments of one op: an odd, nested, biased case with dropout."""
    case = Matmul((2, 3), 9, 70, nested=nested, bias=True)
    weight, _ = case.weight(device)
    layout = (case.block_size, case.format_id)
    x = torch.randn(2, 3, case.k, dtype=dtype, device=device)
    grad_y = torch.randn(2, 3, case.n, dtype=dtype, device=device)
    bias = torch.randn(case.n, dtype=dtype, device=device)
    a, b = torch.randn(4, case.k, device=device), torch.randn(case.n, 4, device=device)
    lora = (a, b, 0.5, 0.25, torch.tensor([7], device=device))
    out = torch.empty(case.n, case.k, dtype=dtype, device=device)
    pair = [[t, t] for t in weight]
    loras = ([a, a], [b, b], [0.5, 2.0], 0.25, torch.tensor([7, 8], device=device), *layout)
    ss = [torch.randn(2, 3, 4, device=device) for _ in range(2)]
    return {
        "quantize": (x, *layout),
        "double_quantize": (torch.rand(300, device=device),),
        "dequantize": (*weight, [case.n, case.k], *layout, dtype),
        "dequantize_out": (*weight, *layout, out),
        "linear": (x, *weight, bias, case.n, *layout),
        "linear_backward": (grad_y, *weight, case.k, *layout),
        "linear_lora": (x, *weight, bias, *lora, case.n, *layout),
        "linear_lora_backward": (
            *(grad_y, x, torch.randn(2, 3, 4, device=device), *weight, *lora, *layout),
            *(True, True),
        ),
        "linear_lora_group": (x, *pair, [bias, None], *loras),
        "linear_lora_group_backward": (
            *([grad_y, torch.randn_like(grad_y)], x, ss, *pair, *loras),
            *(True, True),
        ),
    }[name]


def outputs(result: Any) -> list[Tensor]:
    """The tensors that an op returned or takes, out of lists too."""
    return [t for t in tree_leaves(result) if isinstance(t, Tensor)]


@pytest.mark.parametrize("name", OPS)
@pytest.mark.parametrize("nested", [False, True], ids=["plain", "nested"])
def test_opcheck(name: str, nested: bool, backend: str, device: torch.device) -> None:
    torch.library.opcheck(
        op(name).default, arguments(name, device, nested=nested), test_utils=CHECKS
    )


@pytest.mark.parametrize("name", OPS)
def test_opcheck_of_the_public_op(name: str, device_of_choice: torch.device) -> None:
    """``nf4::<op>`` on whatever this machine picks."""
    overload = getattr(torch.ops.nf4, name).default
    torch.library.opcheck(overload, arguments(name, device_of_choice), test_utils=CHECKS)


@pytest.mark.parametrize("name", OPS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_fake_kernels_agree(
    name: str, dtype: torch.dtype, backend: str, device: torch.device
) -> None:
    """Shapes, dtypes, devices and strides of the fake outputs are those of the real ones."""
    args = arguments(name, device, dtype)
    real = outputs(op(name)(*args))
    with FakeTensorMode() as mode:
        fake_args = tree_map_only(Tensor, mode.from_tensor, args)
        fake = outputs(op(name)(*fake_args))
    assert len(fake) == len(real)
    for f, r in zip(fake, real, strict=True):
        assert (f.shape, f.dtype, f.device, f.stride()) == (r.shape, r.dtype, r.device, r.stride())


@pytest.mark.parametrize("needs", [(True, False), (False, True), (False, False)], ids=str)
def test_fake_backward_leaves_out_what_is_not_needed(
    needs: tuple[bool, bool], backend: str, device: torch.device
) -> None:
    args = (*arguments("linear_lora_backward", device)[:-2], *needs)
    real = op("linear_lora_backward")(*args)
    with FakeTensorMode() as mode:
        fake_args = tree_map_only(Tensor, mode.from_tensor, args)
        fake = op("linear_lora_backward")(*fake_args)
    for f, r in zip(fake, real, strict=True):
        assert (f.shape, f.dtype) == (r.shape, r.dtype)


@pytest.mark.parametrize("name", OPS)
def test_outputs_share_no_memory(name: str, backend: str, device: torch.device) -> None:
    """Every output is a new tensor: a view of an input would change under the caller."""
    args = arguments(name, device)
    inside = {a.untyped_storage().data_ptr() for a in outputs(args)}
    for out in outputs(op(name)(*args)):
        assert out.untyped_storage().data_ptr() not in inside


@pytest.mark.parametrize("dtype", [*DTYPES, torch.uint8], ids=str)
def test_outputs_start_poisoned(dtype: torch.dtype, device_of_choice: torch.device) -> None:
    """What makes a missed store visible in every other test."""
    empty = torch.empty(1000, dtype=dtype, device=device_of_choice)
    assert (empty == 255).all() if dtype is torch.uint8 else empty.isnan().all()


@pytest.mark.parametrize("name", SCHEMAS)
def test_every_namespace_has_one_schema(name: str) -> None:
    schemas = {
        str(getattr(getattr(torch.ops, ns), name).default._schema).replace(f"{ns}::", "")
        for ns in NAMESPACES
    }
    assert len(schemas) == 1


def test_public_op_equals_the_chosen_backend(device_of_choice: torch.device) -> None:
    chosen = getattr(torch.ops, f"nf4_{nf4.backends.backend_for(device_of_choice)}")
    for name in OPS:
        args = arguments(name, device_of_choice)
        ours, theirs = getattr(torch.ops.nf4, name)(*args), getattr(chosen, name)(*args)
        for a, b in zip(outputs(ours), outputs(theirs), strict=True):
            assert torch.equal(a, b)


def test_use_backend() -> None:
    """Nesting, restoring after an error, and the two kinds of refusal."""
    assert nf4.backends.namespace() == "nf4"
    with nf4.use_backend("reference"):
        assert nf4.backends.namespace() == "nf4_reference"
        with pytest.raises(KeyError), nf4.use_backend("reference"):
            raise KeyError
        assert nf4.backends.namespace() == "nf4_reference"
    assert nf4.backends.namespace() == "nf4"

    with (
        pytest.raises(ValueError, match=r"nf4\.use_backend: name must be one of .*got 'tpu'"),
        nf4.use_backend("tpu"),
    ):
        pass
    for name, status in nf4.available_backends().items():
        if not status:
            assert status.reason
            with pytest.raises(RuntimeError, match="is not usable here"), nf4.use_backend(name):
                pass
    assert set(nf4.available_backends()) == set(BACKENDS)
    assert nf4.available_backends()["reference"]


@pytest.mark.parametrize("kind", ["cpu", "cuda"])
def test_a_backend_refuses_other_devices(kind: str, backend: str) -> None:
    """A forced backend never moves work to another one."""
    if kind == "cuda" and not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    x = torch.randn(64, device=kind)
    reason = nf4.backends._BY_NAME[backend].unsupported(x.device)
    if reason is None:
        op("quantize")(x, 64, formats.NF4.id)
        return
    with pytest.raises(RuntimeError, match=f"backend '{backend}' cannot run on '{kind}'"):
        op("quantize")(x, 64, formats.NF4.id)


def test_meta_tensors_need_no_backend() -> None:
    """A model on the meta device can be prepared: the fake kernels answer."""
    packed, absmax = torch.ops.nf4.quantize(torch.empty(7, 70, device="meta"), 64, 0)
    assert packed.shape == (245, 1) and absmax.shape == (8,) and packed.is_meta
