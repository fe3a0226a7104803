"""Say which settings of a run fit its machines, how fast they go, and what to change if none fits.

python launchers/plan.py --config configs/tiny.json --gpu-memory 24GiB
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from framework.cli import add_config_options, run_command
from framework.config import Config, load_config
from framework.errors import UserError

if TYPE_CHECKING:
    from framework.planner.checks import Check

NOTHING_FITS = 3


def parser() -> argparse.ArgumentParser:
    """The command line."""
    options = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="exit codes: 0 a plan fits, 1 failure while planning, 2 bad config or arguments, 3 no plan fits",
        allow_abbrev=False,
    )
    add_config_options(options, 'JSON config; what is "auto" in it is chosen')
    machines = options.add_argument_group("machines, instead of the config's section hardware")
    machines.add_argument("--gpus-per-node", type=int, metavar="G", help="accelerators of each machine")
    machines.add_argument("--nodes", type=int, metavar="M", help="machines")
    kind = machines.add_mutually_exclusive_group()
    kind.add_argument("--gpu-memory", metavar="SIZE", help="of one accelerator, such as 80GiB")
    kind.add_argument("--device", metavar="NAME", help="kind of accelerator, such as H100 or A100-40GB")
    options.add_argument("--objective", choices=("balanced", "fidelity", "speed"), help="instead of planner.objective")
    options.add_argument("--top", type=int, metavar="K", help="plans that are listed, instead of planner.top")
    options.add_argument("--labelled-share", type=float, metavar="F", help="labelled tokens / all tokens of the data")
    options.add_argument(
        "--simulate", action="store_true", help="check the listed plans with simulated steps (minutes)"
    )
    options.add_argument("--json", metavar="FILE", type=Path, help="write the plans as JSON")
    return options


def configured(arguments: argparse.Namespace) -> Config:
    """The config with what the command line gives in its place."""
    overrides = list(arguments.overrides)
    for name, key in (("objective", "planner.objective"), ("top", "planner.top")):
        if (value := getattr(arguments, name)) is not None:
            overrides.append(f"{key}={json.dumps(value) if name == 'top' else value}")
    for name in ("nodes", "gpus_per_node", "top"):
        if (value := getattr(arguments, name)) is not None and value < 1:
            raise UserError(f"--{name.replace('_', '-')}: {value} is less than 1")
    return load_config(arguments.config, overrides)


def main() -> int:
    """Parse, validate, then plan and print."""
    arguments = parser().parse_args()
    config = configured(arguments)

    from rich.console import Console

    from framework.planner.hardware import cluster_of
    from framework.planner.planning import PlannedJob
    from framework.planner.profile import profile_for

    console = Console()
    share = 1.0 if arguments.labelled_share is None else arguments.labelled_share
    cluster = cluster_of(
        config.hardware,
        profile_for,
        nodes=arguments.nodes,
        gpus_per_node=arguments.gpus_per_node,
        gpu_memory=arguments.gpu_memory,
        device=arguments.device,
    )
    for note in cluster.notes:
        console.print(note, highlight=False)
    job = PlannedJob(config, share, lambda line: console.print(line, highlight=False))
    planned = job.plan(cluster, profile_for(cluster.device))
    planned.report(arguments.config, arguments.overrides).print(console)
    checks: list[Check] = []
    if arguments.simulate and planned.plans:
        from framework.planner.checks import checks_of, print_checks

        console.print("\nsimulating a step of each plan")
        checks = checks_of(planned.plans, planned.labelled_share)
        print_checks(checks, console)
    if arguments.json is not None:
        written = planned.to_json()
        for plan, check in zip(written["plans"], checks, strict=False):
            plan["simulated_peak_bytes"] = check.simulated
        arguments.json.write_text(json.dumps(written, indent=2) + "\n", encoding="utf-8")
    return 0 if planned.plans else NOTHING_FITS


if __name__ == "__main__":
    sys.exit(run_command(main))
