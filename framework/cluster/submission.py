"""From runs to a job in SLURM's queue, or to an array of them."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from pathlib import Path

from framework.cluster import slurm
from framework.cluster.directives import log_name, options_of
from framework.cluster.files import JobFiles, Submission
from framework.cluster.script import Command, batch_script
from framework.config import Config
from framework.errors import RunError, UserError
from framework.training.run_directory import RunDirectory, write_json

AGREED = ("hardware.nodes", "hardware.gpus_per_node", "cluster")
"""Keys, and a section, whose values the runs of an array share: they are what its one batch script is made from."""


@dataclass(frozen=True)
class Job:
    """Runs that are submitted together.

    Attributes:
        configs: of the runs.
        nodes: of each run the numbers of machines on which it can go on.
        command: that trains.
        at_once: how many of an array may run at a time; None for any number.
    """

    configs: tuple[Config, ...]
    nodes: tuple[tuple[int, ...], ...]
    command: Command
    at_once: int | None = None

    @property
    def runs(self) -> list[Path]:
        """The run directories, as absolute paths."""
        return [Path(os.path.abspath(self.command.directory / each.run.output_dir)) for each in self.configs]

    @property
    def is_array(self) -> bool:
        """Whether there are several runs."""
        return len(self.configs) > 1

    @property
    def directory(self) -> Path:
        """Where script and output go: in the run directory, or beside the first one of an array."""
        return RunDirectory(self.runs[0].parent if self.is_array else self.runs[0]).job

    def script(self) -> str:
        """The batch script.

        Raises:
            UserError: see `framework.cluster.directives`.
        """
        name = self.directory.parent.name
        array = None
        if self.is_array:
            array = f"0-{len(self.configs) - 1}" + ("" if self.at_once is None else f"%{self.at_once}")
        options = options_of(self.configs[0], self.directory, name=name, array=array)
        return batch_script(self.configs[0], self.runs, options, self.command)

    def elements(self, job: str) -> list[str]:
        """The number of each run's job, of that which `sbatch` has said."""
        return [f"{job}_{index}" for index in range(len(self.configs))] if self.is_array else [job]


def check_together(configs: Sequence[tuple[str, Config]]) -> None:
    """Check that runs can be an array, and can be submitted at all.

    Args:
        configs: with the name of the file of each.

    Raises:
        UserError: they cannot; all reasons are named.
    """
    problems = []
    first_name, first = configs[0]
    directories: dict[str, str] = {}
    for name, config in configs:
        path = os.path.abspath(config.run.output_dir)
        if path in directories:
            problems.append(f"{name}: run.output_dir is that of {directories[path]}; each run needs its own")
        directories.setdefault(path, name)
        for key in AGREED:
            if _value(config, key) != _value(first, key):
                problems.append(f"{name}: {key} is another one than in {first_name}; an array asks for the same")
    if problems:
        raise UserError("\n".join(problems))


def check_free(runs: Sequence[Path]) -> None:
    """Check that no job works in these run directories, or is about to.

    Raises:
        UserError: one does.
        RunError: SLURM does not answer.
    """
    submitted = {run: JobFiles(RunDirectory(run)).submission() for run in runs}
    jobs = {run: record.job for run, record in submitted.items() if record is not None and record.job is not None}
    states = slurm.job_states(jobs.values())
    for run, job in jobs.items():
        if job in states and states[job].is_in_queue:
            raise UserError(
                f"{run}: job {job} of this run is {states[job].state}; scancel {job} first, or set run.output_dir"
            )


def submit(job: Job) -> list[Submission]:
    """Write config and batch script beside the runs, and submit them; what was submitted, by run.

    Raises:
        UserError: see `Job.script`.
        RunError: files cannot be written, or SLURM refuses the job.
    """
    text = job.script()
    try:
        return _submit(job, text)
    except OSError as error:
        raise RunError(f"cannot write {error.filename}: {error.strerror}") from error


def _submit(job: Job, text: str) -> list[Submission]:
    job.directory.mkdir(parents=True, exist_ok=True)
    records = []
    for run, config, nodes in zip(job.runs, job.configs, job.nodes, strict=True):
        files = JobFiles(RunDirectory(run))
        files.path.mkdir(parents=True, exist_ok=True)
        write_json(files.config, config.to_json())
        record = Submission(
            job=None,
            script=None,
            log=None,
            nodes=nodes,
            gpus_per_node=config.hardware.gpus_per_node,
            max_requeues_without_progress=config.cluster.max_requeues_without_progress,
            submitted=datetime.now().astimezone().isoformat(timespec="seconds"),
        )
        # The job may start before its number is known here.
        files.write(record)
        records.append(record)
    unnamed = job.directory / "job.sh"
    unnamed.write_text(text, encoding="utf-8")
    number = slurm.sbatch(unnamed)
    script = unnamed.rename(job.directory / f"{number}.sh")
    submitted = []
    for run, record, element in zip(job.runs, records, job.elements(number), strict=True):
        known = replace(record, job=element, script=str(script), log=str(job.directory / log_name(element)))
        JobFiles(RunDirectory(run)).write(known)
        submitted.append(known)
    return submitted


def _value(config: Config, key: str) -> object:
    value: object = config
    for part in key.split("."):
        value = getattr(value, part)
    return value
