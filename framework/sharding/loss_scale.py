"""The loss scale of float16, as plain numbers on the host; it moves as `torch.amp.GradScaler` does."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass
class LossScale:
    """What losses are multiplied with, the same on every rank.

    Attributes:
        value: now.
        minimum: it falls no lower.
        growth_interval: steps in a row without overflow after which it is doubled; None for a constant scale.
        steady: such steps so far.
    """

    value: float
    minimum: float = 1.0
    growth_interval: int | None = None
    steady: int = 0

    @property
    def can_fall(self) -> bool:
        """Whether a smaller scale is an answer to gradients that overflow."""
        return self.growth_interval is not None and self.value > self.minimum

    def grow(self) -> None:
        """A step without overflow."""
        if self.growth_interval is None:
            return
        self.steady += 1
        if self.steady == self.growth_interval:
            self.value, self.steady = 2 * self.value, 0

    def fall(self) -> None:
        """A step whose overflow the scale answers."""
        self.value, self.steady = max(self.value / 2, self.minimum), 0

    def state_dict(self) -> dict[str, Any]:
        """In the words of `GradScaler.state_dict`."""
        return {"scale": self.value, "_growth_tracker": self.steady}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where a checkpoint has got to; how the scale moves, or that it is constant, is this run's setting."""
        if self.growth_interval is not None and "scale" in state:
            self.value = max(state["scale"], self.minimum)
            self.steady = state["_growth_tracker"]
