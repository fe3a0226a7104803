"""A run from top to bottom: data, model, transforms, resume, then the loop."""

from __future__ import annotations

from contextlib import closing, nullcontext
from functools import partial
from typing import Any

from framework.checkpoint import (
    CheckpointSaver,
    seed_generators,
    truncate_metrics,
)
from framework.config import Config
from framework.sharding.deepspeed_config import OwnOptions
from framework.sharding.ranks import Ranks
from framework.training.insight import Insight
from framework.training.loop import Run
from framework.training.memory_report import MemoryWatch
from framework.training.metrics import MetricsFile
from framework.training.optimizer import optimizer_factory
from framework.training.prepared import PreparedModel, placed
from framework.training.progress import Reporter
from framework.training.resuming import resumable_checkpoint, resume_from
from framework.training.run import TrainResult
from framework.training.run_data import shared_run_data
from framework.training.run_directory import RunDirectory
from framework.training.setup import (
    cpu_tracker,
    in_steps,
    open_directory,
    report_epochs,
    use_deterministic_kernels,
    warm_up,
)
from framework.training.signals import StopSignals
from framework.training.stored_plan import plan_of_run


def run_training(
    config: Config,
    *,
    resume: str,
    own_options: OwnOptions | None,
    ranks: Ranks,
    directory: RunDirectory,
    signals: StopSignals,
    reporter: Reporter,
    planned: dict[str, Any] | None = None,
) -> TrainResult:
    """Do what `framework.train` promises, the end marker aside. See there for errors.

    Args:
        config: of the run.
        resume: as there.
        own_options: a user's own options of DeepSpeed.
        ranks: connected.
        directory: of the run.
        signals: that ask to stop.
        reporter: for people.
        planned: the plan of a run that the planner has resolved.
    """
    if config.training.deterministic:
        use_deterministic_kernels()

    data = shared_run_data(config, ranks, reporter.line)
    config, train_data, eval_data = data.config, data.train, data.eval
    loader, evaluation_batches = data.loaders(ranks.place)
    if config.training.epochs is not None:
        config = in_steps(config, loader, reporter)
    # What cannot be continued is refused before a large model is read.
    checkpoint = resumable_checkpoint(directory.path, resume, config, train_data, ranks, reporter)

    # The order of the transforms: adapters, then selection and retention, then the engine.
    prepared = PreparedModel.build(config, data.tokenizer, ranks, own_options)
    engine, objective = prepared.engine, prepared.objective
    plan = plan_of_run(config, prepared.options, ranks, directory, planned)
    memory = MemoryWatch(config, directory.memory, engine.device, objective.tally, ranks.rank, plan)
    ranks.meet()
    with memory.guard("placing the model", phase="placing"):
        engine.prepare(prepared.model, optimizer_factory(config, reporter.line), prepared.initial)
    reporter.line(f"model: {prepared.counts}, {placed(engine, ranks)}")
    seed_generators(config.run.seed, rank=ranks.rank)

    if checkpoint is not None:
        resume_from(checkpoint, config, engine, ranks, loader, reporter)
    step = checkpoint.step if checkpoint else 0
    ranks.barrier()
    if ranks.is_first:
        continues = checkpoint is not None and directory.holds(checkpoint.path)
        open_directory(directory, config, plan, after_step=step if continues else 0, reporter=reporter)
        truncate_metrics(directory.metrics, step)
    ranks.barrier()
    report_epochs(config, loader, reporter)

    tracker = cpu_tracker(config, engine)
    memory.placed(engine, tracker)
    signals.defer()
    with (
        closing(engine),
        closing(loader),
        MetricsFile(directory.metrics if ranks.is_first else None) as metrics,
        Insight(config, directory, engine, ranks, objective, memory, reporter, step=step, plan=plan) as insight,
        tracker or nullcontext(),
        closing(CheckpointSaver(directory.path, config.checkpoint, ranks)) as saver,
    ):
        longest = next(evaluation_batches(train_data, rank=0, ranks=1))
        with memory.guard("longest batch"):
            objective.check(engine.model, longest)
            if engine.device.type == "cuda":
                warm_up(engine, ranks, objective, longest)
        evaluation = partial(evaluation_batches, eval_data) if eval_data is not None else None
        run = Run(
            config=config,
            directory=directory,
            signals=signals,
            reporter=reporter,
            engine=engine,
            ranks=ranks,
            objective=objective,
            loader=loader,
            train_data=train_data,
            evaluation_batches=evaluation,
            metrics=metrics,
            tracker=tracker,
            insight=insight,
            saver=saver,
            plan=plan,
        )
        run.begin(checkpoint)
        run.train()
    return run.result()
