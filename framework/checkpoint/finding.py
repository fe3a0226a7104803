"""Which checkpoint a run resumes from, and what resuming changes."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from framework.checkpoint.layout import (
    Checkpoint,
    DamagedCheckpointError,
    checkpoints_directory,
    list_checkpoints,
)
from framework.checkpoint.ranking import best_checkpoint
from framework.errors import UserError

logger = logging.getLogger(__name__)

_ABSENT = "(absent)"


def find_checkpoint(run_dir: Path, resume: str = "auto") -> Checkpoint | None:
    """The checkpoint to continue from. Reads only, so it is safe beside a run that is saving.

    Args:
        run_dir: The run directory; need not exist.
        resume: `auto`: the one of `run_dir` that was saved last; `none`: none; else a directory: a checkpoint, or a
            run, whose newest is taken.

    Returns:
        A complete checkpoint, or None if there is nothing to continue. Damaged ones are skipped with a warning.

    Raises:
        UserError: The directory asked for is not a complete checkpoint and has none, or all of a run's checkpoints
            are damaged: starting over is for the user to choose.
    """
    if resume == "none":
        return None
    if resume == "auto":
        return _newest(run_dir)
    path = Path(resume).expanduser()
    if not path.is_dir():
        raise UserError(f"--resume: {resume} is not a directory; give a checkpoint, a run directory, auto or none")
    if checkpoints_directory(path).is_dir():
        newest = _newest(path)
        if newest is None:
            raise UserError(f"--resume: the run {resume} has no checkpoint")
        return newest
    try:
        return Checkpoint.read(path)
    except DamagedCheckpointError as error:
        raise UserError(f"--resume: {resume} is not a complete checkpoint: {error}") from error


def find_step(run_dir: Path, step: int | None) -> Checkpoint:
    """The complete checkpoint of a step, or the newest.

    Args:
        run_dir: The run directory.
        step: Which one; None for the newest.

    Raises:
        UserError: There is none, or it is damaged.
    """
    complete, damaged = list_checkpoints(run_dir)
    if step is None and (newest := _newest(run_dir)) is not None:
        return newest
    for checkpoint in complete:
        if checkpoint.step == step:
            return checkpoint
    steps = ", ".join(str(checkpoint.step) for checkpoint in complete) or "none"
    reasons = "".join(f"\ndamaged: {path}: {reason}" for path, reason in damaged.items())
    wanted = "no checkpoint" if step is None else f"no checkpoint of step {step}"
    raise UserError(f"{run_dir}: {wanted}; complete ones: {steps}{reasons}")


def find_best(run_dir: Path, metric: str) -> Checkpoint:
    """The complete checkpoint with the best evaluation.

    Args:
        run_dir: The run directory.
        metric: The figure that counts, see `best_first`.

    Raises:
        UserError: The step of no complete checkpoint was evaluated.
    """
    if (best := best_checkpoint(run_dir, metric)) is not None:
        return best
    complete, damaged = list_checkpoints(run_dir)
    reasons = "".join(f"\ndamaged: {path}: {reason}" for path, reason in damaged.items())
    raise UserError(
        f"{run_dir}: none of its {len(complete)} checkpoints is of a step with an evaluation that has a finite "
        f"{metric}; checkpoint.keep_best keeps those that are{reasons}"
    )


def compare_configs(saved: dict[str, Any], current: dict[str, Any]) -> list[str]:
    """What differs between two configs, a line for each key: `optimizer.learning_rate: 0.001 -> 0.0003`.

    Args:
        saved: The JSON values that the checkpoint was made with.
        current: Those of now.
    """
    return list(_differences(saved, current, ""))


def truncate_metrics(path: Path, step: int) -> None:
    """Cut a metrics file back to a step: later lines, and lines that a kill left unfinished, are dropped.

    Args:
        path: A file of JSON objects, a line each; a missing one is left missing. Replaced at once, or not at all.
        step: The last step to keep. Lines without a step are kept.
    """
    if not path.exists():
        return
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    kept = "".join(f"{line}\n" for line in lines if _is_kept(line, step))
    temporary = path.with_name(f".{path.name}.tmp")
    with temporary.open("w", encoding="utf-8") as file:
        file.write(kept)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)


def _newest(run_dir: Path) -> Checkpoint | None:
    complete, damaged = list_checkpoints(run_dir)
    if damaged and not complete:
        reasons = "\n".join(f"  {path}: {reason}" for path, reason in damaged.items())
        raise UserError(f"{run_dir}: every checkpoint is damaged; start over with --resume none\n{reasons}")
    for path, reason in damaged.items():
        logger.warning("skipped the damaged checkpoint %s: %s", path, reason)
    return complete[-1] if complete else None


def _differences(before: object, after: object, key: str) -> Iterator[str]:
    if isinstance(before, dict) and isinstance(after, dict):
        for name in dict.fromkeys([*before, *after]):
            inner = f"{key}.{name}" if key else str(name)
            yield from _differences(before.get(name, _ABSENT), after.get(name, _ABSENT), inner)
    elif before != after:
        yield f"{key}: {_shown(before)} -> {_shown(after)}"


def _shown(value: object) -> str:
    return _ABSENT if value is _ABSENT else json.dumps(value)


def _is_kept(line: str, step: int) -> bool:
    try:
        entry = json.loads(line)
    except ValueError:
        return False
    return isinstance(entry, dict) and entry.get("step", step) <= step
