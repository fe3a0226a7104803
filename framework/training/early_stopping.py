"""Ending a run whose evaluations no longer improve."""

from __future__ import annotations

from typing import Any

from framework.checkpoint import is_better
from framework.config import EarlyStoppingConfig


class EarlyStopping:
    """Counts the evaluations since the last improvement; what it counted is saved with the run.

    Attributes:
        evaluations: in a row without improvement.
    """

    def __init__(self, settings: EarlyStoppingConfig | None) -> None:
        """Start without an evaluation; with None it never ends a run."""
        self._settings = settings
        self._best: float | None = None
        self._best_step = 0
        self.evaluations = 0

    def observe(self, step: int, figures: dict[str, float | None]) -> None:
        """Take in one evaluation. A figure that is not finite is no improvement.

        Args:
            step: optimiser steps done.
            figures: of the evaluation, by name.
        """
        if self._settings is None:
            return
        figure = figures[self._settings.metric]
        if figure is not None and (self._best is None or self._improves(figure, self._best)):
            self._best, self._best_step, self.evaluations = figure, step, 0
        else:
            self.evaluations += 1

    def reason(self) -> str | None:
        """Why training ends here; None if it goes on."""
        if self._settings is None or self.evaluations < self._settings.patience:
            return None
        best = "was never finite" if self._best is None else f"was best at step {self._best_step}, {self._best:.6g}"
        return (
            f"the evaluation {self._settings.metric} {best}, and did not improve in the {self.evaluations} evaluations "
            "after it (training.early_stopping)"
        )

    def state_dict(self) -> dict[str, Any] | None:
        """What a resumed run needs, of plain values; None where nothing is counted."""
        if self._settings is None:
            return None
        return {
            "metric": self._settings.metric,
            "best": self._best,
            "best_step": self._best_step,
            "evaluations": self.evaluations,
        }

    def load_state_dict(self, state: dict[str, Any] | None) -> None:
        """Go on counting. What was counted of another metric, or not at all, is left; the patience is this run's."""
        if self._settings is not None and state is not None and state["metric"] == self._settings.metric:
            self._best, self._best_step = state["best"], state["best_step"]
            self.evaluations = state["evaluations"]

    def _improves(self, figure: float, best: float) -> bool:
        assert self._settings is not None
        gained = -self._settings.min_delta if self._settings.metric == "loss" else self._settings.min_delta
        return is_better(figure, best + gained, self._settings.metric)
