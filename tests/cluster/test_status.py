from __future__ import annotations

import json
from pathlib import Path

import pytest

from framework.cluster import slurm, status
from framework.cluster.files import JobFiles, Submission
from framework.cluster.slurm import JobState
from framework.errors import UserError
from framework.training.run_directory import COMPLETED, FAILED, STOPPED, RunDirectory


@pytest.fixture
def run(tmp_path: Path) -> RunDirectory:
    """A run of job 12 for 100 steps, of which 40 are done; its log has two lines."""
    found = RunDirectory(tmp_path / "run")
    found.job.mkdir(parents=True)
    log = tmp_path / "12.log"
    log.write_text("first\nlast\n")
    files = JobFiles(found)
    files.write(Submission("12", "12.sh", str(log), (1,), 8, 3, "2026-11-26"))
    files.config.write_text(json.dumps({"training": {"max_steps": None}}))
    (found.path / "config.json").write_text(json.dumps({"training": {"max_steps": 100}}))
    records = [{"kind": "train", "step": step, "step_seconds": 60 + step % 3} for step in range(1, 41)]
    lines = [json.dumps(record) for record in (*records, {"kind": "eval", "step": 40})]
    found.metrics.write_text("\n".join([*lines, '{"kind": "tra']))
    return found


def lines(run: RunDirectory, monkeypatch: pytest.MonkeyPatch, state: JobState | None) -> list[str]:
    monkeypatch.setattr(slurm, "job_states", lambda jobs: {} if state is None else {state.job: state})
    return [line.replace(str(run.path.parent), "…") for line in status.status_lines([run.path])]


def test_a_running_job(run: RunDirectory, monkeypatch: pytest.MonkeyPatch) -> None:
    # A marker of the start before is no news.
    run.mark(STOPPED, code=0, message="stopped after step 20", rank=0, last_lines=[], cause="STOP")
    state = JobState("12", "RUNNING", "None", "21:03:00", "2026-11-26T09:00:00", 2, "node[1-2]")
    assert lines(run, monkeypatch, state) == [
        "…/run: running at step 40 of 100, 1 h 1 min to train, 21:03:00 left of its time limit, on node[1-2]; job 12, "
        "requeued 2 times"
    ]


@pytest.mark.parametrize(("start", "when"), [("N/A", ""), ("2026-11-27T09:00:00", ", to start by 2026-11-27T09:00:00")])
def test_a_waiting_job(run: RunDirectory, monkeypatch: pytest.MonkeyPatch, start: str, when: str) -> None:
    run.metrics.unlink()
    run.checkpoints.mkdir()
    (run.checkpoints / "latest").write_text("step-00000030\n")
    state = JobState("12", "PENDING", "Priority", "1:00", start, 1, "")
    said = [f"…/run: queued (Priority) at step 30 of 100{when}; job 12, requeued once"]
    assert lines(run, monkeypatch, state) == said


def test_runs_that_have_ended(run: RunDirectory, monkeypatch: pytest.MonkeyPatch) -> None:
    state = JobState("12", "COMPLETED", "None", "0:00", "N/A", 0, "")
    run.mark(COMPLETED, code=0, message="completed 100 steps", rank=0, last_lines=["a"])
    assert lines(run, monkeypatch, None) == ["…/run: completed 100 steps; job 12"]
    assert lines(run, monkeypatch, state) == ["…/run: completed 100 steps; job 12 is COMPLETED"]
    run.clear_markers()
    run.mark(STOPPED, code=0, message="stopped after step 40 by STOP", rank=0, last_lines=[], cause="STOP")
    said = ["…/run: stopped after step 40 by STOP; job 12; it goes on when it is submitted again"]
    assert lines(run, monkeypatch, None) == said
    run.clear_markers()
    run.mark(FAILED, code=1, message="loss is NaN\nat step 41", rank=1, last_lines=["Traceback", "", "  it"])
    assert lines(run, monkeypatch, None) == [
        "…/run: failed at step 40 of 100: loss is NaN; job 12",
        "  at step 41",
        "  Traceback",
        "    it",
        "  log: …/12.log",
    ]
    run.clear_markers()
    killed = JobState("12", "TIMEOUT", "None", "0:00", "N/A", 0, "")
    assert lines(run, monkeypatch, killed) == [
        "…/run: gone at step 40 of 100, without a word; job 12 is TIMEOUT",
        "  first",
        "  last",
        "  log: …/12.log",
    ]


def test_without_an_answer_of_slurm_the_directory_says_what_it_can(
    run: RunDirectory, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", "")
    silent = "SLURM does not answer: squeue: no such command; this is no machine of a SLURM cluster"
    assert status.status_lines([run.path]) == [
        silent,
        f"{run.path}: waiting, running or gone, at step 40 of 100; job 12",
    ]
    run.mark(COMPLETED, code=0, message="completed 100 steps", rank=0, last_lines=["a"])
    assert status.status_lines([run.path]) == [
        silent,
        f"{run.path}: completed 100 steps; job 12",
    ]


def test_what_slurm_has_refused_is_not_in_the_queue(run: RunDirectory, monkeypatch: pytest.MonkeyPatch) -> None:
    JobFiles(run).write(Submission(None, None, None, (1,), 8, 3, "2026-11-26"))
    said = ["…/run: not in the queue, since SLURM has not taken it; at step 40 of 100"]
    assert lines(run, monkeypatch, None) == said


def test_another_directory_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="is not the directory of a submitted run"):
        status.status_lines([tmp_path])
