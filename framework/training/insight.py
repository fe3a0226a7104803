"""What a run shows besides its metrics: trackers, utilisation, profiles, memory reports. The loop's one observer."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from types import TracebackType
from typing import Any

import torch

from framework.config import Config
from framework.environment import environment
from framework.hardware import peak_flops
from framework.sharding.precision import PRECISIONS
from framework.sharding.protocol import Engine
from framework.sharding.ranks import Ranks
from framework.training.flops import Flops, utilisation
from framework.training.memory_report import MemoryWatch
from framework.training.metrics import EvalRecord, TrainRecord
from framework.training.objective import Objective
from framework.training.predicted import PeakCheck
from framework.training.profiling import StepProfiler
from framework.training.progress import Reporter
from framework.training.run_directory import RunDirectory, write_json
from framework.training.tracking import Trackers


class Insight:
    """Observes a run; a context within which the run takes place.

    Args:
        config: of the run.
        directory: its directory, which exists.
        engine: with the prepared model.
        ranks: of the run.
        objective: whose micro-batches are counted.
        memory: watches the device's memory.
        reporter: for people.
        step: that the run starts from.
        plan: what `plan.json` holds.

    Raises:
        UserError: a tracker does not start.
    """

    def __init__(
        self,
        config: Config,
        directory: RunDirectory,
        engine: Engine,
        ranks: Ranks,
        objective: Objective,
        memory: MemoryWatch,
        reporter: Reporter,
        *,
        step: int,
        plan: dict[str, Any],
    ) -> None:
        self._config, self._objective, first = config, objective, ranks.is_first
        self._peak, self._memory = device_peak(config, engine.device, ranks.world_size), memory
        settings = config.logging.profile
        wanted = settings is not None and first
        self._profiler = StepProfiler(settings, directory.profile, engine.device, reporter.line) if wanted else None
        if self._peak is None and first and engine.device.type == "cuda":
            name = torch.cuda.get_device_name(engine.device)
            reporter.line(f"mfu is left out: framework/hardware.py has no peak of {name} for this precision")
        if first:
            write_json(directory.path / "environment.json", environment(commands=False))
        self._check = PeakCheck(plan, config, engine.device, reporter.line, after_step=step) if first else None
        self._trackers = Trackers(config, directory, rank=ranks.rank, step=step, plan=plan, report=reporter.line)

    @contextmanager
    def evaluation(self, step: int) -> Iterator[None]:
        """An evaluation batch after this step is run within this context."""
        with self._memory.guard(f"evaluation after step {step}", phase="evaluation"):
            yield

    @contextmanager
    def step(self, step: int) -> Iterator[None]:
        """One optimiser step is taken within this context."""
        self._objective.tally.reset()
        if self._profiler is not None:
            self._profiler.begin_step(step)
        with self._memory.guard(f"step {step}"):
            yield
        if self._profiler is not None:
            self._profiler.end_step(step)
        self._memory.end_step(step)

    def utilisation(self, total: Flops, seconds: float) -> dict[str, Any]:
        """What a step of so many operations on all ranks and so many seconds did: these keys of its `TrainRecord`."""
        return utilisation(total, seconds=seconds, peak=self._peak)

    def peak(self, step: int, measured: int | None) -> None:
        """Compare the peak of a step, of the rank with most, with what the plan predicts."""
        if self._check is not None:
            self._check.observe(step, measured)

    def write(self, record: TrainRecord | EvalRecord) -> None:
        """Pass on what was written to `metrics.jsonl`."""
        self._trackers.write(record)

    def flush(self) -> None:
        """Before a checkpoint is saved."""
        self._trackers.flush()

    def __enter__(self) -> Insight:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if self._profiler is not None:
                self._profiler.close()
        finally:
            self._trackers.close(failed=kind is not None)


def device_peak(config: Config, device: torch.device, count: int) -> float | None:
    """Floating-point operations a second that so many devices could do in the run's precision, if known."""
    if device.type != "cuda":
        return None
    precision = PRECISIONS[config.optimizer.precision]
    own = peak_flops(
        torch.cuda.get_device_name(device),
        precision.autocast or config.weights_dtype,
        tf32=torch.get_float32_matmul_precision() != "highest",
    )
    return None if own is None else own * count
