"""Which checkpoints are the best."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from framework.checkpoint.layout import Checkpoint
from framework.checkpoint.ranking import best_checkpoint, best_first, is_among_best, is_better
from framework.checkpoint.saving import save_checkpoint


def checkpoint(step: int, **evaluation: float | None) -> Checkpoint:
    return Checkpoint(path=Path(f"step-{step}"), step=step, manifest={"evaluation": evaluation or None})


def test_lower_is_better_for_the_loss_and_higher_for_everything_else() -> None:
    assert is_better(1.0, 2.0, "loss") and not is_better(2.0, 1.0, "loss") and not is_better(1.0, 1.0, "loss")
    assert is_better(2.0, 1.0, "accuracy") and not is_better(1.0, 2.0, "accuracy")


@pytest.mark.parametrize(("metric", "order"), [("loss", [3, 1, 4]), ("accuracy", [4, 1, 3]), ("f1", [])])
def test_order(metric: str, order: list[int]) -> None:
    checkpoints = [
        checkpoint(4, loss=2.0, accuracy=0.9),
        checkpoint(3, loss=1.0, accuracy=0.5),
        checkpoint(1, loss=2.0, accuracy=0.5),
        checkpoint(2, loss=None, accuracy=None),
        checkpoint(5),
    ]
    assert [found.step for found in best_first(checkpoints, metric)] == order


def save(run_dir: Path, step: int, evaluation: dict[str, Any] | None) -> None:
    save_checkpoint(
        run_dir,
        step,
        write_shards=lambda directory: [],
        state={},
        manifest={"evaluation": evaluation},
        keep_last=9,
    )


def test_a_step_is_among_the_best_if_it_is_better_than_the_last_of_them(tmp_path: Path) -> None:
    assert is_among_best(tmp_path, 9.0, "loss", 2)
    for step, loss in enumerate([3.0, 2.0, 5.0], start=1):
        save(tmp_path, step, {"loss": loss})
    expected = {1.0: True, 2.5: True, 3.0: False, 4.0: False, None: False}
    assert {loss: is_among_best(tmp_path, loss, "loss", 2) for loss in expected} == expected
    assert is_among_best(tmp_path, 9.0, "loss", 4)
    assert not is_among_best(tmp_path, 1.0, "loss", 0)


def test_the_best_of_a_run(tmp_path: Path) -> None:
    assert best_checkpoint(tmp_path, "loss") is None
    save(tmp_path, 1, None)
    assert best_checkpoint(tmp_path, "loss") is None
    for step, loss in ((2, 2.0), (3, 1.0), (4, 1.0)):
        save(tmp_path, step, {"loss": loss})
    best = best_checkpoint(tmp_path, "loss")
    assert best is not None and best.step == 3
