"""Plans at the launch of a run: for the machines that it was launched on, and with what to try if memory runs out."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

from framework.config import Config
from framework.errors import UserError
from framework.extras import is_installed, shards_bytes
from framework.hardware import Device
from framework.planner.advice import with_advice
from framework.planner.hardware import Cluster, cluster_of, detected_device, host_memory, parse_bytes
from framework.planner.made_for import MadeFor
from framework.planner.plan import Plan
from framework.planner.planning import Planned, PlannedJob
from framework.planner.profile import Profile, profile_for
from framework.planner.report import gib
from framework.planner.space import ENGINES
from framework.sharding.deepspeed_config import OwnOptions

FALLBACK_BUDGETS = (0.95, 0.85, 0.7, 0.5)
"""For the plans that are kept for the case that memory runs out: what each may take / what the chosen one takes."""


def launch_cluster(
    config: Config,
    *,
    nodes: int,
    ranks_per_node: int,
    profile_of: Callable[[Device], Profile] = profile_for,
    detect: Callable[[], Device | None] = detected_device,
) -> Cluster:
    """The machines of a launch: this one's accelerator, of which no more is taken than `hardware.gpu_memory`.

    Without an accelerator that is the memory of a typical one.

    Args:
        config: of the run.
        nodes: machines.
        ranks_per_node: processes on each.
        profile_of: gives a device's profile.
        detect: finds this machine's accelerator.

    Raises:
        UserError: there is no accelerator, and none is described.
    """
    cluster = _bounded_cluster(config, nodes, ranks_per_node, profile_of, detect())
    if cluster.host_bytes is None:
        cluster = replace(cluster, host_bytes=host_memory())
    hardware, described = config.hardware, config.described_ranks
    if not hardware.model_fields_set & {"nodes", "gpus_per_node"} or described == cluster.ranks:
        return cluster
    return replace(
        cluster,
        notes=(f"planned for {cluster.ranks} ranks, as launched; hardware describes {described}", *cluster.notes),
    )


def _bounded_cluster(
    config: Config, nodes: int, ranks_per_node: int, profile_of: Callable[[Device], Profile], found: Device | None
) -> Cluster:
    """The machines, with the accelerator that was found."""
    hardware = config.hardware
    if found is None:
        if hardware.gpu_memory is None:
            raise UserError(
                f'{", ".join(config.open_keys)}: "auto" is chosen for the memory of an accelerator, and this machine '
                "has none: describe one, as in --set hardware.gpu_memory=24GiB, or give a value"
            )
        cluster = cluster_of(hardware, profile_of, nodes=nodes, gpus_per_node=ranks_per_node)
        taken_for = f"device: none here, so a {cluster.device.name}, which typically has {hardware.gpu_memory}"
        return replace(cluster, notes=(taken_for, *cluster.notes[1:]))
    bare = hardware.model_copy(update={"gpu_memory": None})
    cluster = cluster_of(bare, profile_of, nodes=nodes, gpus_per_node=ranks_per_node, detect=lambda: found)
    if hardware.gpu_memory is None:
        return cluster
    given = parse_bytes(hardware.gpu_memory, "hardware.gpu_memory")
    if given >= cluster.budget_bytes:
        return cluster
    notes = (*cluster.notes, f"budget: {gib(given)}, as hardware.gpu_memory says")
    return replace(cluster, budget_bytes=given, notes=notes)


def profile_here(device: Device) -> Profile:
    """The profile for a device; on a machine without accelerator, whose runs use the processor, without workspaces."""
    profile = profile_for(device)
    return profile if detected_device() is not None else replace(profile, workspace_bytes=0)


def engines_here(config: Config) -> tuple[str, ...]:
    """The engines whose libraries are installed here, and can do what a config asks for."""
    missing = set()
    if not is_installed("deepspeed"):
        missing.add("deepspeed")
    if config.model.quantization is not None and not shards_bytes():
        missing.add("fsdp")
    return tuple(engine for engine in ENGINES if engine not in missing)


@dataclass(frozen=True)
class LaunchPlan:
    """The plans of a launch.

    Attributes:
        planned: by the planner.
        fallbacks: plans that take ever less than the chosen one, each the best for its budget.
        made_for: the launch.
        fixed: values of open keys that were not for the planner to choose.
    """

    planned: Planned
    fallbacks: tuple[Plan, ...]
    made_for: MadeFor
    fixed: Mapping[str, Any]

    def to_json(self) -> dict[str, Any]:
        """`plan.json`: as from `Planned.to_json`, with these keys besides if a plan fits.

        `overrides` are the values of the open keys; `made_for` is a `MadeFor`; `fallbacks` have `overrides`,
        `fidelity_class`, `peak_allocated_bytes`, `peak_reserved_bytes` and `step_seconds`.
        """
        found = self.planned.to_json()
        if not self.planned.plans:
            return found
        return found | {
            "overrides": {**self.fixed, **self.planned.plans[0].overrides},
            "made_for": asdict(self.made_for),
            "fallbacks": [self._fallback(plan) for plan in self.fallbacks],
        }

    def _fallback(self, plan: Plan) -> dict[str, Any]:
        return {
            "overrides": {**self.fixed, **plan.overrides},
            "fidelity_class": plan.fidelity,
            "peak_allocated_bytes": plan.point.ledger.peak,
            "peak_reserved_bytes": plan.reserved_bytes,
            "step_seconds": plan.point.seconds,
        }


def plan_launch(
    config: Config,
    cluster: Cluster,
    labelled_share: float,
    say: Callable[[str], None],
    *,
    fixed: Mapping[str, Any] | None = None,
    own: OwnOptions | None = None,
    profile_of: Callable[[Device], Profile] = profile_here,
) -> LaunchPlan:
    """Plan a run for the machines that it was launched on.

    Args:
        config: of the run, with its open keys, but for those of `fixed`.
        cluster: from `launch_cluster`.
        labelled_share: labelled tokens / all tokens of the data.
        say: is told what takes time.
        fixed: values of keys that were open before.
        own: a user's own options of DeepSpeed.
        profile_of: gives a device's profile.

    Raises:
        UserError: the run is not what can be planned for.
        RunError: laws cannot be recorded.
    """
    job = PlannedJob(config, labelled_share, say, own=own)
    profile, engines = profile_of(cluster.device), engines_here(config)
    planned = with_advice(job, job.plan(cluster, profile, engines=engines), profile, say)
    fallbacks: list[Plan] = []
    for share in FALLBACK_BUDGETS if planned.plans else ():
        within = replace(cluster, budget_bytes=int(share * planned.budget.demand(planned.plans[0].point.ledger)))
        # A plan that takes less than it may can be the one for a smaller budget, too.
        if not fallbacks or planned.budget.demand(fallbacks[-1].point.ledger) > within.budget_bytes:
            fallbacks += job.plan(within, profile, engines=engines, top=1).plans
    return LaunchPlan(planned, tuple(fallbacks), MadeFor.of(cluster), fixed or {})
