"""What would make a job fit that does not: one change of its config, or more ranks. Must not import torch."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from framework.config import Config
from framework.config.sections import PlannerConfig
from framework.errors import UserError
from framework.planner.overrides import is_open, overrides, with_overrides
from framework.planner.search import Budget, Laws, Point, search
from framework.planner.space import candidates

AUTO = "auto"

OFFLOADS: tuple[dict[str, Any], ...] = (
    {"sharding.offload_optimizer": True},
    {"sharding.offload_optimizer": True, "sharding.offload_parameters": True},
)

OTHER_ENGINE: dict[str, Any] = {"sharding.engine": AUTO, "sharding.zero_stage": AUTO}

SAME_RESULT: tuple[dict[str, Any], ...] = (
    {"training.micro_batch_size": AUTO},
    {"retention.retain_linears": AUTO},
    {"retention.policy": "checkpoint"},
    {"sharding.zero_stage": AUTO},
    {"sharding.reshard_after_forward": True},
    {"sharding.replicas": 1},
    OTHER_ENGINE,
    *OFFLOADS,
)
"""Changes that leave what is learnt as it is: key -> value, where "auto" is the value that fits and is fastest."""

ON_HOST = {"retention.placement": "host"}
"""Another such change, of runs that are selective: for others it would be one of several keys at once."""

OTHER_RESULT: tuple[dict[str, Any], ...] = (
    {"retention.kv_format": "int8"},
    {"retention.kv_format": "int4"},
    {"selection.ratio": AUTO},
)
"""Changes of the gradient."""

OTHER_STRATEGY = {"none": "supervised", "supervised": "uniform"}
"""The strategy that selects fewer tokens than the given one."""

VARIANTS: dict[str, dict[str, Any]] = {
    "adamw_8bit": {"optimizer.name": "adamw_8bit"},
    "lora": {"model.adapter": {"kind": "lora", "rank": 16, "alpha": 32}},
    "nf4": {"model.quantization": "nf4"},
}
"""Changes of what is trained, by the names under which `cheapest_changes` asks for their laws."""

COUNTS = (1, 2, 4, 8, 16, 32, 64)
"""Of ranks that are tried upwards."""


@dataclass(frozen=True)
class Change:
    """One change with which a job fits.

    Attributes:
        overrides: key -> value, as `--set` takes it.
        point: the fastest one that fits with it.
        slowdown: its step time / that of the fastest permitted plan with unlimited memory.
        same_result: what is learnt stays as it is.
    """

    overrides: Mapping[str, Any]
    point: Point
    slowdown: float
    same_result: bool


class Trial(NamedTuple):
    """One change that may help.

    Attributes:
        change: key -> value, where "auto" is the value that fits and is fastest.
        config: with the change.
        same_result: what is learnt stays as it is.
        variant: the name in `VARIANTS` of a change that needs laws of its own.
    """

    change: Mapping[str, Any]
    config: Config
    same_result: bool
    variant: str | None


@dataclass(frozen=True)
class MoreRanks:
    """The fewest ranks on which a job fits, and the fastest point there."""

    ranks: int
    nodes: int
    point: Point


def cheapest_changes(
    config: Config,
    laws: Laws,
    budget: Budget,
    *,
    ranks: int,
    nodes: int,
    labelled_share: float,
    fastest_seconds: float,
    variant: Callable[[str], Laws | None] = lambda name: None,
) -> list[Change]:
    """Single changes that would make a job fit, the least slowdown first.

    Everything else stays: what the config leaves open takes the values that are fastest with the change.

    Args:
        config: of a run for which nothing fits.
        laws: of memory and time; they also hold for what the config does not permit.
        budget: of a rank.
        ranks: number of processes.
        nodes: number of machines that they are on.
        labelled_share: labelled tokens / all tokens of the data.
        fastest_seconds: step time of the fastest permitted plan with unlimited memory.
        variant: gives the laws of the run with one of `VARIANTS`; None where that is no option, such as a quantised
            model without an adapter.
    """
    changes: list[Change] = []
    for trial in trials(config):
        its_laws = laws if trial.variant is None else variant(trial.variant)
        if its_laws is None:
            continue
        point = fastest(trial.config, its_laws, budget, ranks, nodes, labelled_share)
        if point is None:
            continue
        resolved = with_overrides(trial.config, overrides(trial.config, point.choice, labelled_share))
        assert resolved is not None
        named = _differences(config, resolved, trial.change)
        if named:
            changes.append(Change(named, point, point.seconds / fastest_seconds, trial.same_result))
    # One that changes all that another changes, and more, is not needed.
    changes = [
        each for each in changes if not any(other.overrides.items() < each.overrides.items() for other in changes)
    ]
    return sorted(changes, key=lambda each: (each.slowdown, not each.same_result))


def trials(config: Config) -> list[Trial]:
    """The changes that are tried: those that the config does not have already, and that its rules permit."""
    tried = [(change, True, None) for change in SAME_RESULT] + [(change, False, None) for change in OTHER_RESULT]
    if config.retention.policy == "selective":
        tried.append((ON_HOST, True, None))
    if config.sharding.engine == "single":
        tried += [(OTHER_ENGINE | offload, True, None) for offload in OFFLOADS]
    strategy = OTHER_STRATEGY.get(config.selection.strategy)
    if strategy is not None:
        change = {"selection.strategy": strategy, "selection.ratio": AUTO, "retention.policy": "selective"}
        tried.append((change, False, None))
    named = [(change, False, name) for name, change in VARIANTS.items()]
    found = []
    for change, same_result, variant in [*tried, *named]:
        changed = None if _has_all(config, change) else with_overrides(config, change)
        if changed is not None:
            found.append(Trial(change, changed, same_result, variant))
    return found


def in_several(config: Config) -> Config:
    """A run that several processes may share: one that is for a single one may take any engine there."""
    if config.sharding.engine != "single":
        return config
    return with_overrides(config, OTHER_ENGINE) or config


def fewest_ranks(
    config: Config,
    laws_of: Callable[[int, int], Laws],
    budget: Budget,
    *,
    gpus_per_node: int,
    labelled_share: float,
    counts: Iterable[int] = COUNTS,
) -> MoreRanks | None:
    """The fewest ranks on which a job fits; None if it does on none of the counts.

    A job of one process may take any engine there. Counts that the global batch cannot be split over are left out.

    Args:
        config: of the run.
        laws_of: number of ranks and of machines -> laws of memory and time.
        budget: of a rank.
        gpus_per_node: of a machine.
        labelled_share: labelled tokens / all tokens of the data.
        counts: of ranks, rising.
    """
    config = in_several(config)
    for ranks in counts:
        nodes = math.ceil(ranks / gpus_per_node)
        point = fastest(config, laws_of(ranks, nodes), budget, ranks, nodes, labelled_share)
        if point is not None:
            return MoreRanks(ranks, nodes, point)
    return None


def fastest(config: Config, laws: Laws, budget: Budget, ranks: int, nodes: int, labelled_share: float) -> Point | None:
    """The fastest point of a config that fits; None if none does, or if it cannot run on so many ranks.

    Args:
        config: of the run.
        laws: of memory and time.
        budget: of a rank.
        ranks: number of processes.
        nodes: number of machines that they are on.
        labelled_share: labelled tokens / all tokens of the data.
    """
    try:
        space = candidates(config, ranks=ranks, nodes=nodes, labelled_share=labelled_share, linears=laws.linears)
    except UserError:
        return None
    if not (space := [*laws.known(space)]):
        return None
    found = search(space, laws, budget, PlannerConfig(objective="speed", top=1), labelled_share=labelled_share)
    return found.points[0] if found.points else None


def _value(config: Config, key: str) -> Any:
    section, name = key.split(".")
    return getattr(getattr(config, section), name)


def _has_all(config: Config, change: Mapping[str, Any]) -> bool:
    """Whether a change changes nothing."""
    return all(is_open(config, key) if value == AUTO else _value(config, key) == value for key, value in change.items())


def _differences(config: Config, resolved: Config, change: Mapping[str, Any]) -> dict[str, Any]:
    """Those keys of a change, and of what it opened, that have another value than before."""
    keys = [*change]
    if change.get("sharding.engine") == AUTO:
        keys += ["sharding.reshard_after_forward", "sharding.replicas"]
    now = {key: _value(resolved, key) if change.get(key, AUTO) == AUTO else change[key] for key in keys}
    return {key: value for key, value in now.items() if value != _value(config, key)}
