"""What a job does before and after training, without a cluster."""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path

import pytest

from framework.cluster import slurm
from framework.cluster.files import JobFiles, Start, Submission
from framework.cluster.job import Place, Verdict, begin, end, judge
from framework.errors import RunError
from framework.training.run_directory import COMPLETED, FAILED, LOST_RANK, SECOND_SIGNAL, STOPPED, RunDirectory

NOW = datetime(2026, 11, 26, 12, tzinfo=UTC)


@pytest.fixture
def directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> RunDirectory:
    """A submitted run, for one, two or four machines with eight ranks, of a cluster that is not asked."""
    found = RunDirectory(tmp_path / "run")
    found.job.mkdir(parents=True)
    log = tmp_path / "12.log"
    log.write_text("first\nlast\n")
    JobFiles(found).write(Submission("12", "12.sh", str(log), (1, 2, 4), 8, 1, NOW.isoformat()))
    monkeypatch.setattr(slurm, "hosts", lambda nodes: [f"node{number}" for number in range(1, 6)])
    monkeypatch.setattr(slurm, "address", lambda node: f"{node}.cluster")
    return found


def place(restarts: int = 0, nodes: int = 4) -> Place:
    return Place(job="12", number=12, restarts=restarts, nodes=nodes, nodelist="node[1-5]")


def running(job: str) -> slurm.JobState:
    return slurm.JobState(job, "RUNNING", "None", "1:00", "N/A", 0, "node1")


def refuse(job: str) -> None:
    raise AssertionError(f"{job} is requeued")


def save(directory: RunDirectory, step: int) -> None:
    directory.checkpoints.mkdir(exist_ok=True)
    (directory.checkpoints / "latest").write_text(f"step-{step:08d}\n")


@pytest.mark.parametrize(("nodes", "used"), [(1, 1), (2, 2), (3, 2), (4, 4), (5, 4)])
def test_a_start_uses_the_most_machines_that_a_plan_is_for(directory: RunDirectory, nodes: int, used: int) -> None:
    assert begin(directory, place(nodes=nodes), NOW) == f"{used} node1.cluster {20000 + 12 * 31}"
    assert JobFiles(directory).starts("12") == [Start("12", 0, NOW.isoformat(), used, None, None)]
    hostfile = JobFiles(directory).hostfile.read_text()
    assert hostfile == "".join(f"node{number}.cluster slots=8\n" for number in range(1, used + 1))


def test_requeues_without_a_new_checkpoint_come_to_an_end(directory: RunDirectory) -> None:
    begin(directory, place(), NOW)
    begin(directory, place(1), NOW)
    save(directory, 7)
    begin(directory, place(2), NOW)
    begin(directory, place(3), NOW)
    directory.mark(FAILED, code=1, message="rank 3 is gone", rank=0, last_lines=[], cause=LOST_RANK)
    with pytest.raises(RunError, match=r"started 2 times in a row and never got beyond the checkpoint of step 7") as no:
        begin(directory, place(4), NOW)
    assert "max_requeues_without_progress = 1 permits. The last time: rank 3 is gone" in str(no.value)
    marker = directory.read_marker(FAILED)
    assert (marker["message"], marker["last_lines"], marker["cause"]) == (str(no.value), ["first", "last"], None)
    assert [start.step for start in JobFiles(directory).starts("12")] == [None, None, 7, 7]
    # Another job starts to count anew.
    assert begin(directory, Place("13", 13, 0, 4, "node[1-5]"), NOW) is not None


def test_a_complete_run_is_not_started_again_by_a_requeue(directory: RunDirectory) -> None:
    directory.mark(COMPLETED, code=0, message="completed 6 steps", rank=0, last_lines=[])
    assert begin(directory, place(1), NOW) is None
    assert begin(directory, place(0), NOW) is not None


def test_how_the_start_before_ended_is_forgotten(directory: RunDirectory) -> None:
    directory.mark(STOPPED, code=0, message="stopped after step 3 by STOP", rank=0, last_lines=[], cause="STOP")
    directory.stop_file.touch()
    assert begin(directory, place(1), NOW) is not None
    assert directory.ending is None and not directory.stop_file.exists()


def test_too_few_machines_are_refused(directory: RunDirectory) -> None:
    JobFiles(directory).write(Submission("12", None, None, (2, 4), 8, 1, NOW.isoformat()))
    with pytest.raises(RunError, match="the job has 1 machines, and the run needs 2"):
        begin(directory, place(nodes=1), NOW)
    assert directory.read_marker(FAILED)["message"] == "the job has 1 machines, and the run needs 2"


@pytest.mark.parametrize(
    ("marker", "cause", "asked", "requeue", "code"),
    [
        (COMPLETED, None, False, False, 0),
        (COMPLETED, None, True, False, 0),
        (STOPPED, "STOP", True, True, 0),
        (STOPPED, "STOP", False, False, 0),
        (STOPPED, "SIGTERM", False, True, 0),
        (STOPPED, "SIGTERM and STOP", False, True, 0),
        (FAILED, None, False, False, 2),
        (FAILED, None, True, False, 2),
        (FAILED, LOST_RANK, False, True, 2),
        (FAILED, SECOND_SIGNAL, True, True, 2),
    ],
)
def test_what_becomes_of_a_job_depends_on_the_end_marker(
    marker: str, cause: str | None, asked: bool, requeue: bool, code: int
) -> None:
    record = {"code": 0 if marker != FAILED else 2, "message": "why", "cause": cause}
    verdict = judge(marker, record, asked=asked, began=True, code=143)
    assert (verdict.requeue, verdict.code) == (requeue, code)


@pytest.mark.parametrize(
    ("began", "asked", "requeue"),
    [(True, False, True), (False, False, False), (False, True, True), (True, True, True)],
)
@pytest.mark.parametrize(("launcher", "code"), [(137, 137), (0, 1)])
def test_a_run_without_a_word_goes_on_if_it_had_begun(
    began: bool, asked: bool, requeue: bool, launcher: int, code: int
) -> None:
    when = "in training" if began else "before training began"
    why = f"the ranks ended {when} without a word; the launcher's exit code is {launcher}"
    assert judge(None, {}, asked=asked, began=began, code=launcher) == Verdict(requeue, code, why)


def test_a_launcher_that_cannot_start_ranks_fails_at_once_with_the_end_of_the_log(directory: RunDirectory) -> None:
    directory.metrics.write_text("of the job before\n")
    begin(directory, place(), NOW)
    assert end(directory, place(), asked=False, code=7, state_of=running, requeue=refuse) == 7
    marker = directory.read_marker(FAILED)
    assert marker["message"] == "the ranks ended before training began without a word; the launcher's exit code is 7"
    assert (marker["code"], marker["last_lines"], marker["cause"]) == (7, ["first", "last"], None)


def test_ranks_that_vanish_in_training_go_on(directory: RunDirectory) -> None:
    begin(directory, place(), NOW)
    directory.metrics.write_text("of this start\n")
    asked: list[str] = []
    assert end(directory, place(), asked=False, code=7, state_of=running, requeue=asked.append) == 0
    assert asked == ["12"] and directory.ending is None


@pytest.mark.parametrize(
    ("state", "requeued", "code"),
    [("RUNNING", ["12"], 0), ("SIGNALING", ["12"], 0), ("CANCELLED", [], 1), ("COMPLETING", [], 1), (None, [], 1)],
)
def test_a_job_that_was_cancelled_is_not_requeued(
    directory: RunDirectory, state: str | None, requeued: list[str], code: int
) -> None:
    begin(directory, place(), NOW)
    directory.mark(FAILED, code=1, message="gone", rank=0, last_lines=[], cause=LOST_RANK)
    directory.stop_file.touch()
    found = None if state is None else slurm.JobState("12", state, "None", "1:00", "N/A", 0, "node1")
    asked: list[str] = []
    ended = end(directory, place(), asked=True, code=1, state_of=lambda job: found, requeue=asked.append)
    assert (ended, asked) == (code, requeued)
    assert not directory.stop_file.exists()


def test_the_last_element_of_an_array_is_not_the_array() -> None:
    environment = {
        "SLURM_JOB_ID": "40",
        "SLURM_ARRAY_JOB_ID": "40",
        "SLURM_ARRAY_TASK_ID": "2",
        "SLURM_RESTART_COUNT": "1",
        "SLURM_JOB_NUM_NODES": "2",
        "SLURM_JOB_NODELIST": "node[1-2]",
    }
    assert Place.of_environment(environment) == Place("40_2", 40, 1, 2, "node[1-2]")
    with pytest.raises(RunError, match="SLURM_JOB_ID is not set"):
        Place.of_environment({})
