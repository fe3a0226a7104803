"""The options of `sbatch` in a batch script."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from framework.config import Config
from framework.errors import UserError

Options = dict[str, str | None]
"""Options of `sbatch` by their long names; None stands for one without a value."""


def options_of(config: Config, directory: Path, *, name: str, array: str | None = None) -> Options:
    """What `sbatch` is told.

    Args:
        config: of the run, or of one of an array.
        directory: where the job's output goes.
        name: of the job, unless the config has one.
        array: what `--array` takes, for an array.

    Raises:
        UserError: the directory's name is none that SLURM can be told.
    """
    hardware, cluster = config.hardware, config.cluster
    least = config.least_nodes
    options: Options = {"job-name": name}
    if least == hardware.nodes:
        # A process each, which starts the ranks of its machine.
        options |= {"nodes": str(least), "ntasks-per-node": "1"}
    else:
        # With tasks per node SLURM never gives more than the least, since that is enough for the tasks there are then.
        options["nodes"] = f"{least}-{hardware.nodes}"
    if array is not None:
        options["array"] = array
    kind = "" if cluster.gpu_type is None else f"{cluster.gpu_type}:"
    if cluster.gpu_option == "gpus-per-node":
        options["gpus-per-node"] = f"{kind}{hardware.gpus_per_node}"
    elif cluster.gpu_option == "gres":
        options["gres"] = f"gpu:{kind}{hardware.gpus_per_node}"
    given = {
        "cpus-per-task": cluster.cpus_per_node,
        "time": cluster.time,
        "partition": cluster.partition,
        "account": cluster.account,
        "qos": cluster.qos,
    }
    options |= {option: str(value) for option, value in given.items() if value is not None}
    options |= {
        "requeue": None,
        "open-mode": "append",
        "signal": f"B:USR2@{cluster.stop_seconds}",
        "output": _output(directory, array is not None),
    }
    return options | {option: None if value is True else str(value) for option, value in cluster.sbatch.items()}


def log_name(job: str) -> str:
    """Name of the file with the output of a job, or of an element of an array such as `12_0`."""
    return f"{job}.log"


def _output(directory: Path, is_array: bool) -> str:
    """The file of `log_name` as a pattern that SLURM fills in, where a backslash turns that off."""
    if "\\" in str(directory):
        raise UserError(f"run.output_dir: SLURM cannot write to {directory}, because of the backslash in it")
    return f"{str(directory).replace('%', '%%')}/{log_name('%A_%a' if is_array else '%j')}"


def directive_lines(options: Mapping[str, str | None]) -> list[str]:
    """The `#SBATCH` lines of a script.

    Raises:
        UserError: a value has a character that would end its line, or another one that is not printable.
    """
    lines = []
    for option, value in options.items():
        if value is not None and not value.isprintable():
            raise UserError(f"--{option}: {value!r} has a character that no #SBATCH line can hold")
        lines.append(f"#SBATCH --{option}" if value is None else f"#SBATCH --{option}={_quoted(value)}")
    return lines


def _quoted(value: str) -> str:
    """A value as `sbatch` reads it from a script: in double quotes, a backslash lets the next one be as it is."""
    if value and all(character.isalnum() or character in "-_.,:/@%+=" for character in value):
        return value
    escaped = value.replace("\\", "\\\\").replace('"', '\\"')
    return f'"{escaped}"'
