"""The memory of one training step beside the model's own tensors, counted on fake tensors.

A training step is ``nf4 finetune``'s: TRL's loss, which keeps no logits, where TRL has it. Layers
of one structure save the same bytes, so three of each are run, and the middle one counts for the
rest.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import masking_utils

from nf4.nn import NF4Experts

# Where in the model a tensor was made or saved: a layer's number, or outside of the layers.
Place = int | str
BEFORE, AFTER = "before", "after"


@dataclass(frozen=True)
class Step:
    """Bytes at most: ``saved`` for the backward, and ``peak`` of all tensors that the step made."""

    saved: int
    peak: int


class LiveBytes(TorchDispatchMode):
    """Counts the storages that operators make, while they live."""

    def __init__(self, known: list[Tensor]) -> None:
        super().__init__()
        self.live = self.peak = 0
        self.place: Place = BEFORE
        # Where each storage was made; the model's own have no place.
        self.made: dict[int, Place | None] = {t.untyped_storage()._cdata: None for t in known}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor):
                self._add(leaf.untyped_storage())
        return result

    def _add(self, storage: torch.UntypedStorage) -> None:
        key = storage._cdata
        if key in self.made:
            return
        self.made[key] = self.place
        self.live += storage.nbytes()
        self.peak = max(self.peak, self.live)
        weakref.finalize(storage, self._free, key, storage.nbytes())

    def _free(self, key: int, size: int) -> None:
        self.made.pop(key, None)
        self.live -= size


def decoder_layers(model: nn.Module) -> nn.ModuleList:
    """The repeated blocks of the model, each of which checkpointing recomputes."""
    lists = [m for m in model.modules() if isinstance(m, nn.ModuleList)]
    return max(lists, key=len, default=nn.ModuleList())


def measure_step(model: nn.Module, batch: int, length: int, checkpointing: bool) -> Step:
    """Run a step of ``batch`` sequences of ``length`` tokens on the shapes of ``model``.

    The model is on the meta device, and loses all but three of each kind of layer.
    """
    counts = _keep_three_of_each(model)
    for module in model.modules():
        if isinstance(module, NF4Experts):
            module.forward = _balanced(module)  # type: ignore[assignment, method-assign]
    with FakeTensorMode(allow_non_fake_inputs=True), _one_document():
        fake = model.to_empty(device="cpu")
        for parameter in fake.parameters():
            if parameter.requires_grad:
                parameter.grad = torch.empty_like(parameter)
        ids = torch.zeros(batch, length, dtype=torch.long)
        loss = loss_function(fake)
        plain = _run(fake, loss, ids)
        if not checkpointing:
            return _total(plain, plain.saved_bytes(counts), plain.saved_bytes({}))
        enable_checkpointing(fake)
        run = _run(fake, loss, ids)
    # One layer at a time is recomputed, when what the loss saved is gone.
    inside = max((plain.saved.get((i, i), 0) for i in counts), default=0)
    outside = sum(size for (made, _), size in run.saved.items() if made == AFTER)
    recomputed = max(inside - outside, 0)
    return _total(run, run.saved_bytes(counts) + recomputed, run.saved_bytes({}) + recomputed)


@contextmanager
def _one_document() -> Iterator[None]:
    """Have transformers take a row for one document.

    It looks for packed documents in the positions, and where it cannot, as in fakes, it builds the
    mask that they would need.
    """
    library: Any = masking_utils
    original = library.find_packed_sequence_indices
    library.find_packed_sequence_indices = lambda *args, **kwargs: None
    try:
        yield
    finally:
        library.find_packed_sequence_indices = original


def _balanced(module: NF4Experts) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """A forward that gives every expert as many tokens, for fakes have no routing."""

    def forward(hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        out = torch.zeros_like(hidden_states)
        tokens, slots = top_k_index.shape
        share = -(-tokens * slots // module.num_experts)
        for expert in range(min(module.num_experts, tokens * slots)):
            token = torch.arange(share) % tokens
            y = module._expert(expert, hidden_states[token]) * top_k_weights[token, 0, None]
            out = out.index_add(0, token, y.to(out.dtype))
        return out

    return forward


def enable_checkpointing(model: Any) -> None:
    """Non-reentrant, as ``nf4 finetune`` does; without the random state, which fakes have not."""
    options = {"use_reentrant": False, "preserve_rng_state": False}
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=options)


def loss_function(model: Any) -> Callable[[Tensor], Tensor]:
    """The loss of token ids as ``nf4 finetune`` computes it with the TRL that is installed."""
    try:
        from trl.trainer.utils import add_fused_lm_head
    except ImportError:  # an older TRL: its loss is the model's own
        return lambda ids: model(input_ids=ids, labels=ids, use_cache=False).loss
    add_fused_lm_head(model, outputs=("log_probs", "entropy", "is_top1"))
    return lambda ids: model(input_ids=ids, labels=ids, use_cache=False, fused_lm_head=True).loss


@dataclass
class _Run:
    """What a step saved, by where the tensor was made and saved, and its peak."""

    saved: dict[tuple[Place, Place], int]
    peak: int

    def saved_bytes(self, counts: dict[int, int]) -> int:
        """All that was saved, with each layer as often as ``counts`` says (once if it does not)."""
        return sum(
            size * (counts.get(made, 1) if isinstance(made, int) else 1)
            for (made, _), size in self.saved.items()
        )


def _total(run: _Run, saved: int, saved_here: int) -> Step:
    """The step of the whole model, from that of the model that lacks layers."""
    return Step(saved, saved + max(run.peak - saved_here, 0))


def _run(model: nn.Module, loss: Callable[[Tensor], Tensor], ids: Tensor) -> _Run:
    live = LiveBytes([*model.parameters(), *model.buffers(), ids, *_gradients(model)])
    with live, record_saved(live, decoder_layers(model)) as saved:
        loss(ids).backward()
    return _Run(saved, live.peak)


def _gradients(model: nn.Module) -> list[Tensor]:
    return [p.grad for p in model.parameters() if p.grad is not None]


@contextmanager
def record_saved(
    live: LiveBytes, layers: nn.ModuleList
) -> Iterator[dict[tuple[Place, Place], int]]:
    """Count the bytes saved for the backward, by where they were made and saved.

    The model's own tensors are not counted, nor is a storage that is saved twice.
    """
    seen: dict[int, torch.UntypedStorage] = {}  # held, so that no other takes its address
    saved: dict[tuple[Place, Place], int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        made = live.made.get(storage._cdata)
        if made is not None and storage._cdata not in seen:
            seen[storage._cdata] = storage
            saved[made, live.place] = saved.get((made, live.place), 0) + storage.nbytes()
        return tensor

    def move(place: Place) -> Callable[..., None]:
        return lambda *_: setattr(live, "place", place)

    handles = []
    for number, layer in enumerate(layers):
        handles.append(layer.register_forward_pre_hook(move(number)))
        handles.append(layer.register_forward_hook(move(AFTER)))
    try:
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            yield saved
    finally:
        for handle in handles:
            handle.remove()


def _keep_three_of_each(model: nn.Module) -> dict[int, int]:
    """Drop the layers that repeat three earlier ones' structure; how often each kept one counts.

    The middle one counts for them: over a frozen embedding the first saves less, for its input
    needs no gradient, and what checkpointing keeps of a layer is what it hands to the next one.
    """
    layers = decoder_layers(model)
    kept: dict[str, list[int]] = {}
    counts: dict[int, int] = {}
    chosen: list[nn.Module] = []
    for layer in layers:
        same = kept.setdefault(_structure(layer), [])
        if len(same) == 3:
            counts[same[1]] += 1
        else:
            counts[len(chosen)] = 1
            same.append(len(chosen))
            chosen.append(layer)
    del layers[:]
    layers.extend(chosen)
    return counts


def _structure(layer: nn.Module) -> str:
    """Modules, shapes and settings of a layer, without its number."""
    parts = [repr(layer)]
    for name, module in layer.named_modules():
        kind = getattr(module, "attention_type", getattr(module, "layer_type", ""))
        window = getattr(module, "sliding_window", "")
        parts.append(f"{name} {kind} {window}")
    for name, tensor in [*layer.named_parameters(), *layer.named_buffers()]:
        parts.append(f"{name} {tuple(tensor.shape)} {tensor.dtype} {tensor.requires_grad}")
    return "\n".join(parts)
