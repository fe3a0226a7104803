"""`framework.train`: one run from its config to its end marker. Torch is imported only once the run begins."""

from __future__ import annotations

import contextlib
import errno
import logging
import time
import traceback
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Never

from framework.errors import RunError, UserError
from framework.extras import check_bitsandbytes
from framework.importing import quick_imports
from framework.sharding.deepspeed_config import OwnOptions, read_own_options
from framework.sharding.place import Place, check_ranks
from framework.training.run_directory import COMPLETED, FAILED, LOST_RANK, SECOND_SIGNAL, STOPPED, RunDirectory
from framework.training.signals import StopRequested, StopSignals
from framework.training.tracking import check_trackers

if TYPE_CHECKING:
    from framework.config import Config
    from framework.training.progress import Reporter

TOGETHER_SECONDS = 2.0
"""Signals that a launcher and a terminal send for the same reason reach a process within this time."""

LOST_RANK_SECONDS = 3.0
"""How long a rank that has lost another one lets it tell its own error first."""


@dataclass(frozen=True)
class TrainResult:
    """How a run ended.

    Attributes:
        status: `"completed"` or `"stopped"`.
        step: last optimiser step done.
        run_dir: the run directory.
        checkpoint: directory of the newest checkpoint; None if there is none.
        train_loss: loss of the last step done by this call; None if it did none.
        eval_loss: of the last evaluation, which may be that of the checkpoint it continued; None if there was none.
        reason: why it completed before `training.max_steps`, or what asked to stop it; None if it did neither.
        best_checkpoint: directory of the checkpoint with the best evaluation; None unless `checkpoint.keep_best` is on.
    """

    status: str
    step: int
    run_dir: Path
    checkpoint: Path | None
    train_loss: float | None
    eval_loss: float | None
    reason: str | None = None
    best_checkpoint: Path | None = None


def train(
    config: Config,
    *,
    resume: str = "auto",
    signals: StopSignals | None = None,
    deepspeed_config: str | None = None,
) -> TrainResult:
    """Run a config to its end or until it is asked to stop; with several ranks, called on each of them.

    Writes the run directory `config.run.output_dir` as README's "A run directory" says. SIGINT, SIGTERM, SIGUSR2 and a
    file `STOP` in it finish the step, save and return; a second signal ends the process at once.

    Args:
        config: see `framework.load_config`.
        resume: `"auto"` continues the newest complete checkpoint of the run directory, if there is one; `"none"` starts
            over, with what the directory holds moved to `previous-N`; else the directory of a checkpoint, or of a run:
            if that is another's, what this directory holds is moved as well.
        signals: handlers that are installed already; they are used instead of own ones.
        deepspeed_config: a JSON file with further options of DeepSpeed, for the engine of that name.

    Returns:
        How it ended.

    Raises:
        UserError: config, data, model and the launch do not go together; nothing was started.
        NoPlanError: a `UserError`: the config leaves something open, and nothing fits.
        RunError: a failure while running; saved checkpoints stay as they are and the marker `FAILED` is written.
    """
    launch = check_launch(config, deepspeed_config)
    run = _Run(config, resume, launch)
    if signals is None:
        with StopSignals(together_seconds=launch.together_seconds) as installed:
            return run.to_its_end(installed)
    return run.to_its_end(signals)


@dataclass(frozen=True)
class Launch:
    """What a run is told besides its config.

    Attributes:
        place: of this process.
        ranks: number of processes that the run has, or would have.
        own_options: a user's own options of DeepSpeed.
    """

    place: Place
    ranks: int
    own_options: OwnOptions | None

    @property
    def together_seconds(self) -> float:
        """Within what time two signals are one request."""
        return TOGETHER_SECONDS if self.place.is_launched else 0.0


def check_launch(config: Config, deepspeed_config: str | None, *, preview: bool = False) -> Launch:
    """Check that a config goes with what launched this process, and with what is installed. Imports no library.

    A run that is refused is `FAILED`, if its directory exists: how it ended before is no longer the case.

    Args:
        config: of the run.
        deepspeed_config: path of a JSON file with further options of DeepSpeed.
        preview: nothing is to be run; without a launcher, it is about the processes that `hardware` describes.

    Raises:
        UserError: the run cannot be split over as many ranks; a package is missing; the file is not DeepSpeed's or of
            no use to the engine.
    """
    place = Place.of_environment()
    try:
        return _checked_launch(config, deepspeed_config, place, preview)
    except UserError as error:
        directory = RunDirectory(config.run.output_dir)
        if not preview and place.rank == 0 and directory.path.is_dir():
            directory.clear_markers()
            directory.mark(FAILED, code=error.exit_code, message=str(error), rank=0, last_lines=[])
        raise


def _checked_launch(config: Config, deepspeed_config: str | None, place: Place, preview: bool) -> Launch:
    ranks = config.described_ranks if preview and not place.is_launched else place.world_size
    check_ranks(config, ranks)
    check_trackers(config.logging.trackers)
    check_bitsandbytes(config)
    if deepspeed_config is None:
        return Launch(place, ranks, None)
    if config.sharding.engine != "deepspeed":
        raise UserError(
            f"--deepspeed_config: sharding.engine is {config.sharding.engine!r}; set it to 'deepspeed', or leave the "
            "file out"
        )
    return Launch(place, ranks, read_own_options(Path(deepspeed_config)))


class _Run:
    """A call of `train`."""

    def __init__(self, config: Config, resume: str, launch: Launch) -> None:
        self.config, self.resume, self.own_options, self.place = config, resume, launch.own_options, launch.place
        self.directory = RunDirectory(config.run.output_dir)

    def to_its_end(self, signals: StopSignals) -> TrainResult:
        """Train, and leave an end marker."""

        def second(name: str, code: int) -> None:
            self.mark(FAILED, code, f"second signal ({name}): ended at once", cause=SECOND_SIGNAL)

        signals.on_second = second
        try:
            # Whatever happens from here on, the marker of an earlier start must not be read as the end of this one.
            if self.place.rank == 0:
                self.directory.clear_markers()
            result, last_lines = self.train(signals)
        except StopRequested as request:
            if self.place.rank == 0:
                self.mark(STOPPED, 0, f"{request} before training started", cause=str(request))
            return TrainResult("stopped", 0, self.directory.path, None, None, None)
        except UserError as error:
            # Nothing was started: a directory is not made just to say so, unless other ranks are to learn of it.
            if self.directory.path.is_dir() or self.place.world_size > 1:
                self.mark_failed(error, error.exit_code)
            raise
        except Exception as error:
            self.fail(error)
        if self.place.rank == 0:
            self.mark_ended(result, last_lines)
        return result

    def train(self, signals: StopSignals) -> tuple[TrainResult, list[str]]:
        """The run itself, with the ranks connected; its result and the last lines that it printed."""
        with quick_imports():
            from framework.sharding.ranks import joined_ranks
            from framework.training.progress import Reporter

        with Reporter(quiet=self.place.rank != 0) as reporter:
            if self.place.rank != 0:
                # They would say what the first one says.
                for name in ("framework", "transformers", "peft"):
                    logging.getLogger(name).setLevel(logging.ERROR)
            if not self.config.open_keys:
                result = self.resolved(self.config, None, signals, reporter)
            else:
                from framework.training.launch_plan import resolve_together

                # One process may turn out to need no connections; several plan and train with the same ones.
                with joined_ranks(
                    self.place, timeout_seconds=self.config.sharding.timeout_seconds, needed=False
                ) as ranks:
                    self.defer(signals)
                    found = resolve_together(
                        self.config, self.resume, self.directory, ranks, reporter, self.own_options
                    )
                    result = self.resolved(found.config, found.plan, signals, reporter)
        return result, list(reporter.last_lines)

    def resolved(
        self, config: Config, planned: dict[str, Any] | None, signals: StopSignals, reporter: Reporter
    ) -> TrainResult:
        """The run without open keys."""
        with quick_imports():
            from framework.sharding.ranks import joined_ranks
            from framework.training.start import run_training

        sharding = config.sharding
        with joined_ranks(
            self.place, timeout_seconds=sharding.timeout_seconds, needed=sharding.engine != "single"
        ) as ranks:
            self.defer(signals)
            return run_training(
                config,
                resume=self.resume,
                own_options=self.own_options,
                ranks=ranks,
                directory=self.directory,
                signals=signals,
                reporter=reporter,
                planned=planned,
            )

    def defer(self, signals: StopSignals) -> None:
        """From when ranks are connected no one may leave by itself: they agree at the first step boundary."""
        if self.place.world_size > 1:
            signals.defer()

    def fail(self, error: Exception) -> Never:
        """Say in the marker what ended the run, and raise it."""
        from framework.sharding.ranks import is_lost_connection

        if self.place.world_size > 1 and is_lost_connection(error):
            time.sleep(LOST_RANK_SECONDS)
            lost = self.lost(error)
            self.mark_failed(lost, 1, LOST_RANK)
            raise lost from error
        self.mark_failed(error, 1)
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
            full = f"the disk is full: cannot write to {self.directory.path}; free space and start again"
            raise RunError(full) from error
        if isinstance(error, OSError) and self.is_inside(error.filename):
            raise RunError(
                f"cannot write to the run directory: {error.filename}: {error.strerror}; set run.output_dir to "
                "another one, or let this one be written"
            ) from error
        raise error

    def is_inside(self, path: object) -> bool:
        """Whether a path is that of the run directory, of something in it or of a parent that it is to be made in."""
        if not isinstance(path, str | Path):
            return False
        own, other = self.directory.path.absolute(), Path(path).absolute()
        return other.is_relative_to(own) or own.is_relative_to(other)

    def lost(self, error: Exception) -> RunError:
        """What this rank says of another one that it has lost: its own error, if it could leave one."""
        told = self.directory.read_marker(FAILED)
        if told is not None:
            return RunError(f"rank {told['rank']} has ended: {told['message']}")
        return RunError(
            "another rank has ended without a word, or has not answered within sharding.timeout_seconds = "
            f"{self.config.sharding.timeout_seconds}: it may have been killed, for its memory perhaps, or hang "
            f"({str(error).splitlines()[0]})"
        )

    def mark(
        self, marker: str, code: int, message: str, last_lines: list[str] | None = None, cause: str | None = None
    ) -> None:
        """Write an end marker, unless another rank has written one."""
        self.directory.mark(
            marker, code=code, message=message, rank=self.place.rank, last_lines=last_lines or [], cause=cause
        )

    def mark_failed(self, error: Exception, code: int, cause: str | None = None) -> None:
        """Write the marker; on a full disk even that may be impossible, and the error itself is what matters then."""
        lines = traceback.format_exc().splitlines()[-20:]
        with contextlib.suppress(OSError):
            self.mark(FAILED, code, str(error) or type(error).__name__, lines, cause)

    def mark_ended(self, result: TrainResult, last_lines: list[str]) -> None:
        """Write the marker of a run that ended well."""
        if result.status == "completed":
            reason = f": {result.reason}" if result.reason else ""
            self.mark(COMPLETED, 0, f"completed {result.step} steps{reason}", last_lines)
        else:
            self.mark(STOPPED, 0, f"stopped after step {result.step} by {result.reason}", last_lines, result.reason)
