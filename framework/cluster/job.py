"""What the batch script of a job asks for before and after training. Must not import torch.

python -m framework.cluster.job begin RUN
python -m framework.cluster.job end RUN --code N [--asked]
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from framework.cli import run_command
from framework.cluster import slurm
from framework.cluster.files import JobFiles, Start, Submission, last_lines
from framework.errors import RunError
from framework.training.run_directory import COMPLETED, FAILED, INTERRUPTIONS, STOPPED, RunDirectory

KEPT_LINES = 20
PORTS = range(20000, 30000)
"""Where ranks meet: below the ports that systems hand out to clients."""


@dataclass(frozen=True)
class Place:
    """Where a job is, as SLURM says in the environment of its script.

    Attributes:
        job: its number, with that of the element in an array: `12` or `12_0`. Without it, `scontrol requeue` of an
            array's last element, whose own number is the array's, would be that of all elements.
        number: its own number, also in an array.
        restarts: how often it was requeued.
        nodes: number of its machines.
        nodelist: their names, such as `node[1-2]`.
    """

    job: str
    number: int
    restarts: int
    nodes: int
    nodelist: str

    @classmethod
    def of_environment(cls, environment: Mapping[str, str] = os.environ) -> Place:
        """That of this process.

        Raises:
            RunError: it is in no job.
        """
        if "SLURM_JOB_ID" not in environment:
            raise RunError("SLURM_JOB_ID is not set: this is for batch scripts of SLURM, see launchers/submit.py")
        number = environment["SLURM_JOB_ID"]
        array = environment.get("SLURM_ARRAY_JOB_ID")
        return cls(
            job=number if array is None else f"{array}_{environment['SLURM_ARRAY_TASK_ID']}",
            number=int(number),
            restarts=int(environment.get("SLURM_RESTART_COUNT", "0")),
            nodes=int(environment["SLURM_JOB_NUM_NODES"]),
            nodelist=environment["SLURM_JOB_NODELIST"],
        )

    @property
    def port(self) -> int:
        """Where the ranks of this start of the job meet."""
        return PORTS[(self.number * 31 + self.restarts) % len(PORTS)]


def begin(directory: RunDirectory, place: Place, now: datetime) -> str | None:
    """Take note of a start, and say how its ranks are to be launched.

    Args:
        directory: of the run.
        place: of the job.
        now: the time.

    Returns:
        The number of machines to use, the address of the first and the port where ranks meet, separated by spaces; None
        if the run is complete.

    Raises:
        RunError: the job does not get on, or has fewer machines than any plan is for; the run is marked `FAILED`.
    """
    if place.restarts and directory.ending == COMPLETED:
        # The machine was lost between the end of the run and that of its job.
        print(f"{directory.path} is complete", file=sys.stderr)
        return None
    files = JobFiles(directory)
    submission = files.submission()
    if submission is None:
        raise RunError(f"{files.path}/job.json is missing; submit the run with launchers/submit.py")
    step = directory.latest_step
    starts = files.starts(place.job)
    without_progress = sum(start.step == step for start in starts)
    if without_progress > submission.max_requeues_without_progress:
        raise _given_up(directory, submission, without_progress, step)
    # How the start before ended says nothing of this one, whose ranks may not get to say so themselves.
    directory.clear_markers()
    usable = [count for count in submission.nodes if count <= place.nodes]
    if not usable:
        message = f"the job has {place.nodes} machines, and the run needs {submission.nodes[0]}"
        _mark_failed(directory, submission, message, RunError.exit_code)
        raise RunError(message)
    time, written = now.isoformat(timespec="seconds"), _written(directory.metrics)
    files.add(Start(place.job, place.restarts, time, usable[-1], step, written))
    idle = f" of {place.nodes}, since no plan is for all of them" if usable[-1] < place.nodes else ""
    since = "from the start" if step is None else f"after step {step}"
    print(f"job {place.job}, start {place.restarts + 1}: {since}, on {usable[-1]} machine(s){idle}", file=sys.stderr)
    names = slurm.hosts(place.nodelist)[: usable[-1]]
    addresses = [slurm.address(name) for name in names]
    lines = [f"{host} slots={submission.gpus_per_node}\n" for host in addresses]
    files.hostfile.write_text("".join(lines), encoding="utf-8")
    return f"{usable[-1]} {addresses[0]} {place.port}"


def _given_up(directory: RunDirectory, submission: Submission, starts: int, step: int | None) -> RunError:
    """Mark the run as failed, with the end of the log."""
    ended = "never got to a checkpoint" if step is None else f"never got beyond the checkpoint of step {step}"
    last = None if directory.ending is None else directory.read_marker(directory.ending)
    why = "" if last is None else f" The last time: {last['message']}"
    message = (
        f"given up: the job started {starts} times in a row and {ended}; that is more requeues than "
        f"cluster.max_requeues_without_progress = {submission.max_requeues_without_progress} permits.{why}"
    )
    directory.clear_markers()
    _mark_failed(directory, submission, message, RunError.exit_code)
    return RunError(message)


@dataclass(frozen=True)
class Verdict:
    """What becomes of a job whose ranks have ended.

    Attributes:
        requeue: whether it is to go on.
        code: its exit code, where it is not.
        why: for people.
    """

    requeue: bool
    code: int
    why: str


def judge(marker: str | None, record: Mapping[str, Any], *, asked: bool, began: bool, code: int) -> Verdict:
    """Decide whether a job is to go on. Launchers' exit codes say little, so the run's end marker does.

    Args:
        marker: that the run has left, if it has.
        record: what it says.
        asked: the job's script has asked the run to stop, since its time is up.
        began: the ranks have got to training.
        code: the launcher's exit code.
    """
    if marker == COMPLETED:
        return Verdict(False, 0, "completed")
    if marker == STOPPED:
        by_file = record["cause"] == "STOP" and not asked
        why = "stopped by the file STOP, as it was asked to" if by_file else f"saved: {record['message']}"
        return Verdict(not by_file, 0, why)
    if marker == FAILED:
        interrupted = record["cause"] in INTERRUPTIONS
        return Verdict(interrupted, record["code"], f"failed: {record['message']}")
    # What never began would most likely not do so the next time: a missing module, a machine out of reach.
    when = "in training" if began else "before training began"
    why = f"the ranks ended {when} without a word; the launcher's exit code is {code}"
    return Verdict(began or asked, code or RunError.exit_code, why)


def end(
    directory: RunDirectory,
    place: Place,
    *,
    asked: bool,
    code: int,
    state_of: Callable[[str], slurm.JobState | None] = lambda job: slurm.job_states([job]).get(job),
    requeue: Callable[[str], None] = slurm.requeue,
) -> int:
    """Requeue a job whose run can go on, unless it was cancelled; else its exit code.

    Args:
        directory: of the run.
        place: of the job.
        asked: see `judge`.
        code: likewise.
        state_of: gives the state of a job.
        requeue: lets a job start again.

    Raises:
        RunError: SLURM refuses to requeue it; what was saved stays.
    """
    marker = directory.ending
    record = {} if marker is None else directory.read_marker(marker) or {}
    if asked:
        directory.stop_file.unlink(missing_ok=True)
    files = JobFiles(directory)
    began = _written(directory.metrics) != files.starts(place.job)[-1].metrics_written
    verdict = judge(marker, record, asked=asked, began=began, code=code)
    if verdict.requeue:
        state = state_of(place.job)
        if state is not None and state.state in ("RUNNING", "SIGNALING"):
            print(f"{verdict.why}; requeueing the job", flush=True)
            requeue(place.job)
            return 0
        print(f"{verdict.why}; not requeued, since the job is {'gone' if state is None else state.state}", flush=True)
        return verdict.code
    print(verdict.why, flush=True)
    if marker is None:
        _mark_failed(directory, files.submission(), verdict.why, verdict.code)
    return verdict.code


def _written(path: Path) -> int | None:
    return path.stat().st_mtime_ns if path.exists() else None


def _mark_failed(directory: RunDirectory, submission: Submission | None, message: str, code: int) -> None:
    """Leave a marker in the place of ranks that could not, with the end of the job's log."""
    lines = last_lines(None if submission is None else submission.log, KEPT_LINES)
    directory.mark(FAILED, code=code, message=message, rank=0, last_lines=lines)


def main() -> int:
    """Do what the command line says."""
    options = argparse.ArgumentParser(prog="python -m framework.cluster.job", description=__doc__.splitlines()[0])
    commands = options.add_subparsers(dest="command", required=True)
    for name in ("begin", "end"):
        command = commands.add_parser(name)
        command.add_argument("run", type=Path, help="run directory")
    command.add_argument("--code", type=int, required=True, help="exit code of what launched the ranks")
    command.add_argument("--asked", action="store_true", help="the script has asked the run to stop")
    arguments = options.parse_args()
    directory, place = RunDirectory(arguments.run), Place.of_environment()
    if arguments.command == "end":
        return end(directory, place, asked=arguments.asked, code=arguments.code)
    launch = begin(directory, place, datetime.now().astimezone())
    if launch is not None:
        print(launch)
    return 0


if __name__ == "__main__":
    sys.exit(run_command(main))
