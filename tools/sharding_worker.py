"""What each rank holds in one step, for a list of configs; started by `measure_sharding.py` under `torchrun`."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from torch import Tensor

from framework.cli import run_command
from framework.config import Config
from framework.sharding.place import Place
from framework.sharding.ranks import Ranks, joined_ranks
from framework.training.memory import CpuMemoryTracker
from framework.training.optimizer import optimizer_factory
from framework.training.prepared import PreparedModel
from framework.training.run_data import load_run_data


def measure(config: Config, ranks: Ranks) -> dict[str, int]:
    """Bytes of this rank after the second step's backward pass and its update, and the step's peak."""
    data = load_run_data(config, lambda _: None)
    loader, _ = data.loaders(ranks.place)
    prepared = PreparedModel.build(config, data.tokenizer, ranks, None)
    engine, objective = prepared.engine, prepared.objective
    engine.prepare(prepared.model, optimizer_factory(config), prepared.initial)
    tracker = CpuMemoryTracker()
    gradients = 0
    with tracker:
        for _ in range(2):
            for tensors in engine.held():
                tracker.track(tensors)
            tracker.reset_peak()
            for batch in loader.next_window():
                loss = objective.loss(engine.model, batch, objective.select(batch), 1000)
                engine.backward(loss)
            gradients = storage_bytes(engine.held().gradients)
            engine.step(loss=loss.detach(), max_grad_norm=1.0, learning_rate=1e-4)
            del loss
    held = engine.held()
    return {
        "weights": storage_bytes(held.weights),
        "gradients": gradients,
        "optimizer": storage_bytes(held.optimizer),
        "peak": tracker.peak,
    }


def storage_bytes(tensors: list[Tensor]) -> int:
    """Of the memory behind tensors, which may share it."""
    storages = {tensor.untyped_storage()._cdata: tensor.untyped_storage().nbytes() for tensor in tensors}
    return sum(storages.values())


def main(path: Path, output: Path) -> None:
    """Measure every config in the file; the first rank writes what all ranks found."""
    found: list[list[dict[str, Any]]] = []
    with joined_ranks(Place.of_environment(), timeout_seconds=300) as ranks:
        for values in json.loads(path.read_text()):
            found.append(ranks.gather(measure(Config.model_validate_json(json.dumps(values)), ranks)))
        if ranks.is_first:
            output.write_text(json.dumps(found))


if __name__ == "__main__":
    sys.exit(run_command(lambda: main(Path(sys.argv[1]), Path(sys.argv[2]))))
