"""The table of budgets and what is checked of it, with laws that can be checked by hand."""

from __future__ import annotations

from dataclasses import replace

import pytest
from open_job import open_job
from plan_budgets import JOBS, Row, broken, not_shown, rows_of, table, unfit
from toy_laws import TOY, MiB

from framework.config.sections import PlannerConfig
from framework.planner.search import Budget, Found, Point, search
from framework.planner.space import candidates

SHARE = 0.25
BUDGETS = [size * 1000 * MiB for size in (60, 20, 12, 8, 6, 4, 3, 2, 1)]


def holds(point: Point, budget: int) -> bool:
    return Budget(budget).holds(point.ledger)


@pytest.fixture(scope="module")
def rows() -> list[Row]:
    config = open_job(training__micro_batch_size=2)
    space = candidates(config, ranks=8, nodes=1, labelled_share=SHARE)

    def find(budget: int) -> Found:
        return search(space, TOY, Budget(budget), PlannerConfig(max_slowdown=2.0), labelled_share=SHARE)

    return rows_of(find, BUDGETS)


def test_the_least_budget_of_a_plan_is_what_it_takes(rows: list[Row]) -> None:
    chosen = [row for row in rows if row.chosen is not None]
    assert len(chosen) > 5
    assert [row.least for row in chosen] == [row.chosen.ledger.peak for row in chosen]


def test_what_has_to_hold_does(rows: list[Row]) -> None:
    assert [*broken(rows, holds, SHARE), *not_shown(rows, SHARE)] == []


def test_what_does_not_hold_is_named(rows: list[Row]) -> None:
    assert any("have a more faithful plan than" in line for line in broken(rows[::-1], holds, SHARE))
    wasteful = replace(rows[0], least=rows[0].least + 1)
    assert [*broken([wasteful], holds, SHARE)] == ["the plan of 58.6 GiB is given up while it fits"]
    exact = [row for row in rows if row.chosen is not None and row.chosen.choice.ratio == 1]
    assert [*not_shown(exact, SHARE)] == ["no ratio lies between the labelled share and 1"]


def test_what_does_not_fit_by_simulation_is_named(rows: list[Row]) -> None:
    fitting = {row.chosen.choice: row.chosen.ledger.peak - 5 for row in rows if row.chosen is not None}

    def problems(simulated: dict, unseen: int) -> list[str]:
        return [*unfit(rows, simulated, lambda size: size, lambda point: point.ledger.peak - unseen)]

    assert problems(fitting, 5) == []
    first = rows[0]
    found = problems(fitting | {first.chosen.choice: first.budget - 4}, 5)
    assert found[0] == "the plan of 58.6 GiB takes 58.59 GiB by simulation"
    assert len(found) == sum(row.chosen is not None and row.chosen.choice == first.chosen.choice for row in rows)


def test_a_row_for_every_budget(rows: list[Row]) -> None:
    simulated = {row.chosen.choice: 1 << 30 for row in rows[:1]}
    lines = [*table(rows, SHARE, simulated)]
    assert lines[2].count("| 1.00 |") == 1
    assert len(lines) == 2 + len(BUDGETS) and len({line.count("|") for line in lines}) == 1
    assert lines[2].startswith("| 58.5938 | exact | 1.0000 |")


def test_jobs_are_those_of_the_configs() -> None:
    models = [settings["model"]["from_config"] for settings in JOBS.values()]
    assert [(m["num_hidden_layers"], m["vocab_size"]) for m in models] == [(32, 128256), (40, 32000)]
