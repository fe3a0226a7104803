"""The tasks `retrieval` and `transfer`: whether a skill that lives in the context's keys is learnt, and kept.

`retrieval` starts from random weights. `transfer` starts from a model that retrieves over a short gap, trained exactly
on one set of keys, and goes on with longer gaps and, as `--keys` says, with keys that it has never seen.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Any

import numpy as np
from quality_arms import LABELLED, ORDINARY, Arm, Training, selective
from quality_bench import Bench, Cell, best_cells, spread
from quality_retrieval import PAD, PAIRS, QUESTIONS, VOCABULARY, RetrievalSizes, answers, draw, joined
from torch import nn

ARMS = (
    ORDINARY,
    LABELLED,
    selective("supervised, r = .25", "supervised", 0.25),
    selective("supervised, r = .5", "supervised", 0.5),
    selective("supervised, r = .75", "supervised", 0.75),
    selective("supervised, r = .25, correction 1", "supervised", 0.25, correction=1.0),
    selective("suffix, r = .5", "suffix", 0.5),
)
POINTS = 8
"""Evaluations in the course of a training, evenly spaced, besides those after equal time and equal steps."""
WARMUP = 20
"""Steps of it; the rate is constant from there, so that equal time and equal steps are points of one training."""
EVALUATED = 200
"""Documents of each kind that are reported, and as many others that choose the rate."""


class SkillBench(Bench):
    """A retrieval task.

    Args:
        args: the command line.
        task: `retrieval` or `transfer`.
    """

    def __init__(self, args: argparse.Namespace, task: str) -> None:
        self.transfer = task == "transfer"
        keys = args.keys if self.transfer else "same"
        gaps: Sequence[int] = args.gaps
        train = joined([draw(gap, args.documents, seed=0, keys=keys) for gap in gaps])
        self.tuning = [draw(gap, EVALUATED, seed=1, keys=keys) for gap in gaps]
        self.reported = {f"gap {gap}": draw(gap, EVALUATED, seed=2, keys=keys) for gap in gaps}
        if self.transfer:
            self.reported[f"start's, gap {args.start_gap}"] = draw(args.start_gap, EVALUATED, seed=2)
        sizes = RetrievalSizes(args.hidden, args.depth, VOCABULARY, args.batch, args.sequence, PAD)
        settings = {
            "gaps": list(gaps),
            "start_gap": args.start_gap,
            "documents": args.documents,
            "pairs": PAIRS,
            "questions": QUESTIONS,
        } | ({"keys": keys} if self.transfer else {})
        super().__init__(args, task, sizes, ARMS, train, settings)

    def train_start(self, model: nn.Module, seed: int) -> None:
        """Exactly, on the short gap; nothing for `retrieval`."""
        if self.transfer:
            data = joined([draw(self.args.start_gap, self.args.documents, seed=3)])
            training = Training(model, Arm("start"), self.sizes, data, seed)
            self.watch(training, f"start, seed {seed}", self.args.start_steps, self.args.start_rate)

    def scores(self, model: nn.Module) -> dict[str, Any]:
        """Share of right answers for each kind of document."""
        return {"accuracy": {kind: answers(model, documents)[0] for kind, documents in self.reported.items()}}

    def train_cell(self, training: Training, name: str, steps: int, rate: float) -> dict[str, Any]:
        """To equal time or equal steps, whichever is later; scores at both, and in between."""
        equal_steps: int = self.args.ordinary_steps
        last = max(steps, equal_steps)
        points = {round(last * point / POINTS) for point in range(1, POINTS + 1)} | {steps, equal_steps}
        curve: dict[int, dict[str, Any]] = {}
        for step in training.run(last, rate, kind="constant", warmup=WARMUP):
            if step in points:
                curve[step] = self.scores(training.model)["accuracy"]
        return {
            "tuning_loss": float(np.mean([answers(training.model, documents)[1] for documents in self.tuning])),
            "equal_time": curve[steps],
            "equal_steps": curve[equal_steps],
            "curve": [[step, curve[step]] for step in sorted(curve)],
        }

    def report(self) -> str:
        """Accuracy of each arm after equal time and after equal steps, as a markdown table."""
        kinds = list(self.reported)
        lines = [
            f"| arm | step time | steps | with gradient | rate | {' | '.join(kinds)} | {' | '.join(kinds)} |",
            f"|{' --- |' + ' ---: |' * (4 + 2 * len(kinds))}",
        ]
        for name, row in best_cells(self.results).items():
            first = row[0]
            after = [f"{_of(row, when, kind)}" for when in ("equal_time", "equal_steps") for kind in kinds]
            lines.append(
                f"| {name} | {self.relative_time(name):.2f} | {first['steps']} | {first['selected_share']:.2f} "
                f"| {first['rate']:g} | {' | '.join(after)} |"
            )
        settings = self.results["settings"]
        budget = settings["ordinary_steps"]
        scored = [each["accuracy"] for each in self.results["start"].values()]
        start = ", ".join(f"{_spread_of([each[kind] for each in scored])} ({kind})" for kind in kinds)
        lines += [
            "",
            f"Share of right answers, mean ± standard deviation over {len(self.args.seeds)} seeds, after the time of "
            f"{budget} ordinary steps, and then after {budget} steps; at the start {start}; any one of the prompt's "
            f"values is right in {1 / PAIRS:.2f} or more; {settings['labelled_share']:.1%} of the tokens carry labels.",
        ]
        return "\n".join(lines)


def _of(row: Sequence[Cell], when: str, kind: str) -> str:
    return _spread_of([cell[when][kind] for cell in row])


def _spread_of(values: Sequence[float]) -> str:
    return spread(values, digits=2)
