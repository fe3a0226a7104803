"""The learning rate as a pure function of the step, so that a resumed run needs no scheduler state."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from framework.config import Config


def scheduled_rate(config: Config, step: int) -> float:
    """The learning rate of step 1 to `training.max_steps` of a run."""
    max_steps, ratio = config.training.max_steps, config.schedule.warmup_ratio
    return learning_rate(
        step,
        peak=config.optimizer.learning_rate,
        kind=config.schedule.kind,
        warmup_steps=config.schedule.warmup_steps if ratio is None else math.ceil(ratio * max_steps),
        max_steps=max_steps,
        final_ratio=config.schedule.final_ratio,
    )


def learning_rate(step: int, *, peak: float, kind: str, warmup_steps: int, max_steps: int, final_ratio: float) -> float:
    """The learning rate of one optimiser step.

    Rises linearly to `peak`, which step `warmup_steps` (or step 1 without warm-up) has, then falls to
    `final_ratio * peak`, which step `max_steps` has.

    Args:
        step: number of the step, 1 to `max_steps`.
        peak: the largest learning rate.
        kind: `constant`, `linear` or `cosine`, the shape of the fall.
        warmup_steps: steps of the rise; 0 for none.
        max_steps: number of the last step.
        final_ratio: last learning rate over `peak`; a constant schedule ignores it.

    Raises:
        ValueError: unknown kind.
    """
    if step < warmup_steps:
        return peak * step / warmup_steps
    if kind == "constant":
        return peak
    top = max(warmup_steps, 1)
    progress = (step - top) / (max_steps - top) if max_steps > top else 0.0
    if kind == "linear":
        height = 1.0 - progress
    elif kind == "cosine":
        height = 0.5 * (1.0 + math.cos(math.pi * progress))
    else:
        raise ValueError(f"schedule.kind: {kind!r} is none of constant, linear, cosine")
    return peak * (final_ratio + (1.0 - final_ratio) * height)
