"""What each rank takes for one step, for a list of cases; started by `check_planner.py` on every rank."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch

from framework.cli import run_command
from framework.config import Config
from framework.data import Batch
from framework.data.batch import NO_DOCUMENT
from framework.data.dataset import IGNORED
from framework.planner.extraction import selection_sizes
from framework.planner.recording import gathered_before
from framework.planner.symbols import batch_symbols
from framework.selection import supervised_positions
from framework.sharding.place import Place
from framework.sharding.ranks import Ranks, joined_ranks
from framework.training.memory import CpuMemoryTracker
from framework.training.optimizer import optimizer_factory
from framework.training.prepared import PreparedModel
from framework.training.step import train_window

STEPS = 5
"""The last of which is measured: the optimiser has its state then, and DeepSpeed knows the order of modules."""


def measure(config: Config, length: int, prompt: int, ranks: Ranks) -> dict[str, Any]:
    """Bytes at this rank's peak within a step, and the sizes of its micro-batches."""
    prepared = PreparedModel.build(config, None, ranks, None)
    engine, norm = prepared.engine, config.training.max_grad_norm
    engine.prepare(prepared.model, optimizer_factory(config), prepared.initial)
    batch = made_up(config, length, prompt, ranks.rank)
    window = [batch] * config.gradient_accumulation(ranks.world_size)
    for _ in range(STEPS - 1):
        train_window(engine, ranks, prepared.objective, window, 1e-4, norm)
    tracker = CpuMemoryTracker()
    for tensors in engine.held():
        tracker.track(tensors)
    tracker.track(gathered_before(engine.model))
    tracker.reset_peak()
    with tracker:
        train_window(engine, ranks, prepared.objective, window, 1e-4, norm)
    engine.close()
    return {"peak": tracker.peak, "sizes": batch_symbols(batch) | selection_sizes(config, batch)}


def made_up(config: Config, length: int, prompt: int, seed: int) -> Batch:
    """Rows of random tokens, each shorter than the one before, padded to a multiple of 8 as collated ones are."""
    drawn = torch.Generator().manual_seed(seed)
    shape = (config.micro_batch_size, -(-length // 8) * 8)
    ids = torch.randint(1, config.model.from_config["vocab_size"], shape, generator=drawn)
    labels, mask = ids.clone(), torch.ones(shape, dtype=torch.int64)
    documents = torch.arange(shape[0])[:, None].expand(shape).clone()
    labels[:, :prompt] = IGNORED
    for row in range(shape[0]):
        for tensor, value in ((labels, IGNORED), (mask, 0), (documents, NO_DOCUMENT)):
            tensor[row, length - row :] = value
    supervised = supervised_positions(labels, causal=True)
    inputs = {"input_ids": ids, "labels": labels, "attention_mask": mask}
    return Batch(inputs, documents, supervised, int(supervised.sum()))


def main(path: Path, output: Path) -> None:
    """Measure every case in the file; the first rank writes what all ranks found."""
    found: list[list[dict[str, Any]]] = []
    with joined_ranks(Place.of_environment(), timeout_seconds=300) as ranks:
        for case in json.loads(path.read_text()):
            config = Config.model_validate_json(json.dumps(case["config"]))
            found.append(ranks.gather(measure(config, case["length"], case["prompt"], ranks)))
        if ranks.is_first:
            output.write_text(json.dumps(found))


if __name__ == "__main__":
    sys.exit(run_command(lambda: main(Path(sys.argv[1]), Path(sys.argv[2]))))
