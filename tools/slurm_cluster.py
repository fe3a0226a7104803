"""A real SLURM cluster of several nodes on one machine: its daemons are started, crashed and stopped."""

from __future__ import annotations

import getpass
import os
import shlex
import shutil
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

from slurm_files import LabError, Settings, read_settings, write_files

COMMANDS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "scontrol", "squeue", "sinfo", "scancel")
UP_SECONDS = 30
DOWN_SECONDS = 20

# The first process of a node's namespace takes in orphans, and hands a request to end to the daemon. Nodes count their
# processes from numbers of their own: the agents of torchrun know each other by host, which is the same, and number.
INIT = (
    'echo $((${0#node} * 3000)) > /proc/sys/kernel/ns_last_pid; slurmd -D -N "$0" & daemon=$!; '
    'trap "kill $daemon" TERM; while kill -0 $daemon 2>/dev/null; do wait $daemon; done'
)


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
        return read_settings(self.directory)

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
        write_files(self.directory, settings)
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
