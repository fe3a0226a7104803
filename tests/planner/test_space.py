"""What the planner may choose from: all that the config permits, and nothing that its rules refuse."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
from open_job import open_job

from framework.config import Config
from framework.errors import UserError
from framework.planner.choice import Choice
from framework.planner.overrides import overrides, with_overrides
from framework.planner.space import SMALLEST_RATIO, candidates

SHARE = 0.25

SELECTIVE = [("selective", linears, kv) for linears in (False, True) for kv in ("model", "int8")]
RETENTIONS = {("all", False, "model"), ("checkpoint", False, "model"), *SELECTIVE}
STAGES = {("deepspeed", stage, True, 1) for stage in range(4)}
FSDP = {("fsdp", None, reshard, replicas) for reshard in (True, False) for replicas in (1, 2)}


def space(config: Config, ranks: int = 8, nodes: int = 2, linears: Sequence[str] = ()) -> list[Any]:
    return candidates(config, ranks=ranks, nodes=nodes, labelled_share=SHARE, linears=linears)


def shardings(config: Config, **keywords: int) -> set[tuple[Any, ...]]:
    choices = [candidate.choice for candidate in space(config, **keywords)]
    return {(each.engine, each.zero_stage, each.reshard_after_forward, each.replicas) for each in choices}


def retentions(config: Config) -> set[tuple[Any, ...]]:
    return {
        (each.choice.policy, each.choice.retain_linears, each.choice.kv_format, each.lowest, each.choice.ratio)
        for each in space(config)
    }


def test_everything_open_is_the_whole_product() -> None:
    found = space(open_job())
    assert shardings(open_job()) == STAGES | FSDP
    assert {(each.choice.policy, each.choice.retain_linears, each.choice.kv_format) for each in found} == RETENTIONS
    assert {(each.choice.micro_batch_size, each.choice.accumulation) for each in found} == {
        (8, 1),
        (4, 2),
        (2, 4),
        (1, 8),
    }
    assert len(found) == len({each.choice for each in found}) == 8 * 6 * 4


def test_the_first_linear_layers_up_to_any_may_be_retained() -> None:
    names = ("down_proj", "o_proj", "k_proj")
    retained = [False, names[:1], names[:2], True]
    found = space(open_job(), linears=names)
    assert len(found) == len({each.choice for each in found}) == 8 * (2 + 4 * 2) * 4
    assert {each.choice.retain_linears for each in found if each.choice.policy == "selective"} == {*retained}
    assert {each.choice.retain_linears for each in found if each.choice.policy != "selective"} == {False}
    open_key = {"retention__policy": "selective", "retention__retain_linears": "auto"}
    assert [
        *dict.fromkeys(each.choice.retain_linears for each in space(open_job(**open_key), linears=names))
    ] == retained
    given = open_job(retention__retain_linears=["k_proj", "v_proj"])
    assert {each.choice.retain_linears for each in space(given, linears=names)} == {("k_proj", "v_proj")}


def test_chosen_linear_layers_are_written_as_a_list() -> None:
    config = open_job(retention__policy="selective", retention__retain_linears="auto")
    choice = space(config, linears=("down_proj", "o_proj"))[0].choice
    assert overrides(config, choice, SHARE)["retention.retain_linears"] is False
    values = overrides(config, replace(choice, retain_linears=("down_proj",)), SHARE)
    assert values["retention.retain_linears"] == ["down_proj"]
    resolved = with_overrides(config, values)
    assert resolved is not None and resolved.retained_linears == ("down_proj",)
    plain = replace(choice, policy="checkpoint", ratio=1.0)
    assert overrides(open_job(), plain, SHARE).get("retention.retain_linears") is None


def test_offloading_is_open_with_the_engine() -> None:
    chosen = {
        (each.choice.engine, each.choice.zero_stage, each.choice.offload_optimizer, each.choice.offload_parameters)
        for each in space(open_job(sharding__offload_optimizer=..., sharding__replicas=1))
    }
    assert chosen == {
        ("fsdp", None, False, False),
        ("fsdp", None, True, True),
        ("deepspeed", 0, False, False),
        *(("deepspeed", stage, offloads, False) for stage in (1, 2, 3) for offloads in (False, True)),
        ("deepspeed", 3, True, True),
    }
    kept = [each.choice for each in space(open_job(sharding__offload_optimizer=...)) if each.choice.offload_parameters]
    assert all(choice.reshard_after_forward for choice in kept)
    given = open_job(sharding__offload_optimizer=..., sharding__offload_parameters=False)
    assert not any(each.choice.offload_optimizer for each in space(given))


def test_one_rank_may_be_alone() -> None:
    single = {("single", None, True, 1)}
    assert shardings(open_job(), ranks=1, nodes=1) == single | STAGES | {each for each in FSDP if each[3] == 1}
    fixed = open_job(sharding__engine="single", sharding__zero_stage=...)
    assert shardings(fixed, ranks=1, nodes=1) == single
    with pytest.raises(UserError, match=r"^sharding.engine: nothing that the config permits runs on 2 ranks"):
        space(fixed, ranks=2)


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"sharding__engine": "deepspeed"}, STAGES),
        ({"sharding__engine": "deepspeed", "sharding__zero_stage": ...}, {("deepspeed", 3, True, 1)}),
        ({"sharding__engine": "deepspeed", "sharding__zero_stage": 1}, {("deepspeed", 1, True, 1)}),
        ({"sharding__zero_stage": 2}, {("deepspeed", 2, True, 1)}),
        ({"sharding__zero_stage": ...}, STAGES | FSDP),
        ({"sharding__engine": "fsdp", "sharding__zero_stage": ...}, {("fsdp", None, True, 1)}),
        ({"sharding__reshard_after_forward": True}, STAGES | {each for each in FSDP if each[2]}),
        ({"sharding__replicas": 2}, {each for each in FSDP if each[3] == 2}),
        ({"sharding__offload_optimizer": True}, STAGES - {("deepspeed", 0, True, 1)}),
        (
            {"sharding__offload_optimizer": True, "sharding__offload_parameters": True},
            {("deepspeed", 3, True, 1), *FSDP},
        ),
        (
            {
                "sharding__offload_optimizer": True,
                "sharding__offload_parameters": True,
                "optimizer__precision": "pure_bf16",
            },
            FSDP,
        ),
    ],
)
def test_what_is_given_is_fixed_and_rules_are_kept(changes: dict[str, Any], expected: set[Any]) -> None:
    config = open_job(**changes)
    assert shardings(config) == expected
    assert {each.choice.offload_optimizer for each in space(config)} == {config.sharding.offload_optimizer}


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, {(*each, SHARE if each[0] == "selective" else 1, 1) for each in RETENTIONS}),
        ({"selection__ratio": 0.5}, {(*each, 0.5, 0.5) for each in SELECTIVE}),
        ({"selection__ratio": "labelled"}, {(*each, SHARE, SHARE) for each in SELECTIVE}),
        ({"selection__ratio": ...}, {(*each, SHARE, SHARE) for each in SELECTIVE}),
        # Every labelled token is selected whatever the ratio.
        ({"selection__ratio": 0.1}, {(*each, SHARE, SHARE) for each in SELECTIVE}),
        ({"selection__ratio": 1.0}, {(*each, 1, 1) for each in RETENTIONS}),
        (
            {"selection__strategy": "uniform"},
            {(*each, SMALLEST_RATIO if each[0] == "selective" else 1, 1) for each in RETENTIONS},
        ),
        ({"selection__strategy": "uniform", "selection__ratio": 0.1}, {(*each, 0.1, 0.1) for each in SELECTIVE}),
        ({"selection__strategy": "suffix", "selection__ratio": 0.1}, {(*each, 0.1, 0.1) for each in SELECTIVE}),
        ({"selection__strategy": "none", "selection__ratio": ...}, {(*each, 1, 1) for each in RETENTIONS}),
        ({"retention__policy": "selective"}, {("selective", False, "model", SHARE, 1)}),
        (
            {"retention__kv_format": "model"},
            {(*each, SHARE if each[0] == "selective" else 1, 1) for each in RETENTIONS if each[2] == "model"},
        ),
        ({"retention__kv_format": "int8"}, {(*each, SHARE, 1) for each in SELECTIVE if each[2] == "int8"}),
        ({"retention__kv_format": "int4"}, {("selective", linears, "int4", SHARE, 1) for linears in (False, True)}),
        ({"retention__retain_linears": True}, {(*each, SHARE, 1) for each in SELECTIVE if each[1]}),
    ],
)
def test_ratio_and_retention(changes: dict[str, Any], expected: set[Any]) -> None:
    assert retentions(open_job(**changes)) == expected


def test_the_host_is_tried_where_the_config_asks_for_it() -> None:
    everything = open_job(retention__placement="auto")
    found = {(each.choice.policy, each.choice.placement) for each in space(everything)}
    assert found == {("all", "device"), ("checkpoint", "device"), ("selective", "device"), ("selective", "host")}
    assert len(space(everything)) == len(space(open_job())) * (2 + 2 * 4) // (2 + 4)
    assert {each.choice.placement for each in space(open_job())} == {"device"}
    given = space(open_job(retention__placement="host"))
    assert {(each.choice.policy, each.choice.placement) for each in given} == {("selective", "host")}
    on_host = next(each.choice for each in space(everything) if each.choice.placement == "host")
    assert overrides(everything, on_host, SHARE)["retention.placement"] == "host"
    resolved = with_overrides(everything, overrides(everything, on_host, SHARE))
    assert resolved is not None and Choice.of(resolved, 8, SHARE) == on_host


def test_a_given_micro_batch_is_kept() -> None:
    found = space(open_job(training__micro_batch_size=4))
    assert {(each.choice.micro_batch_size, each.choice.accumulation) for each in found} == {(4, 2)}


def test_a_batch_that_cannot_be_split_is_named() -> None:
    with pytest.raises(
        UserError, match=r"^training.global_batch_size: 64 is no multiple of 3, which is the number of r"
    ):
        space(open_job(), ranks=3)
    message = (
        r"^training.global_batch_size: 64 is no multiple of 128, which is the number of ranks times training.micro_"
    )
    with pytest.raises(UserError, match=message):
        space(open_job(training__micro_batch_size=16))


@pytest.mark.parametrize("strategy", ["supervised", "uniform", "suffix"])
@pytest.mark.parametrize("ranks", [1, 8])
def test_every_choice_is_a_valid_config_that_chooses_it(strategy: str, ranks: int) -> None:
    config = open_job(selection__strategy=strategy)
    for candidate in space(config, ranks=ranks):
        for ratio in {candidate.lowest, candidate.choice.ratio}:
            choice = candidate.at(ratio)
            resolved = with_overrides(config, overrides(config, choice, SHARE))
            assert resolved is not None
            assert resolved.open_keys == ()
            assert Choice.of(resolved, ranks, SHARE) == choice


def test_overrides_name_open_keys_only() -> None:
    config = open_job(
        selection__ratio=0.5, sharding__engine="deepspeed", sharding__zero_stage=2, retention__policy="selective"
    )
    choice = space(config)[0].choice
    assert overrides(config, choice, SHARE) == {"training.micro_batch_size": 8}
    assert overrides(open_job(), choice, SHARE) == {
        "selection.ratio": 0.5,
        "retention.policy": "selective",
        "sharding.engine": "deepspeed",
        "sharding.zero_stage": 2,
        "training.micro_batch_size": 8,
    }
    other = replace(choice, retain_linears=True, kv_format="int8", engine="fsdp", zero_stage=None, replicas=2)
    assert overrides(open_job(sharding__zero_stage=...), other, SHARE) == {
        "selection.ratio": 0.5,
        "retention.policy": "selective",
        "retention.retain_linears": True,
        "retention.kv_format": "int8",
        "sharding.engine": "fsdp",
        "sharding.replicas": 2,
        "training.micro_batch_size": 8,
    }


def test_the_labelled_share_is_written_as_such() -> None:
    config = open_job()
    candidate = next(each for each in space(config) if each.lowest < 1)
    assert overrides(config, candidate.at(SHARE), SHARE)["selection.ratio"] == "labelled"
    assert overrides(config, candidate.at(0.3), SHARE)["selection.ratio"] == 0.3
    assert overrides(config, candidate.choice, SHARE)["selection.ratio"] == 1.0


def test_what_the_rules_refuse_is_no_config() -> None:
    assert with_overrides(open_job(), {"sharding.engine": "single", "sharding.zero_stage": 2}) is None
    changed = with_overrides(open_job(), {"planner.max_slowdown": 2.0})
    assert changed is not None and changed.planner.max_slowdown == 2.0
    assert "zero_stage" in changed.sharding.model_fields_set and "replicas" not in changed.sharding.model_fields_set
