"""Steps that are not finite: how many were skipped, and what to say of them."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from framework.data import Batch, Dataset
from framework.sharding.protocol import StepResult
from framework.sharding.ranks import Ranks


@dataclass
class SkippedSteps:
    """Steps without an update.

    Attributes:
        total: all of the run, those included in which a float16 loss scale became smaller.
        in_a_row: not finite, and without an update since.
    """

    total: int = 0
    in_a_row: int = 0

    def count(self, result: StepResult) -> None:
        """Take in one step. An overflow that the loss scale answers neither adds to those in a row nor ends them."""
        self.total += result.skipped
        if not result.finite:
            self.in_a_row += 1
        elif not result.skipped:
            self.in_a_row = 0


def describe_non_finite(step: int, result: StepResult, window: list[Batch], data: Dataset, ranks: Ranks) -> str:
    """What was seen of a step, with its samples as their sources count them, which is what a person can look up.

    Args:
        step: its number.
        result: of the step.
        window: this rank's micro-batches of it.
        data: the training set.
        ranks: that share the window; all call this.
    """
    own = torch.cat([batch.documents.flatten() for batch in window]).unique().tolist()
    draws = sorted({draw for drawn in ranks.gather(own) for draw in drawn})
    listed = data.named(draw % len(data) for draw in draws if draw >= 0)
    scale = ""
    if result.loss_scale is not None and math.isfinite(result.loss):
        scale = f" at a loss scale of {result.loss_scale:g}, which falls no lower (optimizer.loss_scale)"
    return (
        f"step {step}: the loss is {result.loss} and the norm of the gradient {result.grad_norm}{scale}; samples of "
        f"data.train in this step, counted from 0: {listed}"
    )
