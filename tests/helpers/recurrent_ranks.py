"""What the ranks of test_recurrent.py do: steps on batches whose runs are elsewhere on each rank."""

from __future__ import annotations

from pathlib import Path

import families
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.fsdp import fully_shard
from transformers import PreTrainedModel

import framework
from framework.retention import blocks_of

TOKENS = 24
STEPS = (
    (((3, 9), (12, 20)), ((17, 23), (1, 23))),
    (((3, 9), (12, 20)), ((4, 5, 9, 14, 15), ())),
    (((), ()), ((0, 23), (22, 23))),
)
"""Labels of each step, rank and sequence: the first and the one after the last, or several by themselves."""

Gradients = dict[str, Tensor]


def batch_of(labelled: tuple[tuple[int, ...], ...], seed: int) -> dict[str, Tensor]:
    """Random tokens; position i is supervised where the label of i + 1 is given."""
    ids = torch.randint(5, 99, (len(labelled), TOKENS), generator=torch.Generator().manual_seed(seed))
    labels = torch.full_like(ids, -100)
    for row, places in enumerate(labelled):
        index = torch.arange(*places) if len(places) == 2 else torch.tensor(places, dtype=torch.int64)
        labels[row, index + 1] = ids[row, index + 1]
    return {"input_ids": ids, "labels": labels}


def main(directory: Path) -> None:
    """One rank; the first writes the largest error of every case to `errors.pt`."""
    dist.init_process_group("gloo")
    rank, errors = dist.get_rank(), {}
    for family in ("qwen3_next", "mamba2"):
        ways = {"fsdp": Fsdp(family), "zero 3": Zero(family)}
        for number, step in enumerate(STEPS):
            batches = [batch_of(labelled, 10 * number + index) for index, labelled in enumerate(step)]
            count = max(1, sum(int((batch["labels"] != -100).sum()) for batch in batches))
            want = in_one_process(family, batches, count)
            for name, way in ways.items():
                got = way.gradients(batches[rank], count)
                floor = 1e-5 * max(float(gradient.norm()) for gradient in want.values()) or 1.0
                errors[f"{family} {name} {number}"] = max(
                    float((got[key] - gradient).norm() / (gradient.norm() + floor)) for key, gradient in want.items()
                )
    if rank == 0:
        torch.save(errors, directory / "errors.pt")
    dist.barrier()
    dist.destroy_process_group()


def enabled(family: str) -> PreTrainedModel:
    """A tiny model with token selection."""
    model = families.build(family, dtype=torch.float32)
    framework.enable_token_selection(model)
    return model


def in_one_process(family: str, batches: list[dict[str, Tensor]], count: int) -> Gradients:
    """The gradients of all batches."""
    model = enabled(family)
    for batch in batches:
        model(**batch, num_items_in_batch=count).loss.backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


class Fsdp:
    """FSDP2 with every block sharded."""

    def __init__(self, family: str) -> None:
        self.model = enabled(family)
        for block in blocks_of(self.model).values():
            fully_shard(block)
        fully_shard(self.model)

    def gradients(self, batch: dict[str, Tensor], count: int) -> Gradients:
        """Summed over the ranks."""
        self.model(**batch, num_items_in_batch=count).loss.backward()
        found = {name: p.grad.full_tensor() * 2 for name, p in self.model.named_parameters() if p.grad is not None}
        self.model.zero_grad(set_to_none=True)
        return found


class Zero:
    """DeepSpeed's stage 3 with every weight shared out."""

    def __init__(self, family: str) -> None:
        import deepspeed

        # An operator that would be compiled now; gloo does the same.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        options = {
            "train_micro_batch_size_per_gpu": 2,
            "zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0},
            "optimizer": {"type": "Adam", "params": {"lr": 0.0, "torch_adam": True}},
        }
        model = enabled(family)
        self.engine, *_ = deepspeed.initialize(model=model, config=options, model_parameters=[*model.parameters()])

    def gradients(self, batch: dict[str, Tensor], count: int) -> Gradients:
        """Summed over the ranks."""
        from deepspeed.utils import safe_get_full_grad

        self.engine.backward(self.engine(**batch, num_items_in_batch=count).loss)
        found = {name: safe_get_full_grad(p) * 2 for name, p in self.engine.module.named_parameters()}
        self.engine.step()
        return found
