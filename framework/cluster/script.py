"""The batch script of a job, from the template `job.sh.j2`."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from jinja2 import Environment, PackageLoader, StrictUndefined

from framework.cluster.directives import directive_lines
from framework.config import Config


@dataclass(frozen=True)
class Command:
    """How training is started on the machines of the cluster.

    Attributes:
        python: the interpreter.
        train: path of `launchers/train.py`.
        directory: that paths in a config are relative to.
        arguments: further ones for `train`.
    """

    python: Path
    train: Path
    directory: Path
    arguments: tuple[str, ...] = ()


def batch_script(config: Config, runs: Sequence[Path], options: Mapping[str, str | None], command: Command) -> str:
    """The text of a batch script.

    Args:
        config: of a run; those of an array agree in what the script is made from.
        runs: absolute paths of the run directories, by their number in the array.
        options: of `sbatch`, from `options_of`.
        command: that trains.

    Raises:
        UserError: as for `directive_lines`.
    """
    templates = Environment(
        loader=PackageLoader("framework.cluster", "."),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        autoescape=False,
    )
    templates.filters["quote"] = lambda value: shlex.quote(str(value))
    return templates.get_template("job.sh.j2").render(
        directives=directive_lines(options),
        title=_title(config, len(runs)),
        setup=config.cluster.setup,
        launcher=config.cluster.launcher,
        ranks_per_node=config.hardware.gpus_per_node,
        stop_seconds=config.cluster.stop_seconds,
        can_wait=config.cluster.launcher == "torchrun" and _can_wait(),
        runs=runs,
        python=command.python,
        train=command.train,
        directory=command.directory,
        arguments="".join(f" {shlex.quote(argument)}" for argument in command.arguments),
    )


def _can_wait() -> bool:
    """Whether `torchrun` can give ranks another time to end after SIGTERM than half a minute; torch 2.11's cannot."""
    from torch.distributed.run import get_args_parser

    return "--shutdown-timeout" in get_args_parser().format_help()


def _title(config: Config, runs: int) -> str:
    hardware, least = config.hardware, config.least_nodes
    machines = f"{hardware.nodes}" if least == hardware.nodes else f"{least} to {hardware.nodes}"
    jobs = "Trains" if runs == 1 else f"Trains {runs} configs, each"
    return f"{jobs} on {machines} machines with {hardware.gpus_per_node} ranks each"
