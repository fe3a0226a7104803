"""A real cluster of three nodes, and runs that are submitted to it."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import forked
import pytest
from slurm_lab import Lab, LabError, Settings, can_crash
from small_run import small_run

from framework.cluster.files import JobFiles, Start
from framework.training.run_directory import RunDirectory

REQUIRED = "SELECTRAIN_REQUIRE_SLURM"
SUBMIT = forked.ROOT / "launchers" / "submit.py"
JOB_SECONDS = 300


@pytest.fixture(scope="session")
def cluster() -> Iterator[Lab]:
    """The lab of this session; without SLURM tests are skipped, or fail where it has to be there."""
    # Not pytest's own directory, which only its owner may enter.
    directory = Path(tempfile.mkdtemp(prefix="selectrain-lab-"))
    directory.chmod(0o755)
    lab = Lab(directory)
    try:
        lab.up(Settings(nodes=3, gpus=2))
        if not can_crash():
            raise LabError("nodes need process namespaces of their own, which only root can give them")
    except LabError as error:
        if os.environ.get(REQUIRED):
            pytest.fail(f"{REQUIRED} is set, and there is no cluster: {error}")
        pytest.skip(f"no SLURM cluster: {error}")
    try:
        yield lab
    finally:
        lab.down()
        shutil.rmtree(directory)


class Runs:
    """What tests do with runs on a cluster.

    Attributes:
        lab: the cluster.
        directory: of the test.
    """

    def __init__(self, lab: Lab, directory: Path, tokenizer: Path) -> None:
        self.lab, self.directory, self._tokenizer = lab, directory, tokenizer

    def config(self, name: str = "job", **changes: Any) -> Path:
        """Write a config whose data and run directory are in a directory of this name."""
        home = self.directory / name
        home.mkdir()
        settings = small_run(home, self._tokenizer) | {"sharding": {"engine": "fsdp"}}
        settings["training"] |= {"micro_batch_size": 2}
        settings["hardware"] = {"gpus_per_node": 1}
        settings["cluster"] = {"time": "30", "stop_seconds": 60, "cpus_per_node": 2}
        for key, value in changes.items():
            section, key = key.split("__")
            settings.setdefault(section, {})[key] = value
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
        self.wait(run, lambda: self.state(run) not in ("PENDING", "RUNNING", "COMPLETING"), state)
        assert self.state(run) == state, self.log(run)

    def wait(self, run: RunDirectory, condition: Callable[[], bool], what: str) -> None:
        """Until something is so."""
        deadline = time.monotonic() + JOB_SECONDS
        while not condition():
            assert time.monotonic() < deadline, f"{what} does not come, {self.state(run)}:\n{self.log(run)}"
            time.sleep(0.05)

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
        for key, value in changes.items():
            section, key = key.split("__")
            settings[section][key] = value
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


@pytest.fixture
def runs(cluster: Lab, tmp_path: Path, tiny_tokenizer_path: Path) -> Iterator[Runs]:
    """Runs of a test, on a cluster whose nodes are all up; no job outlives the test."""
    yield Runs(cluster, tmp_path, tiny_tokenizer_path)
    cluster.call("scancel", "--full", "--user", str(os.getuid()), check=False)
