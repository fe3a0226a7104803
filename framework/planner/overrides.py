"""From a choice to the keys of a config, and to a config with these keys. Must not import torch."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from pydantic import ValidationError

from framework.config import Config
from framework.planner.choice import Choice

LABELLED = "labelled"

RESULT_KEYS = ("selection.ratio", "retention.kv_format")
"""What the planner chooses and a model learns otherwise by; the rest changes no more than the order of sums."""

OFFLOAD = ("offload_optimizer", "offload_parameters")
"""Keys of `sharding` of which both are open or none."""


def is_open(config: Config, key: str) -> bool:
    """Whether a key is the planner's to choose.

    Those that say "auto" are, and, with an engine or a policy that says so, those of its options that are not given;
    but for `retention.placement`, whose laws and candidates would be twice as many.

    Args:
        config: of the run.
        key: such as `retention.kv_format`.
    """
    sharding, name = config.sharding, key.split(".")[1]
    if _given(config, key) == "auto":
        return True
    if name == "zero_stage":
        return sharding.engine == "auto" and sharding.zero_stage is None
    if name in ("reshard_after_forward", "replicas"):
        return sharding.engine == "auto" and name not in sharding.model_fields_set
    if name in OFFLOAD:
        return sharding.engine == "auto" and not sharding.model_fields_set & set(OFFLOAD)
    if name in ("retain_linears", "kv_format"):
        return config.retention.policy == "auto" and name not in config.retention.model_fields_set
    return False


def overrides(config: Config, choice: Choice, labelled_share: float) -> dict[str, Any]:
    """What a choice gives the open keys of a config: key -> JSON value, as `--set` takes it; no defaults.

    Args:
        config: of the run.
        choice: that the config permits.
        labelled_share: labelled tokens / all tokens of the data; a ratio that equals it is written "labelled" with the
            strategy `supervised`, which then selects them document by document.
    """
    ratio: float | str = choice.ratio
    if choice.strategy == "supervised" and choice.ratio < 1 and choice.ratio == labelled_share:
        ratio = LABELLED
    linears = choice.retain_linears
    values = {
        "selection.ratio": ratio,
        "retention.policy": choice.policy,
        "retention.retain_linears": linears if isinstance(linears, bool) else [*linears],
        "retention.kv_format": choice.kv_format,
        "retention.placement": choice.placement,
        "sharding.engine": choice.engine,
        "sharding.zero_stage": choice.zero_stage,
        "sharding.reshard_after_forward": choice.reshard_after_forward,
        "sharding.replicas": choice.replicas,
        "sharding.offload_optimizer": choice.offload_optimizer,
        "sharding.offload_parameters": choice.offload_parameters,
        "training.micro_batch_size": choice.micro_batch_size,
    }
    return {key: value for key, value in values.items() if is_open(config, key) and value != _given(config, key)}


def _given(config: Config, key: str) -> Any:
    section, name = key.split(".")
    return getattr(getattr(config, section), name)


def with_overrides(config: Config, values: Mapping[str, Any]) -> Config | None:
    """The same config with other values of some keys; None where the rules refuse it.

    What the config does not give stays not given.

    Args:
        config: to start from.
        values: key, such as `sharding.engine` -> JSON value.
    """
    tree = config.model_dump(mode="json", exclude_unset=True)
    for key, value in values.items():
        section, name = key.split(".")
        tree.setdefault(section, {})[name] = value
    try:
        # Lists stand for tuples in JSON only.
        return Config.model_validate_json(json.dumps(tree))
    except ValidationError:
        return None
