"""What a submission and its job leave in the folder `slurm` of a run directory. Must not import torch."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from framework.training.run_directory import RunDirectory, write_json


@dataclass(frozen=True)
class Submission:
    """`job.json`: what was asked of SLURM.

    Attributes:
        job: its number, with that of the element in an array: `12` or `12_0`; None until SLURM has given one.
        script: the batch script; None likewise.
        log: the file with the job's output, which need not be there yet; None likewise.
        nodes: numbers of machines on which the run can go on, rising.
        gpus_per_node: ranks on each.
        max_requeues_without_progress: as in the config.
        submitted: when, in ISO 8601.
    """

    job: str | None
    script: str | None
    log: str | None
    nodes: tuple[int, ...]
    gpus_per_node: int
    max_requeues_without_progress: int
    submitted: str


@dataclass(frozen=True)
class Start:
    """A line of `starts.jsonl`: a start of a job.

    Attributes:
        job: as in `Submission`.
        restarts: how often SLURM had requeued it.
        time: when, in ISO 8601.
        nodes: machines that were taken.
        step: of the newest checkpoint; None without one.
        metrics_written: when `metrics.jsonl` was changed last, in nanoseconds; None without it.
    """

    job: str
    restarts: int
    time: str
    nodes: int
    step: int | None
    metrics_written: int | None


class JobFiles:
    """The folder `slurm` of a run directory.

    Attributes:
        path: the folder.
        config: the config that the job reads, as it was when it was submitted.
        hostfile: machines of the job, for the launcher `deepspeed`.
    """

    def __init__(self, directory: RunDirectory) -> None:
        self.path = directory.job
        self.config = self.path / "config.json"
        self.hostfile = self.path / "hostfile"
        self._submission = self.path / "job.json"
        self._starts = self.path / "starts.jsonl"

    def write(self, submission: Submission) -> None:
        """Write `job.json` in one go."""
        write_json(self._submission, asdict(submission))

    def submission(self) -> Submission | None:
        """What was submitted last; None if nothing was."""
        try:
            record: dict[str, Any] = json.loads(self._submission.read_text(encoding="utf-8"))
        except FileNotFoundError:
            return None
        return Submission(**record | {"nodes": tuple(record["nodes"])})

    def add(self, start: Start) -> None:
        """Append a line to `starts.jsonl`."""
        with self._starts.open("a", encoding="utf-8") as file:
            file.write(json.dumps(asdict(start)) + "\n")

    def starts(self, job: str) -> list[Start]:
        """The starts of a job so far, the first one first."""
        if not self._starts.exists():
            return []
        lines = self._starts.read_text(encoding="utf-8").splitlines()
        return [start for start in (Start(**json.loads(line)) for line in lines) if start.job == job]


def last_lines(path: str | Path | None, count: int) -> list[str]:
    """The last lines of a text file, of which no more than the last 64 KiB are read; none if it is not there."""
    if path is None:
        return []
    try:
        with Path(path).open("rb") as file:
            file.seek(0, 2)
            file.seek(max(0, file.tell() - 2**16))
            return file.read().decode("utf-8", errors="replace").splitlines()[-count:]
    except FileNotFoundError:
        return []
