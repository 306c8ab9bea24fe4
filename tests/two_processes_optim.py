"""``two_processes_optim.py RANK FOLDER``: one rank of an FSDP2 training with the 8-bit optimizer.

Both ranks see the same batches, so that averaged gradients are those of one process; every shard is
whole blocks of 256, so that moments are too. Each rank trains a model cut in two for six steps, and
trains another for three, saves it and resumes it in a third: these must agree bit for bit. A whole
copy that it trains alone may differ by what a matmul makes of other addresses, and no more. Run by
test_optim_distributed.py.
"""

import copy
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_model_state_dict, set_model_state_dict
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from nf4.optim import AdamW8bit, PagedAdamW8bit

STEPS, SAVED = 6, 3
SETTINGS = {"lr": 1e-2, "weight_decay": 0.1, "min_8bit_size": 1024}


def build() -> nn.Module:
    # Weights take 8 bits, also the last, whose 1024 elements are two halves; biases take 32.
    return nn.Sequential(nn.Linear(64, 96), nn.GELU(), nn.Linear(96, 128), nn.Linear(128, 8))


def sharded(model: nn.Module) -> nn.Module:
    model = copy.deepcopy(model)
    for layer in model:
        if isinstance(layer, nn.Linear):
            fully_shard(layer)
    return fully_shard(model)


def train(model: nn.Module, optimizer: torch.optim.Optimizer, batches: list[Tensor]) -> None:
    for batch in batches:
        optimizer.zero_grad()
        model(batch).square().mean().backward()
        optimizer.step()


def full(model: nn.Module) -> dict[str, Tensor]:
    return {
        name: (p.full_tensor() if isinstance(p, DTensor) else p).detach()
        for name, p in model.named_parameters()
    }


def main() -> None:
    rank, folder = int(sys.argv[1]), Path(sys.argv[2])
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder / 'rendezvous'}", rank=rank, world_size=2
    )
    torch.manual_seed(0)
    start = build()
    batches = [torch.randn(16, 64) for _ in range(STEPS)]

    alone = copy.deepcopy(start)
    train(alone, AdamW8bit(alone.parameters(), **SETTINGS), batches)

    through = sharded(start)
    whole_run = AdamW8bit(through.parameters(), **SETTINGS)
    train(through, whole_run, batches)
    for weight in (through[0].weight, through[3].weight):
        assert isinstance(weight, DTensor)
        local, state = weight.to_local(), whole_run.state[weight]
        assert local.numel() * 2 == weight.numel()
        assert state["state1"].dtype is torch.uint8 and state["state1"].shape == local.shape
        assert state["absmax1"].numel() == local.numel() // 256

    first = sharded(start)
    optimizer = PagedAdamW8bit(first.parameters(), **SETTINGS)
    train(first, optimizer, batches[:SAVED])
    file = folder / f"rank{rank}.pt"
    torch.save(optimizer.state_dict(), file)
    saved_model = get_model_state_dict(first)

    resumed = sharded(build())
    set_model_state_dict(resumed, saved_model)
    optimizer = PagedAdamW8bit(resumed.parameters())
    optimizer.load_state_dict(torch.load(file, weights_only=True))
    train(resumed, optimizer, batches[SAVED:])

    by_one, begun, again = full(alone), full(start), full(resumed)
    for name, value in full(through).items():
        assert torch.equal(value, again[name]), name
        moved = (by_one[name] - begun[name]).norm()
        assert moved > 0 and (value - by_one[name]).norm() <= 1e-3 * moved, name
    dist.barrier()
    dist.destroy_process_group()
    print("rank", rank, "done")


main()
