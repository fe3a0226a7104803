"""`framework.train`: one run from its config to its end marker. Torch is imported only once the run begins."""

from __future__ import annotations

import contextlib
import errno
import os
import traceback
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from framework.errors import RunError, UserError
from framework.extras import check_bitsandbytes
from framework.training.run_directory import COMPLETED, FAILED, STOPPED, RunDirectory
from framework.training.signals import StopRequested, StopSignals
from framework.training.tracking import check_trackers

if TYPE_CHECKING:
    from framework.config import Config


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
        reason: why it completed before `training.max_steps`; None if it did not.
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


def train(config: Config, *, resume: str = "auto", signals: StopSignals | None = None) -> TrainResult:
    """Run a config to its end or until it is asked to stop.

    Writes the run directory `config.run.output_dir` as README's "A run directory" says. SIGINT, SIGTERM, SIGUSR2 and a
    file `STOP` in it finish the step, save and return; a second signal ends the process at once.

    Args:
        config: see `framework.load_config`.
        resume: `"auto"` continues the newest complete checkpoint of the run directory, if there is one; `"none"` starts
            over, with what the directory holds moved to `previous-N`; else the directory of a checkpoint, or of a run:
            if that is another's, what this directory holds is moved as well.
        signals: handlers that are installed already; they are used instead of own ones.

    Returns:
        How it ended.

    Raises:
        UserError: config, data or model do not go together; nothing was started.
        RunError: a failure while running; saved checkpoints stay as they are and the marker `FAILED` is written.
    """
    check_launch()
    check_trackers(config.logging.trackers)
    check_bitsandbytes(config)
    directory = RunDirectory(config.run.output_dir)
    if signals is None:
        with StopSignals() as own:
            return _train(config, resume, directory, own)
    return _train(config, resume, directory, signals)


def check_launch() -> None:
    """Refuse more processes than the engine has use for.

    Raises:
        UserError: a launcher started several processes.
    """
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    if processes > 1:
        raise UserError(
            f"sharding.engine: 'single' runs in one process, but the launcher started {processes} (WORLD_SIZE); "
            "start one process: --num_gpus 1 for deepspeed, --nproc-per-node 1 for torchrun"
        )


def _train(config: Config, resume: str, directory: RunDirectory, signals: StopSignals) -> TrainResult:
    def second(name: str, code: int) -> None:
        message = f"second signal ({name}): ended at once"
        directory.mark(FAILED, code=code, message=message, rank=0, last_lines=[])

    signals.on_second = second
    # Whatever happens from here on, the marker of an earlier start must not be read as the end of this one.
    directory.clear_markers()
    try:
        from framework.training.loop import run_training
        from framework.training.progress import Reporter

        with Reporter() as reporter:
            result = run_training(config, resume=resume, directory=directory, signals=signals, reporter=reporter)
    except StopRequested as request:
        message = f"{request} before training started"
        directory.mark(STOPPED, code=0, message=message, rank=0, last_lines=[])
        return TrainResult("stopped", 0, directory.path, None, None, None)
    except UserError as error:
        # Nothing was started: a directory is not made just to say so.
        if directory.path.is_dir():
            _mark_failed(directory, error, code=error.exit_code)
        raise
    except Exception as error:
        _mark_failed(directory, error, code=1)
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise RunError(f"the disk is full: cannot write to {directory.path}; free space and start again") from error
        raise
    marker, message = (
        (COMPLETED, f"completed {result.step} steps" + (f": {result.reason}" if result.reason else ""))
        if result.status == "completed"
        else (STOPPED, f"stopped after step {result.step}")
    )
    directory.mark(marker, code=0, message=message, rank=0, last_lines=list(reporter.last_lines))
    return result


def _mark_failed(directory: RunDirectory, error: Exception, code: int) -> None:
    """Write the marker; on a full disk even that may be impossible, and the error itself is what matters then."""
    lines = traceback.format_exc().splitlines()[-20:]
    with contextlib.suppress(OSError):
        directory.mark(FAILED, code=code, message=str(error) or type(error).__name__, rank=0, last_lines=lines)
