"""The factor that keeps small gradients of float16 from being lost, and how it follows the gradients."""

from __future__ import annotations

from collections.abc import Mapping

from framework.config import LossScaleConfig


class LossScale:
    """What losses are multiplied with before their backward pass, and gradients are divided by after it.

    Doubled after `growth_interval` updates in a row without overflow, halved by an overflow, down to `minimum`, as
    torch's `GradScaler` does. It decides on the host, from numbers that all ranks share, so it is the same on each.

    Args:
        setting: `optimizer.loss_scale`: a constant, or how the scale moves; None for the defaults of the latter.

    Attributes:
        value: the factor now.
    """

    def __init__(self, setting: float | LossScaleConfig | None = None) -> None:
        self._moves = not isinstance(setting, float)
        self._config = setting if isinstance(setting, LossScaleConfig) else LossScaleConfig()
        self.value = setting if isinstance(setting, float) else self._config.initial
        self._steps_without_overflow = 0

    def follow(self, *, loss_finite: bool, gradients_finite: bool) -> bool:
        """Move on after a step, and say whether a smaller scale is the answer to its gradients.

        A loss that is not finite is no matter of the scale and leaves it as it is, as an overflow does that finds the
        scale constant or at its minimum.

        Args:
            loss_finite: whether the step's loss was.
            gradients_finite: whether the global norm of its gradients was.

        Returns:
            True if the gradients overflowed and the scale has become smaller.
        """
        if not self._moves or not loss_finite:
            return False
        if gradients_finite:
            self._steps_without_overflow += 1
            if self._steps_without_overflow >= self._config.growth_interval:
                self.value *= 2
                self._steps_without_overflow = 0
            return False
        if self.value <= self._config.minimum:
            return False
        self.value = max(self.value / 2, self._config.minimum)
        self._steps_without_overflow = 0
        return True

    def state_dict(self) -> dict[str, float]:
        """Where the scale has got to, by the names of `GradScaler`."""
        return {"scale": self.value, "_growth_tracker": self._steps_without_overflow}

    def load_state_dict(self, state: Mapping[str, float]) -> None:
        """Go on from where a scale has got to; how it moves stays this run's setting."""
        if self._moves:
            self.value = max(state["scale"], self._config.minimum)
            self._steps_without_overflow = int(state["_growth_tracker"])
