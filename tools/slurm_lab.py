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
import os
import shlex
import shutil
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

from slurm_cluster import Lab, missing_commands
from slurm_files import LabError, Settings

PACKAGES = ("slurmctld", "slurmd", "slurm-client", "munge")


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
