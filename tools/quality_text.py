"""The task `text`: instruction pairs, labels on the answers; loss on held-out pairs after the same measured time."""

from __future__ import annotations

import argparse
from typing import Any

from quality_arms import LABELLED, ORDINARY, Arm, Sizes, Training, evaluate, selective
from quality_bench import Bench, best_cells, spread
from quality_data import ANSWER_SHARES, QualityData, prepare
from torch import nn

ARMS = (
    ORDINARY,
    Arm("checkpointed", policy="checkpoint"),
    Arm("half the sequences", sequences=0.5),
    LABELLED,
    selective("supervised, r = .5", "supervised", 0.5),
    selective("supervised, r = .75", "supervised", 0.75),
    selective("supervised, r = .5, correction .5", "supervised", 0.5, correction=0.5),
    selective("supervised, r = .5, correction 1", "supervised", 0.5, correction=1.0),
    selective("suffix, r = .25", "suffix", 0.25),
    selective("uniform, r = .25", "uniform", 0.25),
    selective("bernoulli, r = .25", "bernoulli", 0.25),
    selective("bernoulli, r = .25, correction 1", "bernoulli", 0.25, correction=1.0),
)


class TextBench(Bench):
    """Fine-tuning on another kind of text than the starting point's.

    Args:
        args: the command line.
    """

    def __init__(self, args: argparse.Namespace) -> None:
        self.data: QualityData = prepare(args.data, args.output, sequence_length=args.sequence)
        data = self.data
        settings = {
            "answer_shares": list(ANSWER_SHARES),
            "pairs": {"train": len(data.train), "tuning": len(data.tuning), "report": len(data.report)},
        }
        sizes = Sizes(args.hidden, args.depth, data.vocabulary, args.batch, args.sequence, data.pad_token_id)
        super().__init__(args, "text", sizes, ARMS, data.train, settings)

    def train_start(self, model: nn.Module, seed: int) -> None:
        """On every token of the other kind of text."""
        training = Training(model, Arm("start"), self.sizes, self.data.start, seed)
        self.watch(training, f"start, seed {seed}", self.args.start_steps, self.args.start_rate)

    def scores(self, model: nn.Module) -> dict[str, Any]:
        """Loss on the evaluation pairs, in nats."""
        return {"loss": evaluate(model, self.data.report, self.sizes)}

    def train_cell(self, training: Training, name: str, steps: int, rate: float) -> dict[str, Any]:
        """All steps of a cosine schedule."""
        self.watch(training, name, steps, rate)
        tuning = evaluate(training.model, self.data.tuning, self.sizes)
        return {"labels": training.labels, "tuning_loss": tuning, **self.scores(training.model)}

    def report(self) -> str:
        """The finished arms as a markdown table."""
        rows = best_cells(self.results)
        reference = {cell["seed"]: cell["loss"] for cell in rows.get(LABELLED.name, [])}
        lines = [
            "| arm | step time | steps | with gradient | labels trained | rate | loss (nats) | above labelled only |",
            "| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
        ]
        for name, row in rows.items():
            differences = [cell["loss"] - reference[cell["seed"]] for cell in row if cell["seed"] in reference]
            first = row[0]
            lines.append(
                f"| {name} | {self.relative_time(name):.2f} | {first['steps']} | {first['selected_share']:.2f} "
                f"| {first['labels'] / 1000:.1f} k | {first['rate']:g} | {spread([cell['loss'] for cell in row])} "
                f"| {spread(differences, sign='+')} |"
            )
        start = spread([scores["loss"] for scores in self.results["start"].values()])
        share = self.results["settings"]["labelled_share"]
        lines += [
            "",
            f"Mean ± standard deviation over {len(self.args.seeds)} seeds; before fine-tuning {start} nats; "
            f"{share:.1%} of the tokens carry labels; step time in units of `ordinary`'s.",
        ]
        return "\n".join(lines)
