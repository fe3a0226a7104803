"""Plans that runs have left: in checkpoints and in run directories. Must not import the planner's model of a step."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from framework.checkpoint import compare_configs
from framework.config import Config
from framework.planner.made_for import MadeFor
from framework.planner.overrides import with_overrides
from framework.sharding.ranks import Ranks
from framework.training.plan import settings_plan
from framework.training.resuming import with_defaults, within
from framework.training.run_directory import RunDirectory

PLANNED_WITH = (
    "model.path",
    "model.from_config",
    "model.adapter",
    "model.quantization",
    "model.attention",
    "data.sequence_length",
    "data.packing",
    "data.supervised_fraction",
    "selection",
    "retention",
    "sharding.engine",
    "sharding.zero_stage",
    "sharding.reshard_after_forward",
    "sharding.replicas",
    "sharding.offload_optimizer",
    "sharding.offload_parameters",
    "optimizer.name",
    "optimizer.precision",
    "training.global_batch_size",
    "training.micro_batch_size",
    "training.max_grad_norm",
    "planner.objective",
    "planner.max_slowdown",
)
"""Keys that a plan depends on, the hardware aside."""


def plan_changes(manifest: Mapping[str, Any], config: Config, made_for: MadeFor) -> list[str]:
    """What keeps a run from taking the plan of its checkpoint, in words; nothing if it takes that.

    Args:
        manifest: of the checkpoint.
        config: of the run, with open keys.
        made_for: what a new plan would be made for.
    """
    stored = manifest.get("planned")
    if stored is None:
        return ["the checkpoint's run was not planned"]
    changes = MadeFor(**stored["made_for"]).differences(made_for)
    now = with_overrides(config, stored["overrides"])
    if now is None or now.open_keys:
        return [*changes, f"{as_words(stored['overrides'])} is not what the config leaves open"]
    lines = compare_configs(with_defaults(manifest["config"]), now.to_json())
    return [*changes, *(line for line in lines if within(line.partition(":")[0], PLANNED_WITH))]


def stored_plan(manifest: Mapping[str, Any]) -> dict[str, Any]:
    """The plan of a checkpoint, as in `plan.json`, but for what else was listed beside the chosen one."""
    return {"chosen": manifest["plan"], "plans": [manifest["plan"]]} | manifest["planned"]


def plan_of_run(
    config: Config, options: dict[str, Any], ranks: Ranks, directory: RunDirectory, planned: dict[str, Any] | None
) -> dict[str, Any]:
    """What `plan.json` is to hold of a run: its plan, with what the engine is told.

    A run whose settings were all given has that of the last start in its directory, if that was planned with the same
    settings; else one without predictions.

    Args:
        config: of the run, without open keys.
        options: the engine's, from `engine_options`.
        ranks: of the run; the first one reads.
        directory: of the run.
        planned: from `resolve_together`; None for a run whose settings were all given.
    """
    if planned is None:
        planned = ranks.broadcast(_earlier_plan(config, ranks.world_size, directory) if ranks.is_first else None)
    if planned is None:
        return settings_plan(config, ranks.world_size, options)
    chosen = planned["chosen"] | {"engine_options": options}
    return planned | {"chosen": chosen, "plans": [chosen, *planned["plans"][1:]]}


def _earlier_plan(config: Config, ranks: int, directory: RunDirectory) -> dict[str, Any] | None:
    """The plan that a directory holds, if it is one by the planner for this run; an unreadable one is none."""
    try:
        plan, saved = (json.loads((directory.path / name).read_text()) for name in ("plan.json", "config.json"))
    except (OSError, ValueError):
        return None
    if "made_for" not in plan or plan["made_for"]["ranks"] != ranks:
        return None
    lines = compare_configs(with_defaults(saved), config.to_json())
    return None if any(within(line.partition(":")[0], PLANNED_WITH) for line in lines) else plan


def as_words(values: Mapping[str, Any]) -> str:
    """Values of keys, such as `retention.policy "selective", training.micro_batch_size 4`."""
    return ", ".join(
        f'{key} "{value}"' if isinstance(value, str) else f"{key} {value}" for key, value in values.items()
    )
