"""The gradients of a step under DistributedDataParallel, for each way that it tracks parameters; see test_ddp.py."""

from contextlib import nullcontext
from itertools import product
from pathlib import Path

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

import framework


def main(directory: Path) -> None:
    """One rank: `directory` holds models.pt and batches.pt; the first rank writes gradients.pt."""
    dist.init_process_group("gloo")
    rank, world = dist.get_rank(), dist.get_world_size()
    batches = torch.load(directory / "batches.pt", weights_only=True)
    count = sum(int((batch["labels"][:, 1:] != -100).sum()) for batch in batches) / world

    gradients = {}
    ways = ({}, {"find_unused_parameters": True}, {"static_graph": True})
    for kind, options, retain_linears in product(("full", "lora"), ways, (False, True)):
        model = torch.load(directory / "models.pt", weights_only=False)[kind]
        framework.enable_token_selection(model, retain_linears=retain_linears, fused_loss=retain_linears)
        parallel = DistributedDataParallel(model, **options)
        mine = batches[rank::world]
        for batch in mine[:-1]:
            # A static graph is learnt from the first backward pass, which has to be a synchronised one.
            with nullcontext() if "static_graph" in options else parallel.no_sync():
                parallel(**batch, num_items_in_batch=count).loss.backward()
        parallel(**mine[-1], num_items_in_batch=count).loss.backward()
        name = f"{kind} {'-'.join(options)} retain_linears={retain_linears}"
        gradients[name] = {key: p.grad for key, p in model.named_parameters() if p.grad is not None}
    if rank == 0:
        torch.save(gradients, directory / "gradients.pt")
    dist.barrier()
    dist.destroy_process_group()
