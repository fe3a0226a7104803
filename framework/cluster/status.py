"""Where submitted runs are, from their directories and SLURM's queue. Must not import torch."""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from framework.cluster import slurm
from framework.cluster.files import JobFiles, Submission, last_lines
from framework.errors import RunError, UserError
from framework.training.run_directory import COMPLETED, FAILED, STOPPED, RunDirectory

LINES = 20
"""That are shown of an error or a log."""

TIMED_STEPS = 50
"""Whose median stands for the ones to come."""

METRICS_LINES = 2 * TIMED_STEPS


@dataclass(frozen=True)
class Progress:
    """How far a run is.

    Attributes:
        step: last optimiser step that was recorded, or of the newest checkpoint; 0 before any.
        steps: that it is to do; None if that is not known yet.
        step_seconds: median of the last steps; None before any.
    """

    step: int
    steps: int | None
    step_seconds: float | None

    @classmethod
    def of(cls, directory: RunDirectory) -> Progress:
        """That of a run directory."""
        steps = None
        # The first one has epochs in steps; the second one is there before the run.
        for path in (JobFiles(directory).config, directory.path / "config.json"):
            if path.exists():
                steps = json.loads(path.read_text(encoding="utf-8"))["training"]["max_steps"] or steps
        records = list(_train_records(directory.metrics))
        if not records:
            return cls(directory.latest_step or 0, steps, None)
        seconds = statistics.median(record["step_seconds"] for record in records[-TIMED_STEPS:])
        return cls(records[-1]["step"], steps, seconds)

    def __str__(self) -> str:
        return f"step {self.step}" if self.steps is None else f"step {self.step} of {self.steps}"

    @property
    def seconds_left(self) -> float | None:
        """For the steps that are left; None if that is not known."""
        if self.steps is None or self.step_seconds is None:
            return None
        return (self.steps - self.step) * self.step_seconds


def status_lines(paths: Sequence[Path]) -> list[str]:
    """Where runs are: a line each, and below it what a failed one said last.

    Args:
        paths: of run directories.

    Raises:
        UserError: one of them is none.
    """
    directories = [RunDirectory(path) for path in paths]
    submissions = [JobFiles(directory).submission() for directory in directories]
    for directory, submission in zip(directories, submissions, strict=True):
        if submission is None and directory.ending is None:
            raise UserError(f"--status: {directory.path} is not the directory of a submitted run")
    jobs = [submission.job for submission in submissions if submission is not None and submission.job is not None]
    lines, answers = [], True
    try:
        states = slurm.job_states(jobs)
    except RunError as error:
        states, answers = {}, False
        lines.append(f"SLURM does not answer: {error}")
    for directory, submission in zip(directories, submissions, strict=True):
        state = None if submission is None or submission.job is None else states.get(submission.job)
        if state is not None and state.is_in_queue:
            first, *rest = [_in_queue(state, Progress.of(directory))]
        elif directory.ending is None:
            assert submission is not None
            first, *rest = _without_marker(directory, submission, state, answers)
        else:
            first, *rest = _ended(directory, directory.ending, submission, state)
        lines += [f"{directory.path}: {first}", *(f"  {line}" for line in rest)]
    return lines


def _ended(
    directory: RunDirectory, marker: str, submission: Submission | None, state: slurm.JobState | None
) -> list[str]:
    record = directory.read_marker(marker) or {}
    message, *more = record["message"].splitlines()
    job = _job_words(submission, state)
    if marker == COMPLETED:
        return [f"{message}{job}"]
    if marker == STOPPED:
        return [f"{message}{job}; it goes on when it is submitted again"]
    assert marker == FAILED
    said = [line for line in record["last_lines"] if line.strip()][-LINES:]
    log = [] if submission is None or submission.log is None else [f"log: {submission.log}"]
    return [f"failed at {Progress.of(directory)}: {message}{job}", *more, *said, *log]


def _without_marker(
    directory: RunDirectory, submission: Submission, state: slurm.JobState | None, answers: bool
) -> list[str]:
    progress, job = Progress.of(directory), _job_words(submission, state)
    if submission.job is None:
        return [f"not in the queue, since SLURM has not taken it; at {progress}"]
    if not answers:
        return [f"waiting, running or gone, at {progress}{job}"]
    return [f"gone at {progress}, without a word{job}", *last_lines(submission.log, LINES), f"log: {submission.log}"]


def _job_words(submission: Submission | None, state: slurm.JobState | None) -> str:
    if submission is None or submission.job is None:
        return ""
    return f"; job {submission.job}" + ("" if state is None else f" is {state.state}")


def _in_queue(state: slurm.JobState, progress: Progress) -> str:
    times = {0: "", 1: ", requeued once"}.get(state.restarts, f", requeued {state.restarts} times")
    if state.state in slurm.WAITING:
        start = "" if state.start == "N/A" else f", to start by {state.start}"
        return f"queued ({state.reason}) at {progress}{start}; job {state.job}{times}"
    left = progress.seconds_left
    training = "" if left is None else f", {_duration(left)} to train"
    limit = "" if state.time_left == "UNLIMITED" else f", {state.time_left} left of its time limit"
    word = "running" if state.state == "RUNNING" else state.state.lower()
    return f"{word} at {progress}{training}{limit}, on {state.nodes}; job {state.job}{times}"


def _train_records(metrics: Path) -> Iterator[dict[str, Any]]:
    """The last records of steps; a line that is being written is left out."""
    for line in last_lines(metrics, METRICS_LINES):
        try:
            record = json.loads(line)
        except ValueError:
            continue
        if record["kind"] == "train":
            yield record


def _duration(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes} min"
    return f"{minutes} min {seconds} s" if minutes else f"{seconds} s"
