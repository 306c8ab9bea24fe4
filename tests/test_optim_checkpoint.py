"""Checkpoints: bitsandbytes' format both ways, exact resume, and damaged files."""

from __future__ import annotations

import io
from typing import Any

import pytest
import torch
from test_optim import copies, equal, parameters, random_gradients, run
from torch import Tensor, nn

from nf4 import formats
from nf4.optim import AdamW8bit, AdamW32bit, PagedAdamW8bit
from nf4.optim.state import NESTED_KEY

CPU = torch.device("cpu")


def through_a_file(state: dict[str, Any]) -> dict[str, Any]:
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def flat(state: dict[str, Any]) -> dict[str, Any]:
    return {
        f"{index}.{name}": value
        for index, entry in state["state"].items()
        for name, value in {"step": entry["step"], **entry[NESTED_KEY]}.items()
    }


def assert_same_state(a: dict[str, Any], b: dict[str, Any]) -> None:
    a, b = flat(a), flat(b)
    assert sorted(a) == sorted(b)
    for name, value in a.items():
        same = torch.equal(value, b[name]) if isinstance(value, Tensor) else value == b[name]
        assert same, name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("cls", [AdamW8bit, AdamW32bit, PagedAdamW8bit])
def test_resume_is_exact(backend: str, device: torch.device, cls, dtype: torch.dtype) -> None:
    settings = {"lr": 1e-2, "stochastic_rounding": dtype is torch.bfloat16, "seed": 3}
    through = parameters(device, dtype)
    resumed = copies(through)
    gradients = random_gradients(through, 8)
    whole, half = cls(through, **settings), cls(resumed, **settings)
    run(whole, through, gradients)
    run(half, resumed, gradients[:4])
    saved = through_a_file(half.state_dict())
    resumed = copies(resumed)
    half = cls(resumed)  # the arguments come from the checkpoint
    half.load_state_dict(saved)
    run(half, resumed, gradients[4:])
    assert equal(through, resumed)
    assert_same_state(whole.state_dict(), half.state_dict())


@pytest.mark.parametrize("name", ["AdamW8bit", "PagedAdamW8bit", "AdamW"])
def test_loads_bitsandbytes_and_back(name: str) -> None:
    bitsandbytes = pytest.importorskip("bitsandbytes")
    params = parameters(CPU)
    gradients = random_gradients(params, 6)
    theirs = getattr(bitsandbytes.optim, name)(params, lr=1e-2, weight_decay=0.1)
    run(theirs, params, gradients[:4])
    saved = through_a_file(theirs.state_dict())

    ours_params = copies(params)
    ours = AdamW8bit(ours_params)
    ours.load_state_dict(saved)
    group = ours.param_groups[0]
    assert group["lr"] == 1e-2 and group["weight_decay"] == 0.1
    assert_same_state(saved, ours.state_dict())
    # A step after the exchange lands where a step of theirs does: only the rounding differs.
    run(ours, ours_params, gradients[4:5])
    run(theirs, params, gradients[4:5])
    for p, q in zip(params, ours_params, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-6)

    back_params = copies(ours_params)
    back = getattr(bitsandbytes.optim, name)(back_params)
    back.load_state_dict(through_a_file(ours.state_dict()))
    assert back.param_groups[0]["lr"] == 1e-2
    run(back, back_params, gradients[5:])
    run(ours, ours_params, gradients[5:])
    for p, q in zip(back_params, ours_params, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-6)


def test_loads_the_flat_form_of_older_versions() -> None:
    params, state = saved_state()
    for entry in state["state"].values():
        entry.update(entry.pop(NESTED_KEY))
    optimizer = AdamW8bit(params)
    optimizer.load_state_dict(state)
    assert optimizer.state[params[0]]["state1"].dtype is torch.uint8


def test_state_is_saved_with_its_tables() -> None:
    _, state = saved_state()
    quantized = state["state"][0][NESTED_KEY]
    for name, fmt in (("qmap1", formats.DYNAMIC8), ("qmap2", formats.DYNAMIC8_UNSIGNED)):
        assert torch.equal(quantized[name], torch.from_numpy(fmt.values))
    # One table in memory for all parameters, and so one in the file.
    assert quantized["qmap1"] is state["state"][1][NESTED_KEY]["qmap1"]


def test_capturable_resumes_with_one_counter() -> None:
    params = parameters(CPU)
    optimizer = AdamW8bit(params, capturable=True)
    gradients = random_gradients(params, 4)
    run(optimizer, params, gradients[:2])
    again = copies(params)
    resumed = AdamW8bit(again, capturable=True)
    resumed.load_state_dict(through_a_file(optimizer.state_dict()))
    run(optimizer, params, gradients[2:])
    run(resumed, again, gradients[2:])
    assert equal(params, again)
    assert resumed.state[again[0]]["step"] is resumed.state[again[1]]["step"]


def test_hooks_see_the_checkpoint() -> None:
    params, state = saved_state()
    optimizer = AdamW8bit(params)
    seen = []

    def rename(_: AdamW8bit, state: dict[str, Any]) -> dict[str, Any]:
        return {"state": state["states"], "param_groups": state["param_groups"]}

    optimizer.register_load_state_dict_pre_hook(rename)
    optimizer.register_load_state_dict_post_hook(lambda o: seen.append(len(o.state)))
    optimizer.load_state_dict({"states": state["state"], "param_groups": state["param_groups"]})
    assert seen == [len(params)]


def saved_state() -> tuple[list[nn.Parameter], dict[str, Any]]:
    params = parameters(CPU)
    optimizer = AdamW8bit(params)
    run(optimizer, params, random_gradients(params, 2))
    return params, through_a_file(optimizer.state_dict())


def damage(name: str, change) -> Any:
    def apply(state: dict[str, Any]) -> None:
        nested = state["state"][1][NESTED_KEY]
        nested[name] = change(nested[name])

    return apply


def group(**changes: Any) -> Any:
    return lambda state: state["param_groups"][0].update(changes)


def remove(name: str) -> Any:
    return lambda state: state["state"][1][NESTED_KEY].pop(name)


def small(name: str, change) -> Any:
    """Damage to a parameter of fewer than 4096 elements, whose moments are float32."""

    def apply(state: dict[str, Any]) -> None:
        nested = state["state"][2][NESTED_KEY]
        nested[name] = change(nested[name])

    return apply


def put_nan(t: Tensor) -> Tensor:
    t[3] = float("nan")
    return t


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (damage("absmax1", lambda t: t[1:]), r"state 1: absmax1 must be torch.float32 \[20\], got"),
        (damage("state2", lambda t: t[1:]), r"state2 must be torch.uint8 \[50, 101\], got"),
        (damage("state2", lambda t: t.float()), "state2 must be torch.uint8"),
        (damage("state1", lambda t: t.double()), "state1 must be torch.float32"),
        (damage("absmax2", put_nan), "absmax2 must be finite, got NaN or Inf"),
        (damage("absmax2", lambda t: -t), "absmax2 must not be negative"),
        (small("state2", lambda t: -1.0 - t), "state 2: state2 must not be negative, got -"),
        (small("state1", put_nan), "state 2: state1 must be finite, got NaN or Inf"),
        (damage("qmap1", lambda t: t * 2), "qmap1 must be the dynamic8 map"),
        (damage("absmax1", lambda t: None), "absmax1 must be a tensor, got NoneType"),
        (remove("state1"), "state1 is missing, got step, state2"),
        (remove("absmax2"), "absmax2 must be a tensor"),
        (lambda s: s["state"][1].pop("step"), "step is missing"),
        (lambda s: s["state"][1].update(step=-1), r"step must be a whole number in \[0, 2\*\*32\)"),
        (lambda s: s["state"][1].update(step=float("nan")), "step must be .*, got nan"),
        (lambda s: s["state"][1].update(step=1.5), r"step must be .*, got 1\.5"),
        (lambda s: s["state"][1].update(step=None), "step must be .*, got None"),
        (lambda s: s["state"][1].update({NESTED_KEY: 3}), "must be a dict, got int"),
        (lambda s: s["state"].update({9: s["state"][1]}), "state 9 must belong to a group"),
        (damage("state1", lambda t: t.t().contiguous()), r"\[50, 101\], got .* \[101, 50\]"),
        (damage("qmap2", lambda t: t.double()), "qmap2 must be the dynamic8_unsigned map"),
        (damage("qmap2", lambda t: t.tolist()), "qmap2 must be the dynamic8_unsigned map"),
        (group(lr=-1.0), r"group 0: lr must be finite and not negative, got -1\.0"),
        (group(lr=float("nan")), "group 0: lr must be finite and not negative, got nan"),
        (group(lr=torch.ones(2)), "group 0: lr must be finite and not negative"),
        (group(betas=(0.9, 1.0)), r"group 0: betas must be in \[0, 1\)"),
        (group(betas=(0.9, float("nan"))), r"group 0: betas must be in \[0, 1\)"),
        (group(betas=0.9), "group 0: betas must be two numbers, got 0.9"),
        (group(eps=-1e-8), "group 0: eps must be finite and not negative"),
        (group(eps=None), "group 0: eps must be finite and not negative, got None"),
        (group(weight_decay=float("inf")), "group 0: weight_decay must be finite"),
        (group(optim_bits=4), "group 0: optim_bits must be 8 or 32, got 4"),
        (group(min_8bit_size=-1), "group 0: min_8bit_size must be finite and not negative"),
        (group(seed=2**40), "group 0: seed must be a 32-bit integer"),
        (group(params=None), "group 0: must be a dict with a list params"),
        (lambda s: s["param_groups"].clear(), r"group sizes must be \[4\], got \[\]"),
        (lambda s: s.update(param_groups=None), "param_groups must be a list, got NoneType"),
        (lambda s: s.update(state=[]), "state must be a dict, got list"),
        (lambda s: s["state"].update({1: "x"}), "state 1: must be a dict, got str"),
        (lambda s: s["param_groups"][0]["params"].pop(), r"group sizes must be \[4\], got \[3\]"),
        (lambda s: s.pop("param_groups"), "param_groups is missing"),
    ],
)
def test_damaged_checkpoints_change_nothing(change, message: str) -> None:
    params, state = saved_state()
    optimizer = AdamW8bit(params, lr=0.5)
    run(optimizer, params, random_gradients(params, 1))
    before = through_a_file(optimizer.state_dict())
    tensors = {p: dict(optimizer.state[p]) for p in params}
    change(state)
    with pytest.raises(ValueError, match=r"nf4.AdamW8bit.load_state_dict: .*" + message):
        optimizer.load_state_dict(state)
    assert_same_state(before, optimizer.state_dict())
    assert before["param_groups"] == optimizer.state_dict()["param_groups"]
    assert all(optimizer.state[p][k] is v for p in params for k, v in tensors[p].items())


def test_a_paged_optimizer_takes_no_capturable_checkpoint() -> None:
    params, state = saved_state()
    state["param_groups"][0]["capturable"] = True
    optimizer = PagedAdamW8bit(params)
    with pytest.raises(ValueError, match="group 0: capturable needs is_paged=False"):
        optimizer.load_state_dict(state)
    assert not optimizer.state and not optimizer.param_groups[0]["capturable"]
