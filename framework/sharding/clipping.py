"""Gradient clipping by the global norm. Must not import torch."""

from __future__ import annotations

EPSILON = 1e-6
"""Added to the norm that gradients are divided by, as `torch.nn.utils.clip_grad_norm_` does."""


def clip_factor(norm: float, max_norm: float | None) -> float:
    """What gradients of a norm are multiplied with, so that it is at most `max_norm`; 1 for no bound."""
    return 1.0 if max_norm is None else min(1.0, max_norm / (norm + EPSILON))
