"""Saving: the best checkpoints stay beside the newest."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest


@pytest.mark.parametrize(
    ("losses", "keep_best", "kept", "best"),
    [
        ([3.0, 2.0, 4.0, 5.0], 1, [2, 4], 2),
        ([3.0, 2.0, 4.0, 5.0], 2, [1, 2, 4], 2),
        ([3.0, 2.0, 1.0], 1, [3], 3),
        ([2.0, 2.0, 2.0], 1, [1, 3], 1),
        ([2.0, None, 3.0], 2, [1, 3], 1),
    ],
)
def test_the_best_are_kept_beside_the_newest(
    tmp_path: Path,
    losses: list[float | None],
    keep_best: int,
    kept: list[int],
    best: int,
    steps: Callable[[Path], list[int]],
    pointer: Callable[[Path, str], int],
    save_losses: Callable[..., None],
) -> None:
    save_losses(tmp_path, losses, keep_best=keep_best)
    assert steps(tmp_path) == kept
    assert (pointer(tmp_path, "latest"), pointer(tmp_path, "best")) == (len(losses), best)


def test_of_another_metric_more_is_better(
    tmp_path: Path, save: Callable[..., Path], steps: Callable[[Path], list[int]], pointer: Callable[[Path, str], int]
) -> None:
    for step, accuracy in enumerate([0.3, 0.9, 0.5], start=1):
        save(
            tmp_path,
            step,
            keep_last=1,
            keep_best=1,
            best_metric="accuracy",
            evaluation={"loss": 1.0 / step, "accuracy": accuracy},
        )
    assert (steps(tmp_path), pointer(tmp_path, "best")) == ([2, 3], 2)


def test_without_evaluations_or_without_keeping_them_there_is_no_best(
    tmp_path: Path, save: Callable[..., Path], names: Callable[[Path], list[str]], pointer: Callable[[Path, str], int]
) -> None:
    save(tmp_path, 1, keep_best=1)
    assert names(tmp_path) == ["latest", "step-00000001"]
    save(tmp_path, 2, evaluation={"loss": 2.0}, keep_best=1)
    assert pointer(tmp_path, "best") == 2
    save(tmp_path, 3, evaluation={"loss": 1.0})
    assert names(tmp_path) == ["latest", "step-00000002", "step-00000003"]


def test_saved_again_with_its_evaluation_a_step_becomes_the_best(
    tmp_path: Path,
    save: Callable[..., Path],
    steps: Callable[[Path], list[int]],
    pointer: Callable[[Path, str], int],
    save_losses: Callable[..., None],
) -> None:
    save_losses(tmp_path, [2.0, 3.0], keep_best=1)
    save(tmp_path, 3, keep_last=1, keep_best=1)
    save(tmp_path, 3, keep_last=1, keep_best=1, evaluation={"loss": 1.0})
    assert (steps(tmp_path), pointer(tmp_path, "best")) == ([3], 3)
