"""What a model is worth on the evaluation set."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from framework.data import Batch
from framework.sharding.protocol import Engine
from framework.sharding.ranks import Ranks
from framework.training.loss import chunks_for, evaluation_loss
from framework.training.metrics import EvalRecord
from framework.training.objective import move


def evaluate(
    engine: Engine, ranks: Ranks, batches: Iterable[Batch], *, step: int, interrupted: Callable[[], bool]
) -> EvalRecord | None:
    """Evaluate the engine's model, which is in training mode before and after.

    Args:
        engine: holds the model.
        ranks: that share the evaluation set.
        batches: this rank's share, as many as every other rank's.
        step: optimiser steps done.
        interrupted: asked before each batch whether this rank wants to give up; all do if one does.

    Returns:
        The means over all ranks' batches; None if it was given up.
    """
    total, count = torch.zeros((), dtype=torch.float64, device=engine.device), 0
    correct: Tensor | None = None
    engine.model.eval()
    try:
        for batch in batches:
            give_up, rows = ranks.max([float(interrupted()), batch.supervised_tokens])
            if give_up:
                return None
            with engine.autocast():
                result = evaluation_loss(engine.model, move(batch.inputs, engine.device), chunks_for(int(rows)))
            if not batch.counts:
                continue
            total += result.loss
            count += result.labels
            if result.correct is not None:
                correct = result.correct if correct is None else correct + result.correct
    finally:
        engine.model.train()
    if ranks.any(interrupted()):
        return None
    # A rank may have had nothing but stand-ins.
    loss, labels, found, classifies = ranks.sum(
        [float(total), count, 0.0 if correct is None else float(correct), float(correct is not None)]
    )
    return EvalRecord(step, loss / labels, int(labels), found / labels if classifies else None)
