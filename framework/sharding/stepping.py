"""What engines share of an optimiser step: judging it, clipping, and learning rates."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from framework.sharding.loss_scale import LossScale
from framework.sharding.protocol import StepResult

EPSILON = 1e-6
"""Added to the norm that gradients are divided by, as `torch.nn.utils.clip_grad_norm_` does."""


def clip_factor(norm: float, max_norm: float | None) -> float:
    """What gradients of a norm are multiplied with, so that it is at most `max_norm`; 1 for no bound."""
    return 1.0 if max_norm is None else min(1.0, max_norm / (norm + EPSILON))


def judged_step(loss: float, norm: float, scale: LossScale | None, update: Callable[[], None]) -> StepResult:
    """Make an update unless something is not finite, and let the loss scale follow.

    Args:
        loss: of the window, over all ranks.
        norm: of its gradients over all ranks, without the loss scale.
        scale: None without loss scaling.
        update: makes the update.
    """
    used = None if scale is None else scale.value
    loss_finite, norm_finite = math.isfinite(loss), math.isfinite(norm)
    finite = loss_finite and norm_finite
    if finite:
        update()
    too_large = scale is not None and scale.follow(loss_finite=loss_finite, gradients_finite=norm_finite)
    return StepResult(loss, norm, finite=finite or too_large, skipped=not finite, loss_scale=used)


def clipped_step(
    optimizer: torch.optim.Optimizer,
    gradients: list[Tensor],
    scale: LossScale | None,
    *,
    loss: float,
    norm: float,
    max_grad_norm: float | None,
    learning_rate: float,
) -> StepResult:
    """A judged step of an optimiser whose gradients, still multiplied with the loss scale, are clipped in place."""
    factor = clip_factor(norm, max_grad_norm) / (1.0 if scale is None else scale.value)

    def update() -> None:
        if gradients and factor != 1.0:
            torch._foreach_mul_(gradients, factor)
        set_learning_rate(optimizer.param_groups, learning_rate)
        optimizer.step()

    return judged_step(loss, norm, scale, update)


def set_learning_rate(groups: Iterable[dict[str, Any]], learning_rate: float) -> None:
    """Give every parameter group its learning rate, a multiple of the step's if it has a scale."""
    for group in groups:
        group["lr"] = learning_rate * group.get("learning_rate_scale", 1.0)
