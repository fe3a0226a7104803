"""Submit runs to SLURM, or say where submitted ones are.

python launchers/submit.py --config configs/llama13b.json --nodes 4 --time 1-00:00:00
python launchers/submit.py --configs a.json b.json --nodes 1
python launchers/submit.py --status runs/llama13b

A run is planned for its machines first, and not submitted if it cannot fit. Its job saves before its time limit and on
preemption, requeues itself, and goes on.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from framework.cli import run_command
from framework.cluster import slurm
from framework.config import Config, load_config
from framework.errors import UserError

if TYPE_CHECKING:
    from framework.sharding.deepspeed_config import OwnOptions

NODES = re.compile(r"([1-9][0-9]*)(?:-([1-9][0-9]*))?")


def parser() -> argparse.ArgumentParser:
    """The command line."""
    options = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="exit codes: 0 done, 1 SLURM refuses, 2 bad config or arguments, 3 no plan fits; nothing is submitted "
        "then",
        allow_abbrev=False,
    )
    what = options.add_mutually_exclusive_group(required=True)
    what.add_argument("--config", metavar="FILE", help="JSON config of a run")
    what.add_argument("--configs", nargs="+", metavar="FILE", help="configs of several, which become a job array")
    what.add_argument("--status", nargs="+", metavar="RUN", type=Path, help="say where runs are, by their directories")
    options.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", dest="overrides", help="override a key of the config"
    )
    options.add_argument("--dry-run", action="store_true", help="plan, and print the batch script; touch nothing")
    machines = options.add_argument_group("machines, instead of the config's section hardware")
    machines.add_argument(
        "--nodes", metavar="N|MIN-MAX", type=_nodes, help="machines; with MIN it starts on fewer, too"
    )
    machines.add_argument("--gpus-per-node", type=int, metavar="G", help="accelerators of each machine")
    kind = machines.add_mutually_exclusive_group()
    kind.add_argument("--gpu-memory", metavar="SIZE", help="of one accelerator, such as 80GiB")
    kind.add_argument("--device", metavar="NAME", help="kind of accelerator, such as H100; cpu for machines without")
    job = options.add_argument_group("job, instead of the config's section cluster")
    job.add_argument("--time", metavar="D-HH:MM:SS", help="time limit; a run that needs longer goes on after it")
    job.add_argument("--partition", metavar="P", help="partition")
    job.add_argument("--account", metavar="A", help="account")
    job.add_argument(
        "--sbatch",
        action="append",
        default=[],
        metavar="KEY[=VALUE]",
        help="any other option of sbatch, by its long name",
    )
    job.add_argument("--at-once", type=int, metavar="N", help="so many runs of --configs at a time")
    job.add_argument("--deepspeed_config", "--deepspeed-config", metavar="FILE", help="as for launchers/train.py")
    options.add_argument("--labelled-share", type=float, metavar="F", help="labelled tokens / all tokens of the data")
    return options


def _nodes(argument: str) -> tuple[int, int]:
    found = NODES.fullmatch(argument)
    least, most = (int(found[1]), int(found[2] or found[1])) if found else (0, 0)
    if found is None or least > most:
        raise argparse.ArgumentTypeError(f"{argument!r} is no number of machines and no range such as 2-4")
    return least, most


def overrides_of(arguments: argparse.Namespace) -> list[str]:
    """What the options change in a config, as `--set` takes it."""
    values: dict[str, object] = {
        "hardware.gpus_per_node": arguments.gpus_per_node,
        "hardware.gpu_memory": arguments.gpu_memory,
        "cluster.time": arguments.time,
        "cluster.partition": arguments.partition,
        "cluster.account": arguments.account,
    }
    if arguments.nodes is not None:
        least, most = arguments.nodes
        values |= {"hardware.nodes": most, "cluster.min_nodes": least if least < most else None}
    for option in arguments.sbatch:
        name, given, value = option.partition("=")
        values[f"cluster.sbatch.{name}"] = value if given else True
    kept = {key: value for key, value in values.items() if value is not None or key == "cluster.min_nodes"}
    return [*arguments.overrides, *(f"{key}={json.dumps(value)}" for key, value in kept.items())]


def main() -> int:
    """Parse, then say where runs are, or plan and submit."""
    options = parser()
    arguments = options.parse_args()
    if arguments.status is not None:
        return status(arguments.status)
    paths = arguments.configs or [arguments.config]
    if arguments.at_once is not None and (arguments.at_once < 1 or len(paths) == 1):
        raise UserError("--at-once: a number of runs of --configs, at least 1")
    overrides = overrides_of(arguments)
    configs = [(path, load_config(path, overrides)) for path in paths]

    from framework.cluster.submission import check_free, check_together

    check_together(configs)
    if not arguments.dry_run:
        slurm.check_installed()
        check_free([Path(os.path.abspath(config.run.output_dir)) for _, config in configs])
    return plan_and_submit(configs, arguments)


def status(runs: list[Path]) -> int:
    """Print where runs are."""
    from framework.cluster.status import status_lines

    print("\n".join(status_lines(runs)))
    return 0


def plan_and_submit(configs: list[tuple[str, Config]], arguments: argparse.Namespace) -> int:
    """Plan every run, then submit them all, or print their script."""
    from rich.console import Console

    from framework.cluster.feasibility import feasible_nodes
    from framework.cluster.script import Command
    from framework.cluster.submission import Job, submit

    # What a dry run prints can be kept as a file.
    console = Console(stderr=arguments.dry_run)

    def say(line: str) -> None:
        console.print(line, highlight=False, markup=False)

    own = own_options(arguments.deepspeed_config, configs)
    nodes = []
    for path, config in configs:
        if len(configs) > 1:
            say(f"\n{path}")
        found = feasible_nodes(
            config,
            device=arguments.device,
            labelled_share=arguments.labelled_share,
            own=own,
            say=say,
            show=lambda report: report.print(console),
        )
        nodes.append(found)
    further = ()
    if arguments.deepspeed_config is not None:
        further = ("--deepspeed_config", os.path.abspath(arguments.deepspeed_config))
    job = Job(
        configs=tuple(config for _, config in configs),
        nodes=tuple(nodes),
        command=Command(Path(sys.executable), Path(__file__).resolve().with_name("train.py"), Path.cwd(), further),
        at_once=arguments.at_once,
    )
    if arguments.dry_run:
        print(job.script(), end="")
        return 0
    for run, record in zip(job.runs, submit(job), strict=True):
        print(f"submitted {run} as job {record.job}; log: {record.log}")
    return 0


def own_options(path: str | None, configs: list[tuple[str, Config]]) -> OwnOptions | None:
    """A user's own options of DeepSpeed."""
    if path is None:
        return None
    for name, config in configs:
        if config.sharding.engine != "deepspeed":
            raise UserError(f"--deepspeed_config: sharding.engine in {name} is {config.sharding.engine!r}")

    from framework.sharding.deepspeed_config import read_own_options

    return read_own_options(Path(path))


if __name__ == "__main__":
    sys.exit(run_command(main))
