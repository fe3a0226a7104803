"""Keys that are left to the planner."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from framework.config import Config, load_config


@pytest.mark.parametrize(
    "key",
    [
        "selection.ratio",
        "retention.policy",
        "retention.retain_linears",
        "retention.placement",
        "sharding.engine",
        "sharding.zero_stage",
        "training.micro_batch_size",
    ],
)
def test_auto_leaves_a_key_to_the_planner(small: Path, key: str) -> None:
    others = {f"retention.{name}": ["retention.policy=selective"] for name in ("retain_linears", "placement")}
    others["selection.ratio"] = ["selection.strategy=uniform", "retention.policy=selective"]
    others["sharding.zero_stage"] = ["sharding.engine=deepspeed"]
    config = load_config(small, [*others.get(key, ()), f"{key}=auto"])
    assert config.open_keys == (key,)
    assert Config.model_validate_json(json.dumps(config.to_json())) == config


def test_no_key_is_open_unless_it_says_so(small: Path) -> None:
    assert load_config(small).open_keys == ()


def test_options_of_what_is_open_may_be_fixed(small: Path) -> None:
    settings = ["selection.strategy=supervised", "retention.policy=auto", "retention.kv_format=int8"]
    settings += ["retention.retain_linears=true", "sharding.engine=auto", "sharding.reshard_after_forward=false"]
    config = load_config(small, [*settings, "sharding.replicas=2", "sharding.offload_parameters=true"])
    assert config.open_keys == ("retention.policy", "sharding.engine")
