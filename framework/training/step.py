"""One optimiser step on an accumulation window."""

from __future__ import annotations

import torch
from torch.profiler import record_function

from framework.data import Batch
from framework.sharding.protocol import Engine, StepResult
from framework.sharding.ranks import Ranks
from framework.training.objective import Objective


def train_window(
    engine: Engine, ranks: Ranks, objective: Objective, window: list[Batch], rate: float, max_grad_norm: float | None
) -> tuple[StepResult, int]:
    """One optimiser step on an accumulation window; returns its result and this rank's number of selected tokens."""
    selections = [objective.select(batch) for batch in window]
    # Counted over all micro-batches and ranks before the first of them runs: the loss does not depend on the split.
    counts = [objective.denominator(*pair) for pair in zip(window, selections, strict=True)]
    count = max(1, int(ranks.sum([sum(counts)])[0]))
    total = torch.zeros((), device=engine.device)
    selected = 0
    for batch, selection in zip(window, selections, strict=True):
        with record_function("forward"), engine.autocast():
            loss = objective.loss(engine.model, batch, selection, count)
        with record_function("backward"):
            engine.backward(loss)
        total += loss.detach()
        selected += batch.tokens if selection is None else selection.selected_tokens
    with record_function("optimizer step"):
        return engine.step(loss=total, max_grad_norm=max_grad_norm, learning_rate=rate), selected
