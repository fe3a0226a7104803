"""Which checkpoints are the best: those with the best figure of an evaluation made at their step."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from framework.checkpoint.layout import Checkpoint, list_checkpoints


def is_better(figure: float, other: float, metric: str) -> bool:
    """Whether a figure is strictly better than another: lower for `loss`, higher for every other metric."""
    return figure < other if metric == "loss" else figure > other


def best_first(checkpoints: Iterable[Checkpoint], metric: str) -> list[Checkpoint]:
    """The checkpoints whose step was evaluated, with a finite figure, best first; among equals the earlier step first.

    Args:
        checkpoints: Of one run.
        metric: Name of a figure in their manifests' `evaluation`.
    """
    figures = [(_figure(checkpoint, metric), checkpoint) for checkpoint in checkpoints]
    evaluated = [(figure, checkpoint) for figure, checkpoint in figures if figure is not None]
    sign = 1 if metric == "loss" else -1
    return [checkpoint for _, checkpoint in sorted(evaluated, key=lambda pair: (sign * pair[0], pair[1].step))]


def best_checkpoint(run_dir: Path, metric: str) -> Checkpoint | None:
    """The best of a run's complete checkpoints; None if the step of none was evaluated."""
    complete, _ = list_checkpoints(run_dir)
    return next(iter(best_first(complete, metric)), None)


def is_among_best(run_dir: Path, figure: float | None, metric: str, count: int) -> bool:
    """Whether a step that is not saved yet would be one of the `count` best of a run, not just equal to the last one.

    Args:
        run_dir: The run directory.
        figure: Of the step's evaluation; None if it is not finite.
        metric: The figure's name.
        count: 0 for none.
    """
    if figure is None or count == 0:
        return False
    complete, _ = list_checkpoints(run_dir)
    ranked = best_first(complete, metric)[:count]
    if len(ranked) < count:
        return True
    last = _figure(ranked[-1], metric)
    assert last is not None
    return is_better(figure, last, metric)


def _figure(checkpoint: Checkpoint, metric: str) -> float | None:
    return (checkpoint.evaluation or {}).get(metric)
