"""What a model is worth on the evaluation set."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from framework.data import Batch
from framework.sharding.protocol import Engine
from framework.sharding.ranks import Ranks
from framework.training.loss import evaluation_loss
from framework.training.metrics import EvalRecord
from framework.training.objective import move


def evaluate(
    engine: Engine, ranks: Ranks, batches: Iterable[Batch], *, step: int, interrupted: Callable[[], bool]
) -> EvalRecord | None:
    """Evaluate the engine's model, which is in training mode before and after.

    Args:
        engine: holds the model.
        ranks: of the run.
        batches: this rank's share of the evaluation set.
        step: optimiser steps done.
        interrupted: asked before each batch whether to give up; must answer the same on every rank.

    Returns:
        The means over all ranks' batches; None if it was given up.
    """
    total, count = torch.zeros((), dtype=torch.float64, device=engine.device), 0
    correct: Tensor | None = None
    engine.model.eval()
    try:
        for batch in batches:
            if interrupted():
                return None
            with engine.autocast():
                result = evaluation_loss(engine.model, move(batch.inputs, engine.device))
            total += result.loss
            count += result.labels
            if result.correct is not None:
                correct = result.correct if correct is None else correct + result.correct
    finally:
        engine.model.train()
    if interrupted():
        return None
    labels, loss, right = ranks.sum([count, float(total), 0.0 if correct is None else float(correct)])
    return EvalRecord(step, loss / labels, int(labels), None if correct is None else right / labels)
