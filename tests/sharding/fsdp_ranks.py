"""What the ranks of test_fsdp.py do: train the cases and write down what they saw."""

from __future__ import annotations

import math
from pathlib import Path

import torch
from fsdp_cases import (
    CASES,
    HYBRID,
    PRECISIONS,
    Case,
    Memory,
    emptied,
    engine_of,
    fragments,
    held_bytes,
    model_of,
    optimizer_of,
    train,
    windows,
)
from torch.distributed.tensor import DTensor

from framework.sharding import fsdp
from framework.sharding.fsdp import FsdpEngine
from framework.sharding.ranks import Place, Ranks, joined_ranks
from framework.training import fused_loss
from framework.training.loss import evaluation_loss
from framework.training.memory import CpuMemoryTracker


def seen(engine: FsdpEngine, results) -> dict:
    return {
        "results": results,
        "weights": fragments(engine.weights()),
        "optimizer": fragments(engine.optimizer_state()),
        "state": engine.state_dict(),
        "bytes": {kind: held_bytes(tensors) for kind, tensors in engine.held()._asdict().items()},
    }


def trained(case: Case, ranks: Ranks, size: int) -> dict:
    engine = engine_of(case, ranks)
    return seen(engine, train(engine, case, ranks, windows(size=size)))


def as_on_older_torch(case: Case, ranks: Ranks) -> dict:
    newer, fsdp.FILLS_GRADIENTS = fsdp.FILLS_GRADIENTS, False
    try:
        return trained(case, ranks, 4)
    finally:
        fsdp.FILLS_GRADIENTS = newer


def disturbed(case: Case, ranks: Ranks, factor: float) -> dict:
    """Two steps, one whose last rank has its losses multiplied with `factor`, and a third."""
    engine = engine_of(case, ranks)
    train(engine, case, ranks, windows(0, 2))
    before = seen(engine, None)
    skipped = train(engine, case, ranks, windows(2, 3), factor=factor)
    after = seen(engine, None)
    return {
        "skipped": skipped[0],
        "unchanged": all(
            torch.equal(old[3], new[3])
            for kind in ("weights", "optimizer")
            for old, new in zip(before[kind], after[kind], strict=True)
        ),
        "bytes": after["bytes"],
        **seen(engine, train(engine, case, ranks, windows(2, 3))),
    }


def evaluated(case: Case, ranks: Ranks) -> dict:
    """Evaluations before and between steps, each rank with its own number of batches' rows at a time."""
    engine, losses = engine_of(case, ranks), []

    def evaluate() -> None:
        engine.model.eval()
        (window,) = windows(9, 10)
        for inputs in window[ranks.rank :: ranks.world_size]:
            result = evaluation_loss(engine.model, inputs, chunks=1 + 6 * ranks.rank)
            losses.append((result.loss.item(), result.labels))
        engine.model.train()

    evaluate()
    results = []
    for step in range(3):
        results += train(engine, case, ranks, windows(step, step + 1))
        evaluate()
    return {"evaluations": losses, **seen(engine, results)}


class PlainMemory(CpuMemoryTracker):
    """Counts neither what is on the meta device nor sharded tensors."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if any(issubclass(kind, DTensor) for kind in types):
            return func(*args, **(kwargs or {}))
        return super().__torch_dispatch__(func, types, args, kwargs)

    def _count(self, storage) -> None:
        if storage.device.type == "cpu":
            super()._count(storage)


def filled(ranks: Ranks) -> dict:
    """Bytes beside the shards at the peak of filling a model from the meta device."""
    case = Case()
    model = model_of(case)
    values = emptied(model)
    engine = FsdpEngine("fp32", ranks, reshard_after_forward=True, replicas=1, offload=False)
    tracker = PlainMemory()
    with tracker:
        engine.prepare(model, lambda module: optimizer_of(case, module), ((n, v.clone()) for n, v in values))
    return {
        "peak": tracker.peak,
        "left": tracker.current,
        "buffers": held_bytes(model.buffers()),
        "largest": max(v.numel() * v.element_size() for _, v in values),
    }


def resumed(case: Case, ranks: Ranks, store: Path) -> dict:
    """A step from what another number of ranks saved, in a model of other weights."""
    saved = torch.load(store, weights_only=False)
    engine = engine_of(case, ranks, model_of(case, seed=5))
    engine.load(Memory(saved["weights"]), Memory(saved["optimizer"]), saved["state"])
    return seen(engine, train(engine, case, ranks, windows(3, 4)))


def two(ranks: Ranks) -> dict:
    found = {name: trained(case, ranks, 4) for name, case in (CASES | PRECISIONS).items()}
    found["older sometimes"] = as_on_older_torch(CASES["sometimes"], ranks)
    found["older fp32_master lora"] = as_on_older_torch(PRECISIONS["fp32_master lora"], ranks)
    found["nan"] = disturbed(CASES["selective"], ranks, math.nan)
    found["overflow"] = disturbed(PRECISIONS["fp16"], ranks, 1e38)
    found["evaluated"] = evaluated(CASES["selective"], ranks)
    found["filled"] = filled(ranks)
    return found


def four(ranks: Ranks, directory: Path) -> dict:
    found = {name: trained(case, ranks, 8) for name, case in HYBRID.items()}
    found["resumed"] = resumed(CASES["checkpoint"], ranks, directory / "store.pt")
    return found


def main(directory: Path) -> None:
    """One rank, in a process of its own. Leaves what it found in a file."""
    # Ranks have several chunks, and not equally many.
    fused_loss.CHUNK_ROWS = 3
    with joined_ranks(Place.of_environment(), timeout_seconds=60) as ranks:
        found = two(ranks) if ranks.world_size == 2 else four(ranks, directory)
        torch.save(found, directory / f"{ranks.world_size}-{ranks.rank}.pt")
