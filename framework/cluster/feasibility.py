"""Whether a run fits the machines that are asked of SLURM, by the planner."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from framework.config import Config
from framework.errors import NoPlanError, UserError
from framework.planner.hardware import cluster_of
from framework.planner.labelled import share_for_planning
from framework.planner.planning import Planned, PlannedJob
from framework.planner.profile import profile_for
from framework.planner.report import Report, gib, words
from framework.sharding.deepspeed_config import OwnOptions
from framework.sharding.place import check_ranks


def feasible_nodes(
    config: Config,
    *,
    device: str | None,
    labelled_share: float | None,
    own: OwnOptions | None,
    say: Callable[[str], None],
    show: Callable[[Report], None],
) -> tuple[int, ...]:
    """Plan a run for each number of machines that it may get; on which of them it can go on, rising.

    A run without open keys that the planner does not know is taken to fit.

    Args:
        config: of the run, with what the command line says.
        device: kind of accelerator, as for `find_device`; None for what `hardware` describes.
        labelled_share: labelled tokens / all tokens; None to find out.
        own: a user's own options of DeepSpeed.
        say: is told what is found, a line each.
        show: gets the report for the most machines, and for the least where that does not fit.

    Raises:
        NoPlanError: it does not fit on the least number of machines.
        UserError: it cannot be split over them, or accelerators are not described, or something is open that the
            planner cannot choose.
        RunError: laws cannot be recorded.
    """
    if device is None and config.hardware.gpu_memory is None:
        raise UserError(
            "hardware.gpu_memory: say how much an accelerator of the cluster has, as with --gpu-memory 80GiB, or which "
            "it is, as with --device H100; --device cpu for machines without"
        )
    counts = _counts(config, say)
    try:
        share = share_for_planning(config, labelled_share)
        say(share.source)
        job = PlannedJob(config, share.value, say, own=own)
        found = {nodes: _planned(job, nodes, device) for nodes in counts}
    except UserError as error:
        if config.open_keys:
            raise
        say(f"not planned, so whether it fits is not known: {error}")
        return counts
    least = found[counts[0]]
    if least.smallest is not None:
        show(least.report(""))
        raise NoPlanError(
            f"nothing fits on {_machines(counts[0])}: the smallest plan takes "
            f"{gib(least.budget.demand(least.smallest))} of an accelerator, which has {gib(least.budget.bytes)} for "
            "it; launchers/plan.py says what to change"
        )
    fitting = tuple(nodes for nodes in counts if found[nodes].plans)
    show(replace(found[fitting[-1]].report(""), launch=None))
    for nodes in counts[:-1] if fitting[-1] == counts[-1] else counts:
        say(f"on {_machines(nodes)}: {_chosen(found[nodes])}")
    return fitting


def _counts(config: Config, say: Callable[[str], None]) -> tuple[int, ...]:
    """Numbers of machines over which the batch can be split."""
    most, least = config.hardware.nodes, config.least_nodes
    counts = []
    for nodes in range(least, most + 1):
        try:
            check_ranks(config, nodes * config.hardware.gpus_per_node)
        except UserError as error:
            if nodes == least:
                raise
            say(f"on {_machines(nodes)}: one would be idle, since {error}")
        else:
            counts.append(nodes)
    return tuple(counts)


def _planned(job: PlannedJob, nodes: int, device: str | None) -> Planned:
    cluster = cluster_of(job.config.hardware, profile_for, nodes=nodes, device=device)
    return job.plan(cluster, profile_for(cluster.device))


def _machines(count: int) -> str:
    return "1 machine" if count == 1 else f"{count} machines"


def _chosen(planned: Planned) -> str:
    if not planned.plans:
        return "nothing fits; if that many are given, fewer are used"
    point = planned.plans[0].point
    return f"{words(point.choice)}, {point.seconds:.3g} s a step"
