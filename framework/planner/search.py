"""The plan to take: the best candidates under a budget, by the objective that was asked for. Must not import torch.

Memory and step time are given as laws and may be of any form, but for this: neither falls when the ratio alone rises.
So a free ratio is found by bisection, to one part in a million.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

from framework.config.sections import PlannerConfig
from framework.planner.choice import Choice
from framework.planner.ledger import Ledger
from framework.planner.space import Candidate

PARTS = 1_000_000
"""Ratios that are found are multiples of its inverse, so that they do not depend on where a bisection starts."""

NEAR_MISS = 1.1
"""Bytes of a plan that just missed / the budget, at most."""


@dataclass(frozen=True)
class Laws:
    """What a choice takes.

    Attributes:
        memory: its ledger.
        seconds: its time for one optimiser step.
        known: those of some candidates that the other two know.
        linears: names of linear layers, in the order in which to retain them.
    """

    memory: Callable[[Choice], Ledger]
    seconds: Callable[[Choice], float]
    known: Callable[[Sequence[Candidate]], Sequence[Candidate]] = lambda space: space
    linears: Sequence[str] = ()


@dataclass(frozen=True)
class Budget:
    """What a rank may take.

    Attributes:
        bytes: of the device.
        host_bytes: of the host, for one rank; None for no bound.
        demand: what of a ledger counts against `bytes`, such as the allocated peak and a margin.
    """

    bytes: int
    host_bytes: int | None = None
    demand: Callable[[Ledger], int] = lambda ledger: ledger.peak

    def holds(self, ledger: Ledger) -> bool:
        """Whether a rank with this ledger stays within the budget."""
        on_host = self.host_bytes is None or ledger.host_bytes <= self.host_bytes
        return on_host and self.demand(ledger) <= self.bytes


@dataclass(frozen=True)
class Point:
    """A choice and what it takes: its ledger, and seconds for one optimiser step."""

    choice: Choice
    ledger: Ledger
    seconds: float


@dataclass(frozen=True)
class Found:
    """What a search has found.

    Attributes:
        points: that fit, the best first; none if nothing fits.
        fastest_seconds: step time of the fastest permitted plan with unlimited memory.
        within_bound: the points are at most `max_slowdown` times slower than that, or no such bound was asked for.
        missed: the fastest of the plans that would have been better than the first point and take at most `NEAR_MISS`
            times the budget; None if there is none.
        objective: that was asked for.
        max_slowdown: the bound, as in the config.
    """

    points: tuple[Point, ...]
    fastest_seconds: float
    within_bound: bool
    missed: Point | None
    objective: str
    max_slowdown: float

    @property
    def fits(self) -> bool:
        """Whether any plan does."""
        return bool(self.points)

    def slowdown(self, point: Point) -> float:
        """Step time / that of the fastest permitted plan with unlimited memory."""
        return point.seconds / self.fastest_seconds


def search(
    space: Sequence[Candidate], laws: Laws, budget: Budget, options: PlannerConfig, *, labelled_share: float
) -> Found:
    """Find the best plans.

    A plan that fits is better, by the objective,

    * `fidelity`: if its gradient is more faithful, which is: if its ratio is larger (see `Choice.faithful_ratio` for
      coarse keys and values); then if it is faster;
    * `balanced`: likewise, among the plans that are at most `options.max_slowdown` times slower than the fastest
      permitted plan with unlimited memory. If none is, as with `speed`;
    * `speed`: if it is faster; then if its ratio is larger. A smaller ratio is always faster, so those below the
      labelled share count only if nothing else fits, and then the larger ratio is better: with them a step would train
      on fewer tokens than carry labels. The same holds for the fastest permitted plan.

    Of plans that are equal in this, one that retains nothing on the host is better, then the one with the smaller
    demand, then the one that comes earlier in the space, where the simplest comes first.

    Args:
        space: from `candidates`; not empty.
        laws: of memory and time.
        budget: of a rank.
        options: objective, slowdown, and how many plans to find.
        labelled_share: labelled tokens / all tokens of the data.
    """
    run = _Search(space, laws, budget, options.top, labelled_share)
    bound = options.max_slowdown * run.fastest if options.objective == "balanced" else math.inf
    by_speed = options.objective == "speed"
    points = run.by_speed() if by_speed else run.by_fidelity(bound)
    within_bound = bool(points) or options.objective != "balanced"
    if not within_bound:
        points, bound, by_speed = run.by_speed(), math.inf, True
    missed = run.missed(points[0] if points else None, bound, by_speed)
    return Found(tuple(points), run.fastest, within_bound, missed, options.objective, options.max_slowdown)


def largest_ratio(candidate: Candidate, allowed: Callable[[Choice], bool], at_least: float = 0.0) -> float | None:
    """The largest ratio of a candidate that is allowed.

    Args:
        candidate: whose ratio is sought.
        allowed: whether a choice is; if it is, it is with every smaller ratio.
        at_least: smaller ratios are of no interest.

    Returns:
        The ratio: the candidate's lowest or highest one, `at_least`, or a multiple of 1 / `PARTS`. None if none of at
        least `at_least` is allowed.
    """
    if allowed(candidate.choice):
        return candidate.choice.ratio
    bottom = max(candidate.lowest, at_least)
    if bottom >= candidate.choice.ratio or not allowed(candidate.at(bottom)):
        return None
    low, high = math.floor(bottom * PARTS), math.ceil(candidate.choice.ratio * PARTS)
    while high - low > 1:
        middle = (low + high) // 2
        if allowed(candidate.at(middle / PARTS)):
            low = middle
        else:
            high = middle
    return max(bottom, low / PARTS)


_Key = tuple[float, float, bool, int, int]
"""By which points are sorted."""


class _Search:
    """Candidates and what was computed of their points."""

    def __init__(
        self, space: Sequence[Candidate], laws: Laws, budget: Budget, count: int, labelled_share: float
    ) -> None:
        self.space, self.laws, self.budget, self.count = space, laws, budget, count
        self.ledgers: dict[Choice, Ledger] = {}
        self.times: dict[Choice, float] = {}
        # Each candidate with its smallest ratio of at least the labelled share.
        self.fast = [each.at(max(each.lowest, min(labelled_share, each.choice.ratio))) for each in space]
        self.fastest = min(map(self.seconds, self.fast))

    def seconds(self, choice: Choice) -> float:
        if choice not in self.times:
            self.times[choice] = self.laws.seconds(choice)
        return self.times[choice]

    def ledger(self, choice: Choice) -> Ledger:
        if choice not in self.ledgers:
            self.ledgers[choice] = self.laws.memory(choice)
        return self.ledgers[choice]

    def point(self, choice: Choice) -> Point:
        return Point(choice, self.ledger(choice), self.seconds(choice))

    def fits(self, choice: Choice, bound: float) -> bool:
        return self.seconds(choice) <= bound and self.budget.holds(self.ledger(choice))

    def _rest(self, point: Point, index: int) -> tuple[bool, int, int]:
        """What decides between points that are as faithful and as fast."""
        return point.choice.placement == "host", self.budget.demand(point.ledger), index

    def by_fidelity(self, bound: float) -> list[Point]:
        """The best points within a bound of seconds: the largest ratio first, then the fastest."""
        best: list[tuple[_Key, Point]] = []
        for index, candidate in enumerate(self.space):
            # What is not as faithful as the last of enough points needs no bisection.
            at_least = best[-1][1].choice.faithful_ratio if len(best) == self.count else 0.0
            ratio = largest_ratio(candidate, partial(self.fits, bound=bound), at_least)
            if ratio is None:
                continue
            point = self.point(candidate.at(ratio))
            key = -point.choice.faithful_ratio, point.seconds, *self._rest(point, index)
            best.append((key, point))
            best = sorted(best, key=lambda entry: entry[0])[: self.count]
        return [point for _, point in best]

    def by_speed(self) -> list[Point]:
        """The best points: the fastest first, then the largest ratio."""
        points: list[tuple[_Key, Point]] = []
        order = sorted(range(len(self.space)), key=lambda index: self.seconds(self.fast[index]))
        for index in order:
            seconds = self.seconds(self.fast[index])
            if len(points) >= self.count and seconds > points[self.count - 1][1].seconds:
                break
            if not self.fits(self.fast[index], math.inf):
                continue
            # Where a larger ratio takes no longer, it is taken.
            ratio = largest_ratio(self.space[index], partial(self.fits, bound=seconds), self.fast[index].ratio)
            assert ratio is not None
            point = self.point(self.space[index].at(ratio))
            key = seconds, -point.choice.faithful_ratio, *self._rest(point, index)
            points.append((key, point))
        best = [point for _, point in sorted(points, key=lambda entry: entry[0])[: self.count]]
        return best or self.by_fidelity(math.inf)

    def missed(self, chosen: Point | None, bound: float, by_speed: bool) -> Point | None:
        """The fastest plan that just missed the budget and would have been chosen instead."""

        def better(choice: Choice) -> bool:
            if chosen is None:
                return True
            if by_speed or choice.faithful_ratio == chosen.choice.faithful_ratio:
                return self.seconds(choice) < chosen.seconds
            return choice.faithful_ratio > chosen.choice.faithful_ratio

        near = Budget(math.floor(self.budget.bytes * NEAR_MISS), self.budget.host_bytes, self.budget.demand)
        whole = [candidate.choice for candidate in self.space]
        for choice in sorted(dict.fromkeys([*whole, *self.fast]), key=self.seconds):
            if self.seconds(choice) <= bound and better(choice):
                ledger = self.ledger(choice)
                if near.holds(ledger) and not self.budget.holds(ledger):
                    return self.point(choice)
        return None
