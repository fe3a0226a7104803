"""Plans beside what a simulation of their step gives. Must not import torch."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass

from rich.console import Console
from rich.table import Table

from framework.config import Config
from framework.errors import UserError
from framework.planner.apart import run_apart
from framework.planner.plan import Plan

GIB = 1 << 30

DIFFERENCE = 0.02
"""Between a prediction and a simulation: more is reported."""


@dataclass(frozen=True)
class Check:
    """A prediction and a simulation of the first rank's peak.

    Attributes:
        predicted: bytes of tensors at the peak, from the ledger.
        simulated: bytes of the peak.
        phase: in which the simulated step has it.
        seconds: that the simulation took.
    """

    predicted: int
    simulated: int
    phase: str
    seconds: float

    @property
    def difference(self) -> float:
        """Of the prediction, relative to the simulation; negative where it is below."""
        return self.predicted / self.simulated - 1

    @property
    def agrees(self) -> bool:
        """Whether they differ by at most `DIFFERENCE`."""
        return abs(self.difference) <= DIFFERENCE


def checks_of(plans: Sequence[Plan], labelled_share: float) -> list[Check]:
    """Simulate a step of each plan, one after the other in a process of their own.

    Args:
        plans: to check; none of their weights are read.
        labelled_share: labelled tokens / all tokens of the data.

    Raises:
        UserError: a step cannot be simulated.
        RunError: a simulation failed.
    """
    runs = [(plan.config, plan.point.choice.ranks) for plan in plans]
    found = simulated_peaks(runs, labelled_share)
    return [
        Check(plan.point.ledger.tensors, max(peaks.values()), max(peaks, key=peaks.__getitem__), seconds)
        for plan, (peaks, seconds) in zip(plans, found, strict=True)
    ]


def simulated_peaks(runs: Sequence[tuple[Config, int]], labelled_share: float) -> list[tuple[dict[str, int], float]]:
    """Bytes of the peak of each phase of a step, and the seconds that its simulation took.

    Args:
        runs: configs without open keys, and their numbers of ranks.
        labelled_share: as for `checks_of`.

    Raises:
        UserError: a step cannot be simulated.
        RunError: a simulation failed.
    """
    # What is not given may depend on what is: it stays not given.
    configs = [json.loads(config.model_dump_json(exclude_unset=True)) for config, _ in runs]
    asked = [
        {"config": config, "ranks": ranks, "labelled_share": labelled_share}
        for config, (_, ranks) in zip(configs, runs, strict=True)
    ]
    answers = run_apart("framework.planner.simulate", asked, failure="the simulation of a step failed")
    reasons = dict.fromkeys(answer["reason"] for answer in answers if "reason" in answer)
    if reasons:
        raise UserError("\n".join(reasons))
    return [(answer["peaks"], answer["seconds"]) for answer in answers]


def print_checks(checks: Sequence[Check], console: Console) -> None:
    """Print a table of the plans' checks, and what is to be known of those that differ."""
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="bold", title="simulated", title_justify="left")
    table.add_column("")
    for name in ("predicted\nGiB", "simulated\nGiB", "difference", "took\ns"):
        table.add_column(name, justify="right", no_wrap=True, vertical="top")
    table.add_column("highest in")
    for number, check in enumerate(checks, start=1):
        sizes = (f"{size / GIB:.2f}" for size in (check.predicted, check.simulated))
        style = "" if check.agrees else "bold red"
        row = (str(number), *sizes, f"{check.difference:+.2%}", f"{check.seconds:.0f}", check.phase)
        table.add_row(*row, style=style)
    console.print(table)
    for number, check in enumerate(checks, start=1):
        if not check.agrees:
            side = "above" if check.difference > 0 else "below"
            words = f"plan {number}: the ledger is {abs(check.difference):.1%} {side} what its step allocates"
            console.print(f"{words}; trust the simulation", style="bold red", highlight=False)
