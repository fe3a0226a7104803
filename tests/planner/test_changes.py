"""Where nothing fits: changes that would help, each tried by itself."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from open_job import open_job
from toy_laws import TOY, MiB

from framework.config import Config
from framework.planner.changes import ON_HOST, Change, cheapest_changes, fastest, fewest_ranks, trials
from framework.planner.overrides import with_overrides
from framework.planner.search import Budget, Laws
from framework.planner.space import candidates

SHARE = 0.25
REFERENCE = 10.0
LORA = {"kind": "lora", "rank": 16, "alpha": 32}


def fixed(**changes: Any) -> Config:
    """ZeRO 1 over 8 ranks, everything given: 10,500 MiB of states (the gradients' phase) and as much again to save."""
    settings = {
        "sharding__engine": "deepspeed",
        "sharding__zero_stage": 1,
        "training__micro_batch_size": 8,
        "retention__policy": "all",
        "selection__strategy": "none",
        "selection__ratio": ...,
    }
    return open_job(**settings | changes)


def changes(config: Config, budget: int, ranks: int = 8, **keywords: Any) -> list[Change]:
    return cheapest_changes(
        config,
        TOY,
        Budget(budget),
        ranks=ranks,
        nodes=1,
        labelled_share=SHARE,
        fastest_seconds=REFERENCE,
        **keywords,
    )


def test_every_change_alone_makes_the_job_fit() -> None:
    config, budget = fixed(), Budget(8_000 * MiB)
    assert fastest(config, TOY, budget, 8, 1, SHARE) is None
    found = changes(config, budget.bytes)
    for change in found:
        changed = with_overrides(config, change.overrides)
        assert changed is not None and changed.open_keys == ()
        assert change.point.ledger.peak <= budget.bytes
        assert fastest(changed, TOY, budget, 8, 1, SHARE) == change.point
        assert change.slowdown == change.point.seconds / REFERENCE
    assert [each.slowdown for each in found] == sorted(each.slowdown for each in found)


def test_all_that_helps_is_named() -> None:
    found = changes(fixed(), 8_000 * MiB)
    assert [dict(each.overrides) for each in found if each.same_result] == [
        {"training.micro_batch_size": 4},
        {"retention.policy": "checkpoint"},
    ]
    assert [dict(each.overrides) for each in found if not each.same_result] == [
        {"selection.strategy": "supervised", "selection.ratio": "labelled", "retention.policy": "selective"}
    ]


def test_retaining_on_the_host_is_proposed_to_selective_runs() -> None:
    settings = {
        "retention__policy": "selective",
        "retention__retain_linears": True,
        "selection__strategy": "uniform",
        "selection__ratio": 0.5,
    }
    config = fixed(**settings, training__micro_batch_size=8)
    least = TOY.memory(candidates(config, ranks=8, nodes=1, labelled_share=SHARE)[0].choice)
    found = changes(config, least.peak - 100 * MiB)
    on_host = next(each for each in found if each.overrides == {"retention.placement": "host"})
    assert on_host.same_result and on_host.point.ledger.host_bytes > least.host_bytes
    assert not any("retention.placement" in trial.change for trial in trials(fixed()))
    assert ON_HOST not in [trial.change for trial in trials(fixed(**settings, retention__placement="host"))]


def test_offloading_is_proposed_where_nothing_else_fits() -> None:
    config = open_job(training__micro_batch_size=1)
    budget = 1_450 * MiB
    assert fastest(config, TOY, Budget(budget), 8, 1, SHARE) is None
    assert [dict(each.overrides) for each in changes(config, budget)] == [{"sharding.offload_optimizer": True}]


def test_one_process_offloads_under_another_engine() -> None:
    config = open_job(sharding__engine="single", sharding__zero_stage=..., training__micro_batch_size=1)
    found = changes(config, 8_000 * MiB, ranks=1)
    assert [each.overrides["sharding.engine"] for each in found] == ["deepspeed", "fsdp"]
    assert all(each.overrides["sharding.offload_optimizer"] is True for each in found)


def test_variants_have_their_own_laws() -> None:
    def lighter(name: str) -> Laws | None:
        if name == "nf4":
            return None
        shrink = {"adamw_8bit": 0.9, "lora": 0.1}[name]

        def memory(choice: Any) -> Any:
            ledger = TOY.memory(choice)
            return replace(ledger, terms=tuple(replace(t, bytes=round(t.bytes * shrink)) for t in ledger.terms))

        return Laws(memory, TOY.seconds)

    config = fixed()
    without = changes(config, 3_000 * MiB)
    further = [each for each in changes(config, 3_000 * MiB, variant=lighter) if each not in without]
    assert [(dict(each.overrides), each.same_result) for each in further] == [({"model.adapter": LORA}, False)]


def test_the_fewest_ranks_are_found_upwards() -> None:
    asked = []

    def laws_of(ranks: int, nodes: int) -> Laws:
        asked.append((ranks, nodes))
        return TOY

    config = open_job(sharding__engine="single", sharding__zero_stage=..., hardware__nodes=1)
    found = fewest_ranks(config, laws_of, Budget(4_000 * MiB), gpus_per_node=4, labelled_share=SHARE)
    assert found is not None
    assert asked == [(1, 1), (2, 1), (4, 1)] and (found.ranks, found.nodes) == (4, 1)
    below = [fastest(open_job(), TOY, Budget(4_000 * MiB), ranks, 1, SHARE) for ranks in (1, 2, 4)]
    assert below == [None, None, found.point]
    assert fewest_ranks(config, laws_of, Budget(10 * MiB), gpus_per_node=4, labelled_share=SHARE) is None


def test_what_is_so_already_is_not_proposed() -> None:
    smallest = fixed(sharding__zero_stage=3, training__micro_batch_size=1, retention__policy="checkpoint")
    named = [set(each.overrides) for each in changes(smallest, 20_000 * MiB)]
    assert {"retention.policy"} not in named and {"training.micro_batch_size"} in named
    assert changes(open_job(), 100 * MiB) == []
