"""Where nothing fits: single changes of the config with which a job would, and the fewest accelerators."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import replace

from framework.errors import UserError
from framework.planner.changes import COUNTS, VARIANTS, cheapest_changes, fewest_ranks, in_several, trials
from framework.planner.hardware import Cluster
from framework.planner.overrides import with_overrides
from framework.planner.planning import Planned, PlannedJob, budget_of, learn
from framework.planner.profile import Profile
from framework.planner.search import Laws
from framework.planner.space import Candidate

MOST_RECORDINGS = 6
"""Laws that are recorded for it at a time, some ten seconds each; others follow when the same is asked again."""

GPUS_PER_NODE = 8
"""Of machines of which nothing is said."""


def with_advice(job: PlannedJob, planned: Planned, profile: Profile, say: Callable[[str], None]) -> Planned:
    """The same with the ways out, if no plan fits.

    Changes whose laws cannot be had are left out. Laws that were not recorded before are, up to `MOST_RECORDINGS`.

    Args:
        job: that was planned.
        planned: for it.
        profile: of the machine.
        say: is told what takes time.
    """
    if planned.plans:
        return planned
    cluster, config = planned.cluster, job.config
    variants = dict(_variants(job))
    per_node = cluster.gpus_per_node if cluster.ranks > 1 else GPUS_PER_NODE
    several = job.with_config(in_several(config))
    counts = [count for count in COUNTS if count > cluster.ranks]
    wanted = [(several, _space(several, count, math.ceil(count / per_node))) for count in counts]
    for trial in trials(config):
        its_job = job.with_config(trial.config) if trial.variant is None else variants.get(trial.variant)
        if its_job is not None:
            wanted.append((its_job, _space(its_job, cluster.ranks, cluster.nodes)))
    # What lacks few laws comes first, so that as many changes as can be are looked at.
    wanted.sort(key=lambda entry: len(entry[0].unrecorded(entry[1])))
    learn(wanted, say, MOST_RECORDINGS)

    def variant(name: str) -> Laws | None:
        return variants[name].laws(cluster, profile) if name in variants else None

    def on(ranks: int, nodes: int) -> Laws:
        return several.laws(resized(cluster, ranks, per_node), profile)

    budget = budget_of(cluster, profile)
    changes = cheapest_changes(
        config,
        job.laws(cluster, profile),
        budget,
        ranks=cluster.ranks,
        nodes=cluster.nodes,
        labelled_share=job.labelled_share,
        fastest_seconds=planned.found.fastest_seconds,
        variant=variant,
    )
    more = fewest_ranks(config, on, budget, gpus_per_node=per_node, labelled_share=job.labelled_share, counts=counts)
    return replace(planned, changes=tuple(changes), more_ranks=more)


def resized(cluster: Cluster, ranks: int, gpus_per_node: int) -> Cluster:
    """The cluster with another number of devices of the same kind, which share as few machines as can be."""
    nodes = math.ceil(ranks / gpus_per_node)
    return replace(cluster, nodes=nodes, gpus_per_node=ranks // nodes)


def _variants(job: PlannedJob) -> Iterator[tuple[str, PlannedJob]]:
    """The job with each of `VARIANTS` that its config permits and that can be planned for."""
    for name, change in VARIANTS.items():
        changed = with_overrides(job.config, change)
        if changed is None or changed == job.config:
            continue
        try:
            yield name, job.of_config(changed)
        except UserError:
            # Such as a model without the modules that an adapter is for.
            continue


def _space(job: PlannedJob, ranks: int, nodes: int) -> list[Candidate]:
    """What a job permits on so many ranks; nothing where it cannot be split over them."""
    try:
        return job.space(ranks, nodes)
    except UserError:
        return []
