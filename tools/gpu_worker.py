"""What a step of one run takes of an accelerator; started by `check_gpu.py`, waits for a line on standard input."""

from __future__ import annotations

import gc
import json
import statistics
import sys
import time
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from made_up import made_up

from framework.cli import run_command
from framework.config import Config
from framework.data import Batch
from framework.models import configured_model
from framework.planner.extraction import selection_sizes
from framework.planner.symbols import batch_symbols
from framework.sharding.place import Place
from framework.sharding.ranks import Ranks
from framework.training import prepared as prepared_module
from framework.training.memory import CpuMemoryTracker, device_peak_memory, reset_device_peak
from framework.training.optimizer import optimizer_factory
from framework.training.prepared import PreparedModel
from framework.training.step import train_window

WARM_UP, STEPS = 2, 3
"""Steps before those that are timed, and these."""


def measure(config: Config, length: int, prompt: int, device: torch.device) -> dict[str, Any]:
    """Bytes and seconds of a step, and the sizes of its micro-batches."""
    ranks = Ranks(Place())

    def drawn_there(*arguments: Any) -> Any:
        with torch.device(device):
            return configured_model(*arguments)

    # Weights are drawn where they are used: at these sizes a host takes minutes.
    with mock.patch.object(prepared_module, "configured_model", drawn_there):
        prepared = PreparedModel.build(config, None, ranks, None)
    engine = prepared.engine
    engine.prepare(prepared.model, optimizer_factory(config), prepared.initial)
    batch = made_up(config, length, prompt, seed=0)
    window = [batch] * config.gradient_accumulation(1)

    def step() -> float:
        begun = time.perf_counter()
        train_window(engine, ranks, prepared.objective, window, 1e-5, config.training.max_grad_norm)
        torch.cuda.synchronize(device)
        return time.perf_counter() - begun

    gc.collect()
    torch.cuda.empty_cache()
    reset_device_peak(device)
    for _ in range(WARM_UP):
        step()
    seconds = [step() for _ in range(STEPS)]
    peak = device_peak_memory(device)
    assert peak is not None
    free, total = torch.cuda.mem_get_info(device)
    outside = total - free - torch.cuda.memory_reserved(device)
    tracker = CpuMemoryTracker()
    for tensors in engine.held():
        tracker.track(tensors)
    held, at_rest = tracker.current, torch.cuda.memory_allocated(device)
    with tracker:
        step()
    return {
        "allocated": peak.allocated,
        "reserved": peak.reserved,
        "outside": outside,
        "tensors": tracker.peak,
        "held": held,
        "at_rest": at_rest,
        "seconds": statistics.median(seconds),
        "all_seconds": seconds,
        "device": torch.cuda.get_device_name(device),
        "sizes": _sizes(config, batch),
    }


def _sizes(config: Config, batch: Batch) -> dict[str, float]:
    return batch_symbols(batch) | selection_sizes(config, batch)


def main(path: Path, output: Path) -> None:
    """Measure the case in a file once a line comes; an error is what is found, too."""
    case = json.loads(path.read_text())
    config = Config.model_validate_json(json.dumps(case["config"]))
    sys.stdin.readline()
    try:
        found = measure(config, case["length"], case["prompt"], torch.device("cuda:0"))
    except torch.OutOfMemoryError as error:
        found = {"error": str(error).splitlines()[0]}
    output.write_text(json.dumps(found))


if __name__ == "__main__":
    sys.exit(run_command(lambda: main(Path(sys.argv[1]), Path(sys.argv[2]))))
