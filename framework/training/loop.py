"""The training loop: steps, evaluations and checkpoints of a run that is ready."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

from torch.profiler import record_function

from framework.checkpoint import (
    Checkpoint,
    CheckpointSaver,
    best_checkpoint,
    capture_random_state,
    is_among_best,
)
from framework.config import Config
from framework.data import Batch, Dataset, Loader
from framework.errors import RunError
from framework.sharding.protocol import Engine
from framework.sharding.ranks import Ranks
from framework.training.early_stopping import EarlyStopping
from framework.training.evaluation import evaluate
from framework.training.flops import Flops
from framework.training.insight import Insight
from framework.training.memory import CpuMemoryTracker, device_peak_memory, reset_device_peak
from framework.training.metrics import EvalRecord, MetricsFile, TrainRecord
from framework.training.non_finite import SkippedSteps, describe_non_finite
from framework.training.objective import Objective
from framework.training.progress import Reporter
from framework.training.resuming import manifest_of
from framework.training.run import TrainResult
from framework.training.run_directory import RunDirectory
from framework.training.schedule import scheduled_rate
from framework.training.signals import StopSignals
from framework.training.step import train_window

EvaluationBatches = Callable[..., Iterator[Batch]]


class Run:
    """A run in progress.

    Attributes:
        step: optimiser steps done.
        tokens: non-padding tokens they trained on, all ranks.
        complete: whether nothing is left to do.
        asked_by: what asked to stop it before.
        evaluation: figures of the evaluation after this step; None if there was none.
        early_stopping: whether evaluations still improve.
        skipped: steps without an update.
    """

    def __init__(
        self,
        config: Config,
        directory: RunDirectory,
        signals: StopSignals,
        reporter: Reporter,
        engine: Engine,
        ranks: Ranks,
        objective: Objective,
        loader: Loader,
        train_data: Dataset,
        evaluation_batches: EvaluationBatches | None,
        metrics: MetricsFile,
        tracker: CpuMemoryTracker | None,
        insight: Insight,
        saver: CheckpointSaver,
        plan: dict[str, Any],
    ) -> None:
        self.config, self.directory, self.signals, self.reporter = config, directory, signals, reporter
        self.engine, self.ranks, self.objective = engine, ranks, objective
        self.loader, self.train_data, self.plan = loader, train_data, plan
        self.evaluation_batches, self.metrics = evaluation_batches, metrics
        self.tracker, self.insight, self.saver = tracker, insight, saver
        self.step = self.tokens = 0
        self.complete = False
        self.asked_by: str | None = None
        self.evaluation: dict[str, float | None] | None = None
        self.early_stopping = EarlyStopping(config.training.early_stopping)
        self.skipped = SkippedSteps()
        self.train_loss: float | None = None
        self.eval_loss: float | None = None
        self.checkpoint: Path | None = None
        self._saved_step = 0
        self._saved_while_skipping = self._skipping_at_save = False

    def begin(self, checkpoint: Checkpoint | None) -> None:
        """Take over the counters of a checkpoint."""
        if checkpoint is None:
            return
        self.step, self.tokens, self.checkpoint = checkpoint.step, checkpoint.manifest["tokens"], checkpoint.path
        self.evaluation = checkpoint.evaluation
        self.eval_loss = self.evaluation and self.evaluation["loss"]
        counted = checkpoint.load_state()["run"]
        self.early_stopping.load_state_dict(counted["early_stopping"])
        # Whoever resumes a run that was skipping steps wants to see whether it still does.
        self.skipped.total = counted["skipped"]["total"]
        self._saved_while_skipping = counted["skipped"]["in_a_row"] > 0
        # Another run's checkpoint is not this one's: even without a further step it is saved here.
        self._saved_step = checkpoint.step if self.directory.holds(checkpoint.path) else 0

    def train(self) -> None:
        """Train to the last step or until asked to stop, evaluate and save on the way."""
        last_step = self.config.training.max_steps
        if self.finished():
            why = self.early_stopping.reason() or "that is the last"
            self.reporter.line(f"nothing left to train: the checkpoint is of step {self.step} of {last_step}: {why}")
        self.reporter.start(self.step, last_step)
        if self.evaluation_is_due() and self.evaluate():
            # The run was stopped in this evaluation, which the checkpoint of its step lacks.
            self.save()
        while not self.finished() and not self.stopping():
            with self.insight.step(self.step + 1):
                self.one_step()
            self.saved(self.saver.poll())
            if self.evaluation_is_due():
                self.evaluate()
            if _due(self.step, self.config.checkpoint.every_steps) or self.is_among_best():
                self.save()
        self.complete = self.finished() and not self.evaluation_is_due()
        self.save()
        self.saved(self.saver.wait())
        self.asked_by = None if self.complete else self.what_asked()
        cause = "done" if self.complete else f"stopped by {self.asked_by}"
        result = self.result()
        details = {
            "reason": result.reason if self.complete else None,
            "skipped steps": self.skipped.total,
            "best checkpoint": result.best_checkpoint,
            "checkpoint": result.checkpoint,
        }
        said = [f"{name}: {value}" for name, value in details.items() if value]
        self.reporter.line("; ".join([f"{cause} after step {self.step}", *said]))

    def finished(self) -> bool:
        """Whether there is no step left to do."""
        return self.step >= self.config.training.max_steps or self.early_stopping.reason() is not None

    def one_step(self) -> None:
        """Train on one accumulation window and write its record."""
        started = time.perf_counter()
        if self.tracker is not None:
            self.tracker.reset_peak()
        reset_device_peak(self.engine.device)
        step, settings = self.step + 1, self.config.training
        with record_function("data"):
            window = self.loader.next_window()
        rate = scheduled_rate(self.config, step)
        result, selected = train_window(self.engine, self.ranks, self.objective, window, rate, settings.max_grad_norm)
        self.skipped.count(result)
        seconds = time.perf_counter() - started
        tokens, supervised, selected, flops = self._totals(window, selected)
        allocated, reserved = self._peaks()
        record = TrainRecord(
            step=step,
            loss=result.loss,
            learning_rate=rate,
            grad_norm=result.grad_norm,
            tokens=tokens,
            supervised_tokens=supervised,
            selected_tokens=selected,
            step_seconds=seconds,
            tokens_per_second=tokens / seconds,
            peak_memory_bytes=allocated,
            predicted_peak_memory_bytes=self.plan["chosen"]["peak_allocated_bytes"],
            peak_reserved_bytes=reserved,
            **self.insight.utilisation(flops, seconds),
            loss_scale=result.loss_scale,
            skipped=result.skipped,
            skipped_steps=self.skipped.total,
        )
        self.step, self.tokens, self.train_loss, self.evaluation = step, self.tokens + tokens, result.loss, None
        if _due(step, self.config.logging.every_steps) or step == settings.max_steps or result.skipped:
            self.report(record)
        self.insight.peak(step, allocated)
        if not result.finite:
            self.answer_non_finite(describe_non_finite(step, result, window, self.train_data, self.ranks))

    def answer_non_finite(self, what: str) -> None:
        """Let a step that is not finite be skipped, which the engine did already, or stop the run.

        Raises:
            RunError: the config says to stop, or this was the last of the steps in a row that it lets pass.
        """
        settings = self.config.training
        if settings.non_finite == "stop":
            raise RunError(
                f"{what}; {self._kept()}; lower optimizer.learning_rate, or set training.non_finite to 'skip' to leave "
                "such steps out"
            )
        if self.skipped.in_a_row >= settings.max_skipped_steps:
            raise RunError(
                f"{what}; it is the last of {self.skipped.in_a_row} such steps in a row (training.max_skipped_steps): "
                f"the run has diverged; {self._kept()}; lower optimizer.learning_rate, or go on from an earlier "
                "checkpoint"
            )
        self.reporter.line(f"warning: skipped {what}")

    def evaluation_is_due(self) -> bool:
        """Whether this step, or the end of the run, calls for an evaluation that was not made yet."""
        if self.evaluation_batches is None or self.evaluation is not None:
            return False
        settings = self.config.training
        return self.finished() or (
            _due(self.step, settings.eval_every_steps) if self.step else settings.eval_before_training
        )

    def evaluate(self) -> bool:
        """Evaluate and write the record; false if a request to stop came in between.

        Raises:
            RunError: the loss is not finite, and the config does not say to go on then.
        """
        batches = self.evaluation_batches(max_samples=self.config.training.eval_max_samples)
        with self.insight.evaluation(self.step):
            record = evaluate(self.engine, self.ranks, batches, step=self.step, interrupted=self.asked_to_stop)
        if record is None:
            return False
        self.evaluation, self.eval_loss = record.figures(), record.loss
        self._saved_step = 0
        self.report(record)
        settings = self.config.training
        if not math.isfinite(record.loss) and settings.non_finite == "stop":
            raise RunError(f"step {self.step}: the evaluation loss is {record.loss}; {self._kept()}")
        if self.step and _due(self.step, settings.eval_every_steps):
            self.early_stopping.observe(self.step, self.evaluation)
        return True

    def is_among_best(self) -> bool:
        """Whether this step's evaluation makes it a checkpoint to keep as one of the best."""
        settings = self.config.checkpoint
        if self.evaluation is None or settings.keep_best == 0:
            return False
        # A checkpoint that is being saved counts too.
        self.saved(self.saver.wait())
        figure = self.evaluation[settings.best_metric]
        # The first rank's view of the disk decides.
        return self.ranks.broadcast(
            self.ranks.is_first and is_among_best(self.directory.path, figure, settings.best_metric, settings.keep_best)
        )

    def report(self, record: TrainRecord | EvalRecord) -> None:
        """Hand a record to everything that follows the run: the metrics file, and what a person sees."""
        self.metrics.write(record)
        self.insight.write(record)
        self.reporter.record(record, self.config.training.max_steps)

    def save(self) -> None:
        """Write a checkpoint of the current step with its evaluation, unless there is one."""
        if self.step == self._saved_step:
            return
        self.metrics.sync()
        self.insight.flush()
        position = self.loader.state_dict()
        # The one before is complete from here on.
        self.saved(self.saver.wait())
        self._saved_step, self._skipping_at_save = self.step, self.skipped.in_a_row > 0
        path = self.saver.save(
            self.step,
            weights=self.engine.weights(),
            optimizer=self.engine.optimizer_state(),
            state={
                "engine": self.engine.state_dict(),
                "loader": position,
                "random": self.ranks.gather(capture_random_state()),
                "run": {"early_stopping": self.early_stopping.state_dict(), "skipped": asdict(self.skipped)},
            },
            manifest=manifest_of(
                self.config, self.plan, self.train_data, tokens=self.tokens, evaluation=self.evaluation, loader=position
            ),
        )
        self.saved(path)

    def saved(self, path: Path | None) -> None:
        """Take note of a checkpoint that became complete, if one did."""
        if path is not None:
            self.checkpoint, self._saved_while_skipping = path, self._skipping_at_save

    def stopping(self) -> bool:
        """Whether any rank was asked to stop."""
        return self.ranks.any(self.asked_to_stop())

    def what_asked(self) -> str:
        """What asked any rank to stop; all ranks call this."""
        requests = self.ranks.gather(self.signals.requested(self.directory.stop_file))
        return " and ".join(sorted({request for request in requests if request is not None}))

    def asked_to_stop(self) -> bool:
        """Whether this rank was asked to stop."""
        return self.signals.requested(self.directory.stop_file) is not None

    def result(self) -> TrainResult:
        """How the run ended."""
        stopped_early = self.complete and self.step < self.config.training.max_steps
        best = best_checkpoint(self.directory.path, self.config.checkpoint.best_metric)
        return TrainResult(
            status="completed" if self.complete else "stopped",
            step=self.step,
            run_dir=self.directory.path,
            checkpoint=self.checkpoint,
            train_loss=self.train_loss,
            eval_loss=self.eval_loss,
            reason=self.early_stopping.reason() if stopped_early else self.asked_by,
            best_checkpoint=best.path if best is not None and self.config.checkpoint.keep_best else None,
        )

    def _totals(self, window: list[Batch], selected: int) -> tuple[int, int, int, Flops]:
        """Tokens, supervised and selected ones, and floating-point operations of a step, over all ranks."""
        own = self.objective.flops()
        tokens, supervised = (sum(getattr(batch, name) for batch in window) for name in ("tokens", "supervised_tokens"))
        totals = self.ranks.sum([tokens, supervised, selected, own.model, own.hardware])
        counted = [int(total) for total in totals]
        return counted[0], counted[1], counted[2], Flops(*counted[3:])

    def _peaks(self) -> tuple[int | None, int | None]:
        """Peak bytes allocated and reserved, of the rank with most; None where nobody counts them."""
        if (peak := device_peak_memory(self.engine.device)) is not None:
            allocated, reserved = self.ranks.max(peak)
            return int(allocated), int(reserved)
        return (None if self.tracker is None else int(self.ranks.max([self.tracker.peak])[0])), None

    def _kept(self) -> str:
        self.saved(self.saver.wait())
        if self.checkpoint is None:
            return "no checkpoint was saved yet"
        skipping = " (saved while steps were being skipped)" if self._saved_while_skipping else ""
        return f"the newest checkpoint is {self.checkpoint}{skipping}"


def _due(step: int, every: int) -> bool:
    """Whether something that happens every so many steps (0: never) happens after this one."""
    return every > 0 and step % every == 0
