"""What people read of a plan, in a narrow and in a wide terminal."""

from __future__ import annotations

import io
import re
from dataclasses import replace
from typing import Any

import pytest
from open_job import open_job
from rich.console import Console
from toy_laws import TOY, MiB

from framework.config import Config
from framework.planner.changes import cheapest_changes, fewest_ranks
from framework.planner.ledger import Ledger, during, everywhere
from framework.planner.plan import Plan, launch_line
from framework.planner.report import Report, fidelity_words, gib, largest_words, words
from framework.planner.search import Budget, search
from framework.planner.space import candidates

SHARE = 0.25
GIB = 1 << 30


def report(config: Config, budget: int) -> Report:
    space = candidates(config, ranks=8, nodes=2, labelled_share=SHARE)
    allowed = Budget(budget)
    found = search(space, TOY, allowed, config.planner, labelled_share=SHARE)
    keywords: dict[str, Any] = {
        "engine_options": lambda config: {"engine": "as told"},
        "reserved_bytes": lambda point: GIB,
    }
    plans = [Plan.of(config, point, SHARE, **keywords) for point in found.points]
    if plans:
        return Report(found, plans, allowed, 8, 2, SHARE, launch_line(plans[0], "open.json", 2))
    return Report(
        found,
        plans,
        allowed,
        8,
        2,
        SHARE,
        smallest=min((TOY.memory(each.at(each.lowest)) for each in space), key=lambda ledger: ledger.peak),
        changes=cheapest_changes(
            config,
            TOY,
            allowed,
            ranks=8,
            nodes=2,
            labelled_share=SHARE,
            fastest_seconds=found.fastest_seconds,
        ),
        more_ranks=fewest_ranks(config, lambda ranks, nodes: TOY, allowed, gpus_per_node=4, labelled_share=SHARE),
    )


def printed(shown: Report, width: int) -> list[str]:
    output = io.StringIO()
    shown.print(Console(file=output, width=width))
    return [line.rstrip() for line in output.getvalue().splitlines()]


@pytest.mark.parametrize("width", [80, 120])
def test_a_plan_is_shown_within_the_width_but_for_the_command(width: int) -> None:
    shown = report(open_job(), 4_000 * MiB)
    lines = printed(shown, width)
    assert lines[0] == "8 GPUs on 2 machines, 3.9 GiB each; balanced, at most 1.5 x the fastest"
    assert lines[-2:] == ["launch", shown.launch]
    assert max(map(len, lines[:-1])) <= width
    text = re.sub(r"\s+", " ", " ".join(lines))
    for plan in shown.plans:
        choice = plan.point.choice
        row = f"{choice.ratio:.4f} {choice.micro_batch_size} x {choice.accumulation} {plan.point.ledger.peak / GIB:.1f}"
        assert row in text
    assert "memory 3.7 GiB allocated of 3.9 GiB, 1.0 GiB reserved" in text
    assert f"peak in optimizer step: {largest_words(shown.plans[0].point.ledger)}" in text
    assert 'options {"engine": "as told"}' in text
    assert f"{shown.found.slowdown(shown.plans[0].point):.2f} x the step time of the fastest permitted plan" in text


@pytest.mark.parametrize("width", [80, 120])
def test_what_would_fit_is_shown_if_nothing_does(width: int) -> None:
    settings: dict[str, Any] = {"sharding__engine": "deepspeed", "sharding__zero_stage": 2, "retention__policy": "all"}
    settings |= {"selection__strategy": "none", "selection__ratio": ..., "training__micro_batch_size": 4}
    shown = report(open_job(**settings), 5_000 * MiB)
    lines = printed(shown, width)
    assert max(map(len, lines)) <= width
    text = re.sub(r"\s+", " ", " ".join(lines))
    assert f"nothing fits the smallest permitted plan takes {gib(shown.smallest.peak)}" in text
    for change in shown.changes:
        for key in change.overrides:
            assert key in text
        assert f"{change.slowdown:.2f} x {change.point.ledger.peak / GIB:.1f}" in text
    assert "training.micro_batch_size 2 same" in text
    assert "launch" not in text


def test_the_fewest_gpus_are_shown() -> None:
    shown = report(open_job(training__micro_batch_size=1), 1_300 * MiB)
    assert shown.more_ranks is not None
    text = re.sub(r"\s+", " ", " ".join(printed(shown, 100)))
    assert f"fewest GPUs {shown.more_ranks.ranks} GPUs on {shown.more_ranks.nodes} machines, with" in text


def test_what_just_missed_is_shown_with_what_it_lacks() -> None:
    shown = report(open_job(planner__objective="fidelity"), 4_000 * MiB)
    missed = replace(shown.plans[0].point, ledger=Ledger((everywhere("all", 4_200 * MiB),)))
    shown = replace(shown, found=replace(shown.found, missed=missed))
    text = re.sub(r"\s+", " ", " ".join(printed(shown, 120)))
    assert (
        f"just missed {words(missed.choice)}, ratio 1: {missed.seconds:.3g} s a step, 0.2 GiB over the budget" in text
    )


def test_it_is_said_that_nothing_is_within_the_bound() -> None:
    shown = report(open_job(planner__max_slowdown=1.0), 2_000 * MiB)
    assert not shown.found.within_bound
    text = re.sub(r"\s+", " ", " ".join(printed(shown, 120)))
    assert "nothing that fits is within 1 x, so this is the fastest that does" in text


def test_words() -> None:
    plan = report(open_job(), 1 << 50).plans[0]
    choice = replace(
        plan.point.choice,
        engine="fsdp",
        zero_stage=None,
        reshard_after_forward=False,
        replicas=2,
        offload_optimizer=True,
        offload_parameters=True,
        policy="selective",
        retain_linears=True,
        kv_format="int8",
        micro_batch_size=2,
        accumulation=4,
    )
    assert words(choice) == "FSDP2, weights kept, 2 copies, offload, selective, linears, int8, batch 2 x 4"
    some = replace(choice, retain_linears=("down_proj", "o_proj"), kv_format="int4")
    assert words(some).endswith("selective, down_proj+o_proj, int4, batch 2 x 4")
    assert words(replace(choice, placement="host")).endswith("selective, linears, int8, on the host, batch 2 x 4")
    point = replace(plan.point, choice=replace(choice, ratio=0.4))
    detached = replace(plan, point=point, fidelity="context detached")
    assert fidelity_words(detached, SHARE).endswith("all labelled tokens (25.0%) and 20.0% of the others get gradient")
    labelled = replace(detached, point=replace(point, choice=replace(choice, ratio=SHARE)))
    assert fidelity_words(labelled, SHARE) == "context detached: the labelled tokens (25.0%) alone get gradient"
    ledger = Ledger(
        (
            everywhere("weights", 2 * GIB),
            during("logits", 25.2 * GIB, {"loss"}),
            *(during(f"part {index}", MiB * 200, {"loss"}) for index in range(4)),
            during("temporaries", GIB, {"optimizer step"}),
        )
    )
    assert largest_words(ledger) == "logits 25.2 GiB, weights 2.0 GiB, part 0 0.2 GiB, part 1 0.2 GiB, other 0.4 GiB"
    assert gib(3 * MiB) == "3.0 MiB"
