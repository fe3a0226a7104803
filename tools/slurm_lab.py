"""A real SLURM cluster of several nodes on one machine, for tests and for trying submissions.

python tools/slurm_lab.py install                            # Debian and Ubuntu, as root
python tools/slurm_lab.py up --directory /tmp/lab --nodes 3  # prints what to put into the environment
python tools/slurm_lab.py crash node2 --directory /tmp/lab   # a power cut; `boot node2` brings it back
python tools/slurm_lab.py down --directory /tmp/lab

It needs neither systemd nor control groups, and root only to install and to crash nodes. Everything is in the lab's
directory. The partition `urgent` preempts the default one, `batch`, whose jobs are requeued after a grace time.
"""

from __future__ import annotations

import argparse
import dataclasses
import getpass
import json
import os
import random
import shlex
import shutil
import signal
import socket
import stat
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

PACKAGES = ("slurmctld", "slurmd", "slurm-client", "munge")
COMMANDS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "scontrol", "squeue", "sinfo", "scancel")
# Below the ports that jobs take, and those that the kernel hands out to clients.
PORTS = range(11000, 20000)
UP_SECONDS = 30
DOWN_SECONDS = 20

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

# The first process of a node's namespace takes in orphans, and hands a request to end to the daemon. Nodes count their
# processes from numbers of their own: the agents of torchrun know each other by host, which is the same, and number.
INIT = (
    'echo $((${0#node} * 3000)) > /proc/sys/kernel/ns_last_pid; slurmd -D -N "$0" & daemon=$!; '
    'trap "kill $daemon" TERM; while kill -0 $daemon 2>/dev/null; do wait $daemon; done'
)


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


def search_path() -> str:
    """Where commands are, daemons too, which are outside of an ordinary user's path."""
    path = os.environ["PATH"].split(":")
    return ":".join([*path, *(directory for directory in ("/usr/sbin", "/sbin") if directory not in path)])


def missing_commands() -> list[str]:
    """What a lab needs and this machine lacks."""
    return [name for name in COMMANDS if shutil.which(name, path=search_path()) is None]


def can_crash() -> bool:
    """Whether nodes can be given process namespaces of their own, whose end is a crash."""
    command = ["unshare", "--pid", "--fork", "--mount-proc", "true"]
    return shutil.which("unshare") is not None and subprocess.run(command, capture_output=True).returncode == 0


def install() -> None:
    """Install SLURM and munge from the distribution.

    Raises:
        LabError: this is not possible here, or fails.
    """
    if not missing_commands():
        return
    packages = " ".join(PACKAGES)
    if shutil.which("apt-get") is None:
        raise LabError(f"this machine has no apt-get; install SLURM and munge ({packages} on Debian)")
    if os.geteuid() != 0:
        raise LabError(f"only root can install: sudo apt-get install --no-install-recommends {packages}")
    print(f"installing {packages}", flush=True)
    environment = os.environ | {"DEBIAN_FRONTEND": "noninteractive"}
    for arguments in (["update"], ["install", "-y", "--no-install-recommends", *PACKAGES]):
        command = ["apt-get", "-q", *arguments]
        done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        if done.returncode:
            raise LabError(f"{shlex.join(command)} failed:\n{done.stdout[-2000:]}")


class Lab:
    """A cluster under one directory.

    Attributes:
        directory: of the lab. It must be one that every user may enter: munge refuses others.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory.absolute()

    @property
    def settings(self) -> Settings:
        """What it was made like."""
        return Settings(**json.loads((self.directory / "lab.json").read_text(encoding="utf-8")))

    @property
    def environment(self) -> dict[str, str]:
        """What a process needs in its environment to use this cluster."""
        return {"SLURM_CONF": str(self.directory / "etc" / "slurm.conf"), "PATH": search_path()}

    def call(self, *command: str, check: bool = True, **variables: str) -> str:
        """Run a command of SLURM's in this cluster and return what it prints.

        Raises:
            LabError: it failed, and `check` is on.
        """
        environment = os.environ | self.environment | variables
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60)
        if check and done.returncode:
            raise LabError(f"{shlex.join(command)} failed: {done.stderr.strip() or done.stdout.strip()}")
        return done.stdout

    def up(self, settings: Settings) -> None:
        """Write the configuration and start every daemon; the nodes are idle afterwards.

        Raises:
            LabError: something is missing, or a daemon does not come up.
        """
        if missing := missing_commands():
            raise LabError(f"missing: {', '.join(missing)}; python tools/slurm_lab.py install")
        if self._daemon("munged"):
            raise LabError(f"{self.directory}: a lab is up there already")
        self._configure(settings)
        files = {
            "key-file": "etc/munge.key",
            "pid-file": "run/munged.pid",
            "log-file": "log/munged.log",
            "socket": "munge/munge.sock",
            "seed-file": "munge/munged.seed",
        }
        try:
            self.call("munged", *(f"--{option}={self.directory / name}" for option, name in files.items()))
            self.call("slurmctld")
            for number in range(1, settings.nodes + 1):
                self.boot(f"node{number}")
            self.wait_until_idle()
        except LabError:
            self.down()
            raise

    def wait_until_idle(self) -> None:
        """Wait until every node is up and has nothing to do.

        Raises:
            LabError: they are not after half a minute.
        """
        if not _wait(lambda: self.states() == ["idle"] * self.settings.nodes, UP_SECONDS):
            problem = self.call("sinfo", "--Node", "--long", check=False) + self.call("sinfo", "-R", check=False)
            raise LabError(f"not all nodes are up and idle; see {self.directory}/log:\n{problem}")

    def states(self) -> list[str]:
        """The state of each node, in SLURM's words."""
        listed = self.call("sinfo", "--noheader", "--Node", "--partition=batch", "--format=%N %T", check=False)
        return [state for _, state in sorted(line.split() for line in listed.splitlines())]

    def boot(self, node: str) -> None:
        """Start a node: in a process namespace of its own where that is possible."""
        (self.directory / "spool" / node).mkdir(exist_ok=True)
        if not can_crash():
            self.call("slurmd", "-N", node)
            return
        command = ["unshare", "--pid", "--fork", "--kill-child", "--mount-proc", "bash", "-c", INIT, node]
        with (self.directory / "log" / f"{node}.log").open("a") as log:
            namespace = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env=os.environ | self.environment,
                start_new_session=True,
            )
        self._namespace_file(node).write_text(f"{namespace.pid}\n")

    def crash(self, node: str) -> None:
        """Cut a node's power: its daemon and all that runs there is gone at once.

        Raises:
            LabError: the node has no process namespace of its own, or is not up.
        """
        file = self._namespace_file(node)
        if not file.exists():
            raise LabError(f"{node} is not up, or has no process namespace, which only root can give it")
        os.kill(int(file.read_text()), signal.SIGKILL)
        self._forget(node)

    def down(self) -> None:
        """Cancel all jobs and stop every daemon. What is not up is no error."""
        self.call("scancel", "--user", getpass.getuser(), check=False)
        _wait(lambda: not self.call("squeue", "--noheader", check=False), DOWN_SECONDS)
        for file in sorted((self.directory / "run").glob("*.namespace")):
            self._shut_down(file.stem)
        for file in sorted((self.directory / "run").glob("slurmd.*.pid")):
            _end(self._daemon(file.stem))
        for name in ("slurmctld", "munged"):
            _end(self._daemon(name))

    def _configure(self, settings: Settings) -> None:
        for name in ("etc", "log", "run", "state", "spool", "munge"):
            (self.directory / name).mkdir(parents=True, exist_ok=True)
            (self.directory / name).chmod(0o755)
        self.directory.chmod(0o755)
        for parent in self.directory.parents:
            if not parent.stat().st_mode & stat.S_IXOTH:
                raise LabError(f"{parent}: only its owner may enter, which munge refuses; choose another --directory")
        key = self.directory / "etc" / "munge.key"
        if not key.exists():
            key.touch(0o600)
            key.write_bytes(os.urandom(1024))
        host, ports = socket.gethostname().partition(".")[0], iter(_free_ports(settings.nodes + 1))
        written = CONFIGURATION.format(
            host=host,
            port=next(ports),
            user=getpass.getuser(),
            directory=self.directory,
            user_signal="SlurmctldParameters=preempt_send_user_signal\n" if settings.user_signal else "",
            slurmd_timeout=settings.slurmd_timeout,
        )
        gpus = f" Gres=gpu:{settings.gpus}" if settings.gpus else ""
        for number in range(1, settings.nodes + 1):
            address = f"NodeHostname={host} NodeAddr=127.0.0.{number} Port={next(ports)}"
            written += f"NodeName=node{number} {address} CPUs={settings.cpus} RealMemory=4000{gpus} State=UNKNOWN\n"
        written += PARTITION.format(name="batch", default="YES", tier=1, grace=settings.grace_seconds)
        written += PARTITION.format(name="urgent", default="NO", tier=10, grace=0)
        etc = self.directory / "etc"
        (etc / "slurm.conf").write_text(written, encoding="utf-8")
        # In the place of device files; SLURM asks no more of them than to be there.
        devices = [etc / f"gpu{number}" for number in range(settings.gpus)]
        for device in devices:
            device.touch()
        (etc / "gres.conf").write_text("".join(f"Name=gpu File={device}\n" for device in devices))
        (self.directory / "lab.json").write_text(json.dumps(dataclasses.asdict(settings)) + "\n")

    def _pid_file(self, daemon: str) -> Path:
        return self.directory / "run" / f"{daemon}.pid"

    def _namespace_file(self, node: str) -> Path:
        return self.directory / "run" / f"{node}.namespace"

    def _daemon(self, name: str) -> int | None:
        """Number of a daemon's process; None if it is not up. A number may have gone to another process since."""
        file = self._pid_file(name)
        if not file.exists():
            return None
        process = int(file.read_text())
        try:
            command = Path(f"/proc/{process}/comm").read_text().strip()
        except OSError:
            return None
        return process if command == name.partition(".")[0] else None

    def _shut_down(self, node: str) -> None:
        """End a node that has a namespace, whose daemon's pid file has the number that it has inside."""
        outside = int(self._namespace_file(node).read_text())
        children = Path(f"/proc/{outside}/task/{outside}/children")
        for child in children.read_text().split() if children.exists() else ():
            _end(int(child))
        _end(outside)
        self._forget(node)

    def _forget(self, node: str) -> None:
        self._namespace_file(node).unlink(missing_ok=True)
        self._pid_file(f"slurmd.{node}").unlink(missing_ok=True)


def _end(process: int | None) -> None:
    """Ask a process to end, and end it."""
    if process is None or not _is_alive(process):
        return
    os.kill(process, signal.SIGTERM)
    if not _wait(lambda: not _is_alive(process), DOWN_SECONDS):
        os.kill(process, signal.SIGKILL)


def _is_alive(process: int) -> bool:
    """Whether a process runs; one that has ended and was not waited for does not."""
    try:
        status = Path(f"/proc/{process}/status").read_text()
    except OSError:
        return False
    return "\nState:\tZ" not in status


def _wait(condition: Callable[[], bool], seconds: float) -> bool:
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.1)
    return True


def _free_ports(count: int) -> list[int]:
    found: list[int] = []
    for port in random.sample(PORTS, len(PORTS)):
        with socket.socket() as tried:
            try:
                tried.bind(("127.0.0.1", port))
            except OSError:
                continue
        found.append(port)
        if len(found) == count:
            return found
    raise LabError("no free ports")


def export_lines(variables: Mapping[str, str]) -> str:
    """For a shell to evaluate."""
    return "\n".join(f"export {name}={shlex.quote(value)}" for name, value in variables.items())


def parser() -> argparse.ArgumentParser:
    """The command line."""
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = options.add_subparsers(dest="command", required=True)
    installing = commands.add_parser("install", help="install SLURM and munge from the distribution")
    installing.add_argument("--if-possible", action="store_true", help="where it is not, say so and exit 0")
    of_directory = argparse.ArgumentParser(add_help=False)
    of_directory.add_argument("--directory", type=Path, required=True, metavar="DIR", help="of the lab")
    up = commands.add_parser("up", parents=[of_directory], help="start a cluster; prints its environment")
    for field in dataclasses.fields(Settings):
        name = f"--{field.name.replace('_', '-')}"
        if field.type == "bool":
            up.add_argument(name, action="store_true")
        else:
            up.add_argument(name, type=int, default=field.default, metavar="N", help=f"default {field.default}")
    commands.add_parser("down", parents=[of_directory], help="cancel all jobs and stop it")
    commands.add_parser("status", parents=[of_directory], help="nodes and jobs")
    for name, about in (("crash", "cut a node's power"), ("boot", "start a node that crashed")):
        commands.add_parser(name, parents=[of_directory], help=about).add_argument("node")
    return options


def main() -> int:
    """Do what the command line says."""
    arguments = parser().parse_args()
    try:
        run(arguments)
    except LabError as error:
        if arguments.command == "install" and arguments.if_possible:
            print(f"SLURM is not installed: {error}")
            return 0
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


def run(arguments: argparse.Namespace) -> None:
    """Do what parsed arguments say."""
    if arguments.command == "install":
        install()
        return
    lab = Lab(arguments.directory)
    if arguments.command == "up":
        lab.up(Settings(**{field.name: getattr(arguments, field.name) for field in dataclasses.fields(Settings)}))
        print(export_lines(lab.environment))
    elif arguments.command == "down":
        lab.down()
    elif arguments.command == "status":
        print(lab.call("sinfo", "--Node", "--long"), lab.call("squeue"), sep="\n")
    else:
        getattr(lab, arguments.command)(arguments.node)


if __name__ == "__main__":
    sys.exit(main())
