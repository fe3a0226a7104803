"""Runs that are submitted to a real cluster."""

from __future__ import annotations

import json
import shlex
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import forked
import pytest
from changed_settings import change
from slurm_cluster import Lab
from small_run import small_run

from framework.cluster.files import JobFiles, Start
from framework.cluster.slurm import RUNNING, WAITING
from framework.training.run_directory import RunDirectory

SUBMIT = forked.ROOT / "launchers" / "submit.py"
JOB_SECONDS = 300
# To ask SLURM takes a hundredth of a second of a processor.
POLL_SECONDS = 0.2
LOSS_TOLERANCE = 1e-5
# For `Runs.config`: long enough for something to happen on the way.
LONG: dict[str, Any] = {"training__max_steps": 20, "step_seconds": 0.3}
# The first rank writes a line for each step; the others wait for it.
SLOW = """
import time
from framework.training.metrics import MetricsFile
write = MetricsFile.write
MetricsFile.write = lambda self, record: (time.sleep({seconds}), write(self, record))
"""


class Runs:
    """What tests do with runs on a cluster.

    Attributes:
        lab: the cluster.
        directory: of the test.
    """

    def __init__(self, lab: Lab, directory: Path, tokenizer: Path) -> None:
        self.lab, self.directory, self._tokenizer = lab, directory, tokenizer

    def config(self, name: str = "job", step_seconds: float = 0, **changes: Any) -> Path:
        """Write a config whose data and run directory are in a directory of this name.

        Args:
            name: of the directory.
            step_seconds: for which its ranks sleep in each step, so that something can happen before the last one.
            changes: given as `section__key=value`.
        """
        home = self.directory / name
        home.mkdir()
        settings = small_run(home, self._tokenizer) | {"sharding": {"engine": "fsdp"}}
        settings["training"] |= {"micro_batch_size": 2}
        settings["hardware"] = {"gpus_per_node": 1}
        settings["cluster"] = {"time": "30", "stop_seconds": 60, "cpus_per_node": 2}
        if step_seconds:
            (home / "sitecustomize.py").write_text(SLOW.format(seconds=step_seconds))
            settings["cluster"]["setup"] = [f"export PYTHONPATH={shlex.quote(f'{home}:{forked.ROOT}')}"]
        change(settings, changes)
        path = home / "config.json"
        path.write_text(json.dumps(settings))
        return path

    def call(self, *options: str) -> forked.Ended:
        """`launchers/submit.py` with these options, for machines without accelerators."""
        environment = self.lab.environment | {"COLUMNS": "200"}
        return forked.fork(self.directory, forked.run_script, SUBMIT, [*options], environment=environment).wait()

    def submit(self, config: Path, *options: str) -> RunDirectory:
        """Submit a run; its directory."""
        ended = self.call("--config", str(config), "--device", "cpu", *options)
        assert ended.code == 0, ended.output
        return self.run(config)

    def run(self, config: Path) -> RunDirectory:
        """The run directory of a config."""
        return RunDirectory(config.parent / "run")

    def status(self, *runs: RunDirectory) -> str:
        """What `--status` says."""
        ended = self.call("--status", *(str(run.path) for run in runs))
        assert ended.code == 0, ended.output
        return ended.stdout

    def wait_for_step(self, run: RunDirectory, step: int) -> None:
        """Until that step is done."""
        self.wait(run, lambda: any(done >= step for done in steps(run)), f"step {step}")

    def wait_for_end(self, run: RunDirectory, state: str) -> None:
        """Until the job is gone; it must have left in this state."""
        self.wait(run, lambda: self.state(run) not in WAITING | RUNNING, state)
        assert self.state(run) == state, self.log(run)

    def wait(self, run: RunDirectory, condition: Callable[[], bool], what: str) -> None:
        """Until something is so."""
        deadline = time.monotonic() + JOB_SECONDS
        while not condition():
            assert time.monotonic() < deadline, f"{what} does not come, {self.state(run)}:\n{self.log(run)}"
            time.sleep(POLL_SECONDS)

    def job(self, run: RunDirectory) -> str:
        """Number of the job of a run."""
        submission = JobFiles(run).submission()
        assert submission is not None and submission.job is not None
        return submission.job

    def state(self, run: RunDirectory) -> str:
        """SLURM's state of it."""
        listed = ("squeue", "--noheader", "--array", "--states=all", f"--jobs={self.job(run)}", "--format=%T")
        return self.lab.call(*listed).strip()

    def log(self, run: RunDirectory) -> str:
        """What the job has printed."""
        log = Path(JobFiles(run).submission().log)
        return log.read_text() if log.exists() else "(no log)"

    def starts(self, run: RunDirectory) -> list[Start]:
        """Of its job."""
        return JobFiles(run).starts(self.job(run))

    def losses_of_one_process(self, config: Path, **changes: Any) -> list[float]:
        """Of the same run, uninterrupted and in one process."""
        settings = json.loads(config.read_text())
        settings["run"]["output_dir"] = str(config.parent / "alone")
        settings["sharding"] = {"engine": "single"}
        change(settings, changes)
        alone = config.with_name("alone.json")
        alone.write_text(json.dumps(settings))
        ended = forked.fork_script(self.directory, forked.TRAIN, ["--config", str(alone)]).wait()
        assert ended.code == 0, ended.output
        return losses(RunDirectory(config.parent / "alone"))


def _records(run: RunDirectory) -> list[dict[str, Any]]:
    """Of steps; a line that is being written is left out."""
    if not run.metrics.exists():
        return []
    lines = run.metrics.read_text().split("\n")[:-1]
    return [record for record in map(json.loads, lines) if record["kind"] == "train"]


def steps(run: RunDirectory) -> list[int]:
    """The steps that a run has recorded."""
    return [record["step"] for record in _records(run)]


def losses(run: RunDirectory) -> list[float]:
    """The losses of its steps, of which each must be there once."""
    records = _records(run)
    assert [record["step"] for record in records] == list(range(1, len(records) + 1))
    return [record["loss"] for record in records]


def same(found: list[float], expected: list[float]) -> bool:
    """Whether losses are those of the same run on other ranks."""
    return found == pytest.approx(expected, rel=LOSS_TOLERANCE)
