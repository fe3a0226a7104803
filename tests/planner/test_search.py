"""The search against exhaustive ones over a fine grid, with laws that can be checked by hand."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import pytest
from open_job import open_job
from toy_laws import TOY, MiB

from framework.config import Config
from framework.config.sections import PlannerConfig
from framework.planner.choice import FIDELITIES, Choice
from framework.planner.ledger import Ledger, everywhere
from framework.planner.search import Budget, Found, Laws, largest_ratio, search
from framework.planner.space import SMALLEST_RATIO, Candidate, candidates

SHARE = 0.25
GRID = 200
UNLIMITED = 1 << 50
BUDGETS = [UNLIMITED] + [round(20_000 * MiB * 0.9**step) for step in range(32)]


class GridPoint(NamedTuple):
    """What a brute force compares."""

    ratio: float
    faithful: float
    peak: int
    seconds: float


@dataclass
class Sought:
    """A space and all its points on a grid."""

    space: list[Candidate]
    points: list[GridPoint]

    def find(self, budget: int, **options: Any) -> Found:
        return search(self.space, TOY, Budget(budget), PlannerConfig(**options), labelled_share=SHARE)

    @property
    def fastest(self) -> float:
        """Of the plans that are no less than the labelled tokens: the reference of slowdowns."""
        return min(point.seconds for point in self.points if point.ratio >= SHARE)


def sought(config: Config, ranks: int = 8) -> Sought:
    nodes = 2 if ranks > 1 else 1
    space = candidates(config, ranks=ranks, nodes=nodes, labelled_share=SHARE, linears=TOY.linears)
    points = []
    for candidate in space:
        ratios = {candidate.lowest, candidate.choice.ratio}
        if candidate.lowest < candidate.choice.ratio:
            ratios |= {step / GRID for step in range(1, GRID) if step / GRID >= candidate.lowest}
        choices = [candidate.at(ratio) for ratio in sorted(ratios)]
        points += [
            GridPoint(choice.ratio, choice.faithful_ratio, TOY.memory(choice).peak, TOY.seconds(choice))
            for choice in choices
        ]
    return Sought(space, points)


@pytest.fixture(params=["supervised", "uniform"], scope="module")
def both(request: pytest.FixtureRequest) -> Sought:
    return sought(open_job(selection__strategy=request.param, training__micro_batch_size=2))


@pytest.mark.parametrize("max_slowdown", [1.0, 1.2, 1.5, 2.5])
@pytest.mark.parametrize("objective", ["balanced", "fidelity", "speed"])
def test_no_plan_of_the_grid_is_better(both: Sought, objective: str, max_slowdown: float) -> None:
    for budget in BUDGETS:
        found = both.find(budget, objective=objective, max_slowdown=max_slowdown)
        fitting = [point for point in both.points if point.peak <= budget]
        assert found.fits == bool(fitting)
        assert found.fastest_seconds == pytest.approx(both.fastest)
        if not fitting:
            continue
        chosen = found.points[0]
        assert chosen.ledger == TOY.memory(chosen.choice) and chosen.seconds == TOY.seconds(chosen.choice)
        assert all(point.ledger.peak <= budget for point in found.points)
        bound = max_slowdown * both.fastest
        within = [point for point in fitting if point.seconds <= bound]
        if objective == "balanced":
            assert found.within_bound == bool(within)
        faithful = {"balanced": within, "fidelity": fitting, "speed": []}[objective]
        if faithful:
            best = max(point.faithful for point in faithful)
            assert best <= chosen.choice.faithful_ratio <= best + 1 / GRID
            if best in (1.0, SHARE):
                same = [point.seconds for point in faithful if point.faithful == chosen.choice.faithful_ratio]
                assert not same or chosen.seconds <= min(same)
        else:
            labelled = [point for point in fitting if point.ratio >= SHARE]
            if labelled:
                assert chosen.seconds == min(point.seconds for point in labelled)
            else:
                best = max(point.faithful for point in fitting)
                assert best <= chosen.choice.faithful_ratio <= best + 1 / GRID


@pytest.mark.parametrize(("max_slowdown", "starts_exact"), [(1.5, False), (2.0, True)])
def test_as_the_budget_falls_so_does_fidelity(both: Sought, max_slowdown: float, starts_exact: bool) -> None:
    found = [both.find(budget, max_slowdown=max_slowdown) for budget in BUDGETS]
    kept = [each.points[0].choice for each in found if each.fits and each.within_bound]
    assert len(kept) > 8
    ranks = [FIDELITIES.index(choice.fidelity(SHARE)) for choice in kept]
    assert ranks == sorted(ranks)
    ratios = [choice.faithful_ratio for choice in kept]
    assert ratios == sorted(ratios, reverse=True)
    assert (ratios[0] == 1.0) == starts_exact and ratios[-1] < 1.0
    assert any(SHARE < ratio < 1 for ratio in ratios)
    # Once nothing is within the bound, or nothing fits, less memory does not help.
    states = [(each.fits, each.fits and each.within_bound) for each in found]
    assert states == sorted(states, reverse=True)
    assert states[-1] == (False, False)


def test_just_below_what_a_plan_takes_another_is_chosen(both: Sought) -> None:
    for budget in BUDGETS[1:30:3]:
        before = both.find(budget)
        if not (before.fits and before.within_bound):
            continue
        chosen = before.points[0]
        assert both.find(chosen.ledger.peak).points[0] == chosen
        after = both.find(chosen.ledger.peak - 1)
        assert after.points == () or after.points[0].choice != chosen.choice
        if after.fits and after.within_bound:
            assert after.points[0].choice.faithful_ratio <= chosen.choice.faithful_ratio


def test_exact_is_chosen_if_and_only_if_it_is_within_the_bound() -> None:
    plans = sought(open_job(training__micro_batch_size=2))
    exact = min(point.seconds for point in plans.points if point.ratio == 1)
    threshold = exact / plans.fastest
    assert 1.2 < threshold < 2
    within = plans.find(UNLIMITED, max_slowdown=threshold * (1 + 1e-9)).points[0]
    assert (within.choice.fidelity(SHARE), within.seconds) == ("exact", exact)
    beyond = plans.find(UNLIMITED, max_slowdown=threshold * (1 - 1e-6)).points[0]
    assert beyond.choice.fidelity(SHARE) == "context detached"
    assert SHARE < beyond.choice.ratio < 1
    assert plans.find(UNLIMITED, objective="fidelity", max_slowdown=1.0).points[0] == within
    fastest = plans.find(UNLIMITED, objective="speed").points[0]
    assert (fastest.choice.ratio, fastest.seconds) == (SHARE, plans.fastest)


def test_where_nothing_is_within_the_bound_the_fastest_that_fits_is_chosen() -> None:
    plans = sought(open_job(training__micro_batch_size=2))
    smallest = min(point.peak for point in plans.points)
    found = plans.find(smallest, max_slowdown=1.0)
    assert not found.within_bound
    fitting = [point for point in plans.points if point.peak <= smallest]
    assert found.points[0].seconds == min(point.seconds for point in fitting) > plans.fastest


@pytest.mark.parametrize("objective", ["balanced", "fidelity", "speed"])
def test_the_list_is_the_best_of_all(both: Sought, objective: str) -> None:
    budget = 20_000 * MiB
    all_of_them = both.find(budget, objective=objective, top=len(both.space)).points
    assert len(all_of_them) > 6
    assert both.find(budget, objective=objective, top=6).points == all_of_them[:6]
    shuffled = Sought(both.space[::-1], both.points).find(budget, objective=objective, top=6).points
    assert [(each.choice.ratio, each.seconds) for each in shuffled] == [
        (each.choice.ratio, each.seconds) for each in all_of_them[:6]
    ]


def flat(
    peak: Callable[[Choice], int] = lambda choice: 1, seconds: Callable[[Choice], float] = lambda choice: 1.0
) -> Laws:
    return Laws(lambda choice: Ledger((everywhere("all", peak(choice)),)), seconds)


@pytest.mark.parametrize("objective", ["balanced", "fidelity", "speed"])
def test_of_equal_plans_the_smaller_and_then_the_simpler_is_chosen(objective: str) -> None:
    space = candidates(open_job(), ranks=1, nodes=1, labelled_share=SHARE)

    def chosen(laws: Laws) -> Choice:
        found = search(
            space, laws, Budget(9), PlannerConfig.model_validate({"objective": objective}), labelled_share=SHARE
        )
        return found.points[0].choice

    simplest = chosen(flat())
    assert (simplest.engine, simplest.policy, simplest.micro_batch_size, simplest.ratio) == ("single", "all", 64, 1.0)
    smallest = chosen(flat(lambda choice: 1 if choice.zero_stage == 2 and choice.policy == "checkpoint" else 2))
    assert (smallest.zero_stage, smallest.policy, smallest.micro_batch_size) == (2, "checkpoint", 64)


@pytest.mark.parametrize("objective", ["balanced", "fidelity", "speed"])
def test_the_device_is_preferred_where_both_fit_and_are_equally_fast(objective: str) -> None:
    config = open_job(retention__policy="selective", retention__placement="auto", selection__ratio=0.5)
    space = candidates(config, ranks=1, nodes=1, labelled_share=SHARE)
    options = PlannerConfig.model_validate({"objective": objective})
    laws = flat(lambda choice: 1 if choice.placement == "host" else 3)

    def chosen(budget: int) -> str:
        return search(space, laws, Budget(budget), options, labelled_share=SHARE).points[0].choice.placement

    assert (chosen(3), chosen(2)) == ("device", "host")


@pytest.mark.parametrize(("larger", "chosen"), [(0.05, "int8"), (0.2, "int4")])
def test_coarse_keys_and_values_have_to_be_worth_it(
    larger: float, chosen: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("framework.planner.space.KV_FORMATS", ("model", "int8", "int4"))
    config = open_job(retention__policy="auto", selection__strategy="uniform", training__micro_batch_size=2)
    space = candidates(config, ranks=8, nodes=1, labelled_share=SHARE)
    largest = {"model": 0.3, "int8": 0.5, "int4": 0.5 + larger}

    def peak(choice: Choice) -> int:
        fits = choice.policy == "selective" and choice.ratio <= largest[choice.kv_format]
        return 1 if fits else 2

    found = search(space, flat(peak), Budget(1), PlannerConfig(objective="fidelity"), labelled_share=SHARE)
    assert (found.points[0].choice.kv_format, found.points[0].choice.ratio) == (chosen, largest[chosen])


def test_memory_is_spent_on_as_many_linear_layers_as_fit() -> None:
    config = open_job(
        selection__ratio=0.5,
        retention__policy="selective",
        retention__retain_linears="auto",
        sharding__engine="fsdp",
        sharding__zero_stage=...,
        training__micro_batch_size=8,
    )
    plans = sought(config)
    chosen = []
    for candidate in sorted(plans.space, key=lambda each: TOY.memory(each.choice).peak):
        point = plans.find(TOY.memory(candidate.choice).peak).points[0]
        assert point.choice == candidate.choice
        chosen.append(point.choice.retain_linears)
    assert chosen == [False, ("wide",), ("wide", "middle"), True]


def test_speed_takes_a_larger_ratio_where_it_costs_nothing() -> None:
    config = open_job(retention__policy="selective", training__micro_batch_size=2)
    space = candidates(config, ranks=8, nodes=1, labelled_share=SHARE)
    laws = flat(lambda choice: round(100 * choice.ratio), lambda choice: max(0.5, choice.ratio))
    found = search(space, laws, Budget(1000), PlannerConfig(objective="speed"), labelled_share=SHARE)
    assert (found.points[0].choice.ratio, found.fastest_seconds) == (0.5, 0.5)


def test_a_fixed_ratio_is_kept() -> None:
    plans = sought(open_job(selection__ratio=0.5, training__micro_batch_size=2))
    for budget in (UNLIMITED, 20_000 * MiB):
        assert {point.choice.ratio for point in plans.find(budget, top=100).points} == {0.5}


@pytest.mark.parametrize("threshold", [0.001, 0.25, 0.2500001, 0.333333, 0.75, 0.9999999])
def test_the_largest_ratio_does_not_depend_on_where_it_is_sought(threshold: float) -> None:
    config = open_job(selection__strategy="uniform", retention__policy="selective")
    candidate = candidates(config, ranks=8, nodes=1, labelled_share=SHARE)[0]

    def allowed(choice: Choice) -> bool:
        return choice.ratio <= threshold

    ratio = largest_ratio(candidate, allowed)
    assert ratio is not None and threshold - 1e-6 < ratio <= threshold
    for at_least in (0.0, SMALLEST_RATIO, 0.2, ratio):
        if at_least <= ratio:
            assert largest_ratio(candidate, allowed, at_least) == ratio
    assert largest_ratio(candidate, allowed, threshold + 1e-6) is None
    assert largest_ratio(candidate, lambda choice: True) == 1.0
    assert largest_ratio(candidate, lambda choice: False) is None


def test_a_host_has_a_budget_too() -> None:
    config = open_job(sharding__offload_optimizer=True, training__micro_batch_size=2)
    plans = sought(config)
    needed = sorted({TOY.memory(candidate.choice).host_bytes for candidate in plans.space})
    assert len(needed) == 1 and needed[0] > 0
    options = PlannerConfig()
    for host, fits in ((needed[0], True), (needed[0] - 1, False)):
        found = search(plans.space, TOY, Budget(UNLIMITED, host), options, labelled_share=SHARE)
        assert found.fits == fits


def test_what_counts_against_the_budget_is_the_callers_to_say() -> None:
    plans = sought(open_job(training__micro_batch_size=2))
    with_margin = Budget(20_000 * MiB, demand=lambda ledger: ledger.peak + 5_000 * MiB)
    found = search(plans.space, TOY, with_margin, PlannerConfig(), labelled_share=SHARE)
    assert found.points == plans.find(15_000 * MiB).points


@pytest.mark.parametrize("objective", ["balanced", "fidelity", "speed"])
def test_what_just_missed_would_have_been_chosen_with_a_little_more(both: Sought, objective: str) -> None:
    seen = 0
    for budget in [round(20_000 * MiB * 0.95**step) for step in range(50)]:
        found = both.find(budget, objective=objective)
        if found.missed is None:
            continue
        seen += 1
        missed = found.missed
        assert budget < missed.ledger.peak <= 1.1 * budget
        richer = both.find(missed.ledger.peak, objective=objective)
        if found.fits and objective == "speed":
            assert missed.seconds < found.points[0].seconds
        if found.fits and found.within_bound and objective != "speed":
            assert missed.choice.faithful_ratio >= found.points[0].choice.faithful_ratio
        assert richer.fits
    assert seen >= 2


def test_laws_are_asked_a_few_times_for_each_candidate() -> None:
    calls: dict[str, set[Choice]] = {"memory": set(), "seconds": set()}

    def memory(choice: Choice) -> Ledger:
        calls["memory"].add(choice)
        return TOY.memory(choice)

    def seconds(choice: Choice) -> float:
        calls["seconds"].add(choice)
        return TOY.seconds(choice)

    config = open_job(training__global_batch_size=8 * 5040)
    space = candidates(config, ranks=8, nodes=2, labelled_share=SHARE)
    assert len(space) == 8 * 6 * 60
    for budget, objective in itertools.product((UNLIMITED, 20_000 * MiB), ("balanced", "fidelity", "speed")):
        for seen in calls.values():
            seen.clear()
        options = PlannerConfig.model_validate({"objective": objective})
        search(space, Laws(memory, seconds), Budget(budget), options, labelled_share=SHARE)
        assert len(calls["memory"]) < 3 * len(space)
        assert len(calls["seconds"]) < 3 * len(space)
