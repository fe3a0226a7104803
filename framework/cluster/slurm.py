"""The commands of SLURM that are used. Must not import torch."""

from __future__ import annotations

import re
import shlex
import shutil
import subprocess
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from framework.errors import RunError, UserError

WAITING = frozenset({"PENDING", "REQUEUED", "REQUEUE_HOLD", "REQUEUE_FED", "SPECIAL_EXIT", "RESV_DEL_HOLD"})
RUNNING = frozenset(
    {"RUNNING", "COMPLETING", "CONFIGURING", "SUSPENDED", "STOPPED", "SIGNALING", "STAGE_OUT", "RESIZING"}
)
"""States of jobs in the queue; in all others a job has ended. See "JOB STATE CODES" of `man squeue`."""

_FIELDS = ("JobArrayID", "State", "Reason", "TimeLeft", "StartTime", "RestartCnt", "NodeList")


@dataclass(frozen=True)
class JobState:
    """What SLURM says of a job.

    Attributes:
        job: `12`, or `12_0` for an element of an array.
        state: such as `RUNNING`.
        reason: why it is in this state, such as `Priority`; `None` where there is none.
        time_left: until its time limit, as `[DAYS-]HH:MM:SS` or `UNLIMITED`.
        start: when it has started, or will at the latest; `N/A` if that is not known.
        restarts: how often it was requeued.
        nodes: names of its machines, such as `node[1-2]`; empty before it has some.
    """

    job: str
    state: str
    reason: str
    time_left: str
    start: str
    restarts: int
    nodes: str

    @property
    def is_in_queue(self) -> bool:
        """Whether it waits or runs."""
        return self.state in WAITING | RUNNING


def check_installed() -> None:
    """Refuse to go on without SLURM's commands.

    Raises:
        UserError: they are not there.
    """
    if shutil.which("sbatch") is None:
        raise UserError(
            "sbatch: no such command; submit on a machine of the cluster, or see the batch script with --dry-run"
        )


def sbatch(script: Path) -> str:
    """Submit a batch script; its job's number.

    Raises:
        RunError: SLURM refuses it.
    """
    # Of several clusters, the one that took it is named after a semicolon.
    return _call("sbatch", "--parsable", str(script)).strip().partition(";")[0]


def job_states(jobs: Iterable[str]) -> dict[str, JobState]:
    """The states of those jobs that SLURM still knows, by number.

    Raises:
        RunError: it does not answer.
    """
    wanted = ",".join(jobs)
    if not wanted:
        return {}
    layout = ",".join(f"{field}:|" for field in _FIELDS)
    try:
        printed = _call("squeue", "--noheader", "--array", "--states=all", f"--jobs={wanted}", f"--Format={layout}")
    except RunError as error:
        if "Invalid job id" in str(error):
            return {}
        raise
    found = {}
    for line in printed.splitlines():
        job, state, reason, time_left, start, restarts, nodes = line.strip().split("|")[: len(_FIELDS)]
        found[job] = JobState(job, state, reason, time_left, start, int(restarts), nodes)
    return found


def requeue(job: str) -> None:
    """Let a running job start again; what called this is ended soon after.

    Raises:
        RunError: SLURM refuses to.
    """
    _call("scontrol", "requeue", job)


def hosts(nodes: str) -> list[str]:
    """The names of machines, from a list such as `node[1-2]`."""
    return _call("scontrol", "show", "hostnames", nodes).split()


def address(node: str) -> str:
    """What a machine is reached by: SLURM's names need not be known to the network."""
    found = re.search(r"\bNodeAddr=(\S+)", _call("scontrol", "show", "node", node))
    return found[1] if found else node


def _call(*command: str) -> str:
    try:
        done = subprocess.run(command, capture_output=True, text=True)
    except FileNotFoundError as error:
        raise RunError(f"{command[0]}: no such command; this is no machine of a SLURM cluster") from error
    if done.returncode:
        raise RunError(f"{shlex.join(command)}: {(done.stderr or done.stdout).strip()}")
    return done.stdout
