"""``two_processes.py KIND RANK FOLDER``: one rank of a DDP or FSDP2 training over gloo.

Both ranks train a quantized model on half of each batch; rank 0 trains a copy alone on whole
batches, and compares. Run by test_distributed.py.
"""

import copy
import os
import sys
from pathlib import Path

import tiny
import torch
import torch.distributed as dist
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

import nf4
from nf4.optim import PagedAdamW8bit

STEPS = 3


def build(kind: str):
    """The same float32 model on each rank; PEFT's layers under DDP, nf4's own under FSDP2."""
    torch.manual_seed(0)
    model = tiny.llama(torch.float32)
    if kind == "ddp":
        import peft

        model = nf4.prepare_model(model, progress=False)
        nf4.prepare_for_qlora(model)
        targets = ["q_proj", "v_proj", "down_proj"]
        model = peft.get_peft_model(model, peft.LoraConfig(r=4, target_modules=targets))
    else:
        lora = nf4.LoraConfig(r=4, lora_dropout=0.0)
        model = nf4.prepare_model(model, lora=lora, progress=False)
        nf4.prepare_for_qlora(model)
    return model.train()


def trainable(model):
    return [p for p in model.parameters() if p.requires_grad]


def train(model, batches, rows):
    optimizer = torch.optim.SGD(trainable(model), lr=0.5)
    for batch in batches:
        part = batch[rows]
        model(input_ids=part, labels=part).loss.backward()
        optimizer.step()
        optimizer.zero_grad()


def main() -> None:
    kind, rank, folder = sys.argv[1], int(sys.argv[2]), Path(sys.argv[3])
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder / 'rendezvous'}", rank=rank, world_size=2
    )
    model = build(kind)
    alone = copy.deepcopy(model)
    codes = {n: p.clone() for n, p in model.named_parameters() if p.dtype is torch.uint8}
    torch.manual_seed(1)
    batches = [tiny.token_ids(4) for _ in range(STEPS)]
    if kind == "ddp":
        parallel = DistributedDataParallel(model)
    else:
        for layer in model.model.layers:
            fully_shard(layer)
        parallel = fully_shard(model)
        shard = dict(parallel.named_parameters())["model.layers.0.mlp.up_proj.weight"]
        assert isinstance(shard, DTensor) and shard.dtype is torch.uint8
        assert shard.to_local().numel() * 2 == shard.numel()
    train(parallel, batches, slice(2 * rank, 2 * rank + 2))

    if kind == "ddp":
        state = {k: v.clone() for k, v in model.state_dict().items()}
    else:
        options = StateDictOptions(full_state_dict=True, cpu_offload=True)
        state = get_model_state_dict(parallel, options=options)
    if rank == 0:
        start = {n: p.detach().clone() for n, p in alone.named_parameters()}
        train(alone, batches, slice(None))
        for name, parameter in alone.named_parameters():
            if parameter.requires_grad:
                moved = (parameter - start[name]).norm()
                assert (state[name] - parameter).norm() <= 1e-3 * moved, name
                assert moved > 0 or "lora_A" in name, name
        for name, packed in codes.items():
            assert torch.equal(state[name], packed), name
        # What was saved is the whole model, and the adapter loads where PEFT's adapters do.
        fresh = build(kind)
        fresh.load_state_dict(state)
        if kind == "ddp":
            model.save_pretrained(folder / "adapter")
        else:
            nf4.save_adapter(fresh, folder / "adapter")
        ids = batches[0]
        assert torch.allclose(fresh(ids).logits, alone(ids).logits, atol=1e-4)
    dist.barrier()

    # The 8-bit optimizer steps over whole and sharded parameters alike.
    optimizer = PagedAdamW8bit(trainable(parallel), lr=1e-3, min_8bit_size=64)
    part = batches[0][2 * rank : 2 * rank + 2]
    before = parallel(input_ids=part, labels=part).loss
    before.backward()
    optimizer.step()
    loss = parallel(input_ids=part, labels=part).loss
    assert torch.isfinite(loss) and loss < before, (loss, before)
    dist.barrier()
    dist.destroy_process_group()
    print("rank", rank, "done", flush=True)
    # gloo's threads may outlive their groups, and a Python that ends under them can abort
    # (pytorch/pytorch#179291).
    os._exit(0)


main()
