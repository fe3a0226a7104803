"""Say which settings of a run fit its machines, how fast they go, and what to change if none fits.

python launchers/plan.py --config configs/tiny.json --gpu-memory 24GiB

Without a number of accelerators (--gpus-per-node or hardware.gpus_per_node) it finds the fewest that fit.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from framework.cli import add_config_options, run_command
from framework.config import Config, load_config
from framework.errors import UserError
from framework.importing import quick_imports

if TYPE_CHECKING:
    from rich.console import Console

    from framework.planner.checks import Check
    from framework.planner.hardware import Cluster
    from framework.planner.planning import Planned, PlannedJob
    from framework.planner.profile import Profile
    from framework.planner.sizing import Size

NOTHING_FITS = 3


def parser() -> argparse.ArgumentParser:
    """The command line."""
    options = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="exit codes: 0 a plan fits, 1 failure while planning, 2 bad config or arguments, 3 no plan fits",
        allow_abbrev=False,
    )
    add_config_options(options, 'JSON config; what is "auto" in it is chosen', required=False)
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
    options.add_argument(
        "--plot", metavar="FILE|DIR", help="draw memory, a step and the choices into one file, or a file each into DIR"
    )
    options.add_argument(
        "--calibrate",
        action="store_true",
        help="measure this machine in at most two minutes, for later plans; under torchrun its links too",
    )
    return options


def configured(arguments: argparse.Namespace) -> Config:
    """The config with what the command line gives in its place."""
    if arguments.config is None:
        raise UserError("--config: missing; only --calibrate does without")
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
    if arguments.calibrate and arguments.config is None:
        return calibrate()
    config = configured(arguments)
    if arguments.calibrate:
        raise UserError("--calibrate: measures the machine and plans nothing; leave out --config")

    with quick_imports():
        from rich.console import Console

        from framework.planner.labelled import share_for_planning
        from framework.planner.planning import PlannedJob
        from framework.planner.profile import profile_for

    console = Console()

    def say(line: str) -> None:
        console.print(line, highlight=False, markup=False)

    share = share_for_planning(config, arguments.labelled_share)
    say(share.source)
    cluster = cluster_of_arguments(config, arguments)
    for note in cluster.notes:
        say(note)
    job, profile = PlannedJob(config, share.value, say), profile_for(cluster.device)
    found: list[Size] = []
    if is_sized(config, arguments):
        job, planned, found = sized(job, arguments, profile, console)
    else:
        planned = advised(job, job.plan(cluster, profile), profile, console)
    planned.report(arguments.config, arguments.overrides).print(console)
    if found:
        from framework.planner.sizing import sizes_table

        console.print()
        console.print(sizes_table(found))
    checks: list[Check] = []
    if arguments.simulate and planned.plans:
        from framework.planner.checks import checks_of, print_checks

        say("\nsimulating a step of each plan")
        checks = checks_of(planned.plans, planned.labelled_share)
        print_checks(checks, console)
    if arguments.json is not None:
        written: dict[str, Any] = planned.to_json()
        for plan, check in zip(written["plans"], checks, strict=False):
            plan["simulated_peak_bytes"] = check.simulated
        if found:
            written["sizes"] = [size.to_json() for size in found]
        arguments.json.write_text(json.dumps(written, indent=2) + "\n", encoding="utf-8")
    if arguments.plot is not None:
        from framework.planner.drawing import draw_plan

        for path in draw_plan(arguments.plot, job, planned, profile):
            say(f"drawn: {path}")
    return 0 if planned.plans else NOTHING_FITS


def is_sized(config: Config, arguments: argparse.Namespace) -> bool:
    """Whether nothing says how many accelerators there are."""
    given = config.hardware.model_fields_set
    return arguments.gpus_per_node is None and arguments.nodes is None and not given & {"gpus_per_node", "nodes"}


def cluster_of_arguments(config: Config, arguments: argparse.Namespace, **number: int) -> Cluster:
    """The machines that config and command line describe, perhaps with other numbers of them."""
    from framework.planner.hardware import cluster_of
    from framework.planner.profile import profile_for

    numbers = {"nodes": arguments.nodes, "gpus_per_node": arguments.gpus_per_node} | number
    return cluster_of(config.hardware, profile_for, gpu_memory=arguments.gpu_memory, device=arguments.device, **numbers)


def sized(
    job: PlannedJob, arguments: argparse.Namespace, profile: Profile, console: Console
) -> tuple[PlannedJob, Planned, list[Size]]:
    """The plan on the fewest accelerators, the job there, and what is chosen on other numbers of them."""
    from framework.planner.sizing import fewest, sizes

    def on(nodes: int, gpus_per_node: int) -> Cluster:
        return cluster_of_arguments(job.config, arguments, nodes=nodes, gpus_per_node=gpus_per_node)

    found = sizes(job, on, profile, lambda line: console.print(line, highlight=False, markup=False))
    best = fewest(found)
    assert best.job is not None and best.planned is not None
    return best.job, advised(best.job, best.planned, profile, console), found


def advised(job: PlannedJob, planned: Planned, profile: Profile, console: Console) -> Planned:
    """The same with the ways out, if nothing fits."""
    from framework.planner.advice import with_advice

    if not planned.plans:
        console.print("nothing fits; looking for changes with which it would")
    return with_advice(job, planned, profile, lambda line: console.print(line, highlight=False, markup=False))


def calibrate() -> int:
    """Measure this machine, print and store its profile."""
    from framework.planner import calibration
    from framework.planner.profile import figure_lines, profile_path
    from framework.sharding.place import Place
    from framework.sharding.ranks import joined_ranks

    place = Place.of_environment()
    with joined_ranks(place, timeout_seconds=round(2 * calibration.SECONDS), needed=False) as ranks:
        profile = calibration.calibrate(place.device(), ranks, calibration.SECONDS)
        if place.local_rank == 0:
            path = profile_path(profile.device)
            profile.save(path)
    if ranks.is_first:
        print("", *figure_lines(profile), f"stored: {path}", sep="\n")
    return 0


if __name__ == "__main__":
    sys.exit(run_command(main))
