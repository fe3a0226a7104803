"""What each rank takes for one step, for a list of cases; started by `check_planner.py` on every rank."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from made_up import made_up

from framework.cli import run_command
from framework.config import Config
from framework.planner.extraction import selection_sizes
from framework.planner.recording import gathered_before
from framework.planner.symbols import batch_symbols
from framework.sharding.place import Place
from framework.sharding.ranks import Ranks, joined_ranks
from framework.training.memory import CpuMemoryTracker
from framework.training.optimizer import optimizer_factory
from framework.training.prepared import PreparedModel
from framework.training.step import train_window

WARM_UP, STEPS = 4, 5
"""Steps before those that are measured, for the optimiser to have its state and DeepSpeed the order of modules; and
these, of which the one that takes least counts: gloo's exchanges end, and with them their buffers, whenever their
threads come to it, where NCCL's are in order."""


def measure(config: Config, length: int, prompt: int, ranks: Ranks) -> dict[str, Any]:
    """Bytes at this rank's peak within a step, of the one that takes least, and the sizes of its micro-batches."""
    prepared = PreparedModel.build(config, None, ranks, None)
    engine, norm = prepared.engine, config.training.max_grad_norm
    engine.prepare(prepared.model, optimizer_factory(config), prepared.initial)
    batch = made_up(config, length, prompt, ranks.rank)
    window = [batch] * config.gradient_accumulation(ranks.world_size)
    for _ in range(WARM_UP):
        train_window(engine, ranks, prepared.objective, window, 1e-4, norm)
    tracker = CpuMemoryTracker()
    for tensors in engine.held():
        tracker.track(tensors)
    tracker.track(gathered_before(engine.model))
    peaks = []
    for _ in range(STEPS):
        tracker.reset_peak()
        with tracker:
            train_window(engine, ranks, prepared.objective, window, 1e-4, norm)
        peaks.append(tracker.peak)
    engine.close()
    return {"peak": min(peaks), "sizes": batch_symbols(batch) | selection_sizes(config, batch)}


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
