"""The files of a SLURM cluster on one machine: what it is like, and its configuration."""

from __future__ import annotations

import dataclasses
import getpass
import json
import os
import socket
import stat
from dataclasses import dataclass
from pathlib import Path

# Below the ports that jobs take, and those that the kernel hands out to clients.
PORTS = range(11000, 20000)
# Of a lab; so many jobs have numbers of their own, too.
BLOCK = 100

CONFIGURATION = """\
ClusterName=lab
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={port}
# Jobs of several labs on one machine take their ports from their numbers.
FirstJobId={port}
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/munge
CredType=cred/munge
# A requeued job waits until its credential has expired: 121 s by default.
AuthInfo=socket={directory}/munge/munge.sock,cred_expire=5
StateSaveLocation={directory}/state
SlurmdSpoolDir={directory}/spool/%n
SlurmctldPidFile={directory}/run/slurmctld.pid
SlurmdPidFile={directory}/run/slurmd.%n.pid
SlurmctldLogFile={directory}/log/slurmctld.log
SlurmdLogFile={directory}/log/slurmd.%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
# Nodes are as large as this file says.
SlurmdParameters=config_overrides
SchedulerType=sched/backfill
SchedulerParameters=sched_interval=2,bf_interval=2,sched_min_interval=100000
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
{user_signal}MpiDefault=none
SwitchType=switch/none
# A crashed node comes back by itself when it is up again.
ReturnToService=2
JobRequeue=1
KillWait=5
UnkillableStepTimeout=30
SlurmdTimeout={slurmd_timeout}
InactiveLimit=0
MinJobAge=600
TreeWidth=50
MailProg=/bin/true
GresTypes=gpu
"""

PARTITION = "PartitionName={name} Nodes=ALL Default={default} PriorityTier={tier} GraceTime={grace} MaxTime=INFINITE\n"


class LabError(RuntimeError):
    """The cluster could not be set up; the message says what to look at."""


@dataclass(frozen=True)
class Settings:
    """What a lab is like.

    Attributes:
        nodes: number of nodes, named `node1`, `node2`, …
        cpus: processors of each, as jobs see them.
        gpus: accelerators of each, which are only counted: jobs may ask for them.
        grace_seconds: time that a preempted job has from its signal to its end.
        user_signal: whether a preempted job gets the signal of its `--signal` in place of SIGTERM to its tasks.
        slurmd_timeout: seconds after which a silent node counts as crashed.
    """

    nodes: int = 2
    cpus: int = 4
    gpus: int = 0
    grace_seconds: int = 60
    user_signal: bool = False
    slurmd_timeout: int = 10


def write_files(directory: Path, settings: Settings) -> None:
    """Write what the daemons of a cluster read, and make the directories that they write to.

    Args:
        directory: of the cluster.
        settings: what it is like; `read_settings` reads them again.

    Raises:
        LabError: the directory will not do, or there are no free ports.
    """
    for name in ("etc", "log", "run", "state", "spool", "munge"):
        (directory / name).mkdir(parents=True, exist_ok=True)
        (directory / name).chmod(0o755)
    directory.chmod(0o755)
    for parent in directory.parents:
        if not parent.stat().st_mode & stat.S_IXOTH:
            raise LabError(f"{parent}: only its owner may enter, which munge refuses; choose another --directory")
    etc = directory / "etc"
    key = etc / "munge.key"
    if not key.exists():
        key.touch(0o600)
        key.write_bytes(os.urandom(1024))
    (etc / "slurm.conf").write_text(_configuration(directory, settings), encoding="utf-8")
    # In the place of device files; SLURM asks no more of them than to be there.
    devices = [etc / f"gpu{number}" for number in range(settings.gpus)]
    for device in devices:
        device.touch()
    (etc / "gres.conf").write_text("".join(f"Name=gpu File={device}\n" for device in devices))
    (directory / "lab.json").write_text(json.dumps(dataclasses.asdict(settings)) + "\n")


def read_settings(directory: Path) -> Settings:
    """What a cluster was made like."""
    return Settings(**json.loads((directory / "lab.json").read_text(encoding="utf-8")))


def _configuration(directory: Path, settings: Settings) -> str:
    """All of `slurm.conf`."""
    host, ports = socket.gethostname().partition(".")[0], iter(free_ports())
    written = CONFIGURATION.format(
        host=host,
        port=next(ports),
        user=getpass.getuser(),
        directory=directory,
        user_signal="SlurmctldParameters=preempt_send_user_signal\n" if settings.user_signal else "",
        slurmd_timeout=settings.slurmd_timeout,
    )
    gpus = f" Gres=gpu:{settings.gpus}" if settings.gpus else ""
    for number in range(1, settings.nodes + 1):
        address = f"NodeHostname={host} NodeAddr=127.0.0.{number} Port={next(ports)}"
        written += f"NodeName=node{number} {address} CPUs={settings.cpus} RealMemory=4000{gpus} State=UNKNOWN\n"
    written += PARTITION.format(name="batch", default="YES", tier=1, grace=settings.grace_seconds)
    return written + PARTITION.format(name="urgent", default="NO", tier=10, grace=0)


def free_ports() -> range:
    """A block of ports of which none is in use; processes that look at the same time begin with different blocks."""
    blocks = [PORTS[first : first + BLOCK] for first in range(0, len(PORTS), BLOCK)]
    first = os.getpid() % len(blocks)
    for block in (*blocks[first:], *blocks[:first]):
        if all(map(_is_free, block)):
            return block
    raise LabError("no free ports")


def _is_free(port: int) -> bool:
    with socket.socket() as tried:
        try:
            tried.bind(("127.0.0.1", port))
        except OSError:
            return False
    return True
