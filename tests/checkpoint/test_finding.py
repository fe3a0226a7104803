"""Finding a checkpoint to resume from, damage, config differences, metrics cut back."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from pathlib import Path

import pytest

from framework.checkpoint import (
    compare_configs,
    find_best,
    find_checkpoint,
    find_step,
    save_checkpoint,
    truncate_metrics,
)
from framework.errors import UserError


def write_weights(directory: Path, size: int) -> list[Path]:
    (directory / "weights").write_bytes(bytes(size))
    return [directory / "weights"]


def save(run_dir: Path, step: int, evaluation: dict[str, float | None] | None = None) -> Path:
    return save_checkpoint(
        run_dir,
        step,
        write_shards=lambda directory: write_weights(directory, step),
        state={"step": step},
        manifest={"evaluation": evaluation},
        keep_last=9,
    )


def cut(path: Path) -> None:
    (path / "weights").write_bytes(b"x")


def remove(path: Path) -> None:
    (path / "state.pt").unlink()


def no_manifest(path: Path) -> None:
    (path / "manifest.json").unlink()


def half_manifest(path: Path) -> None:
    text = (path / "manifest.json").read_text()
    (path / "manifest.json").write_text(text[: len(text) // 2])


def other_format(path: Path) -> None:
    manifest = json.loads((path / "manifest.json").read_text())
    (path / "manifest.json").write_text(json.dumps({**manifest, "format": 99}))


DAMAGES = [
    (cut, "weights has 1 bytes instead of 20"),
    (remove, "state.pt is missing"),
    (no_manifest, "manifest.json is missing"),
    (half_manifest, "manifest.json cannot be read"),
    (other_format, "it has format 99, this version reads 2"),
]


@pytest.mark.parametrize(("damage", "reason"), DAMAGES)
def test_damaged_checkpoint_is_skipped_with_the_reason(
    tmp_path: Path, damage: Callable[[Path], None], reason: str, caplog: pytest.LogCaptureFixture
) -> None:
    save(tmp_path, 10)
    damage(save(tmp_path, 20))
    with caplog.at_level(logging.WARNING):
        found = find_checkpoint(tmp_path)
    assert found is not None and found.step == 10 and found.load_state() == {"step": 10}
    assert f"step-00000020: {reason}" in caplog.text


def test_only_damaged_checkpoints_are_an_error_and_not_a_new_start(tmp_path: Path) -> None:
    cut(save(tmp_path, 20))
    with pytest.raises(UserError, match=r"(?s)every checkpoint is damaged; start over with --resume none.*weights has"):
        find_checkpoint(tmp_path)
    assert find_checkpoint(tmp_path, "none") is None


def test_nothing_to_resume(tmp_path: Path) -> None:
    assert find_checkpoint(tmp_path / "new") is None
    save(tmp_path, 1)
    assert find_checkpoint(tmp_path, "none") is None


def test_finding_changes_nothing(tmp_path: Path) -> None:
    save(tmp_path, 1)
    (tmp_path / "checkpoints" / ".step-00000002.tmp").mkdir()
    before = sorted(tmp_path.rglob("*"))
    find_checkpoint(tmp_path)
    assert sorted(tmp_path.rglob("*")) == before


def test_directory_of_a_checkpoint_or_of_a_run(tmp_path: Path) -> None:
    first, second = save(tmp_path / "a", 1), save(tmp_path / "a", 2)
    for given, step in ((first, 1), (second, 2), (tmp_path / "a", 2)):
        found = find_checkpoint(tmp_path / "b", str(given))
        assert found is not None and found.step == step


def test_directory_that_is_no_checkpoint_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"--resume: .* is not a directory"):
        find_checkpoint(tmp_path, str(tmp_path / "nowhere"))
    with pytest.raises(UserError, match=r"is not a complete checkpoint: manifest\.json is missing"):
        find_checkpoint(tmp_path, str(tmp_path))
    path = save(tmp_path, 20)
    cut(path)
    with pytest.raises(UserError, match="is not a complete checkpoint: weights has 1 bytes"):
        find_checkpoint(tmp_path, str(path))


def test_step_is_found_or_the_complete_ones_are_named(tmp_path: Path) -> None:
    for step in (10, 20, 30):
        save(tmp_path, step)
    assert find_step(tmp_path, 20).step == 20
    assert find_step(tmp_path, None).step == 30
    cut(tmp_path / "checkpoints" / "step-00000020")
    with pytest.raises(UserError, match=r"(?s)no checkpoint of step 20; complete ones: 10, 30\ndamaged: .*weights has"):
        find_step(tmp_path, 20)
    with pytest.raises(UserError, match="no checkpoint; complete ones: none"):
        find_step(tmp_path / "new", None)


def test_the_best_is_found_by_its_evaluation_and_not_by_the_pointer(tmp_path: Path) -> None:
    for step, evaluation in ((10, {"loss": 2.0}), (20, {"loss": 1.0}), (30, {"loss": None}), (40, None)):
        save(tmp_path, step, evaluation=evaluation)
    (tmp_path / "checkpoints" / "best").write_text("step-00000010\n")
    assert find_best(tmp_path, "loss").step == 20
    cut(tmp_path / "checkpoints" / "step-00000020")
    assert find_best(tmp_path, "loss").step == 10
    with pytest.raises(UserError, match=r"(?s)none of its 3 checkpoints .* finite accuracy.*damaged: .*weights has"):
        find_best(tmp_path, "accuracy")


def test_differences_of_configs_are_lines() -> None:
    saved = {
        "optimizer": {"learning_rate": 0.001, "betas": [0.9, 0.95]},
        "model": {"adapter": None},
        "same": 1,
        "old": 1,
    }
    current = {
        "optimizer": {"learning_rate": 0.0003, "betas": [0.9, 0.99]},
        "model": {"adapter": {"rank": 4}},
        "same": 1,
        "new": {"key": 2},
    }
    assert compare_configs(saved, current) == [
        "optimizer.learning_rate: 0.001 -> 0.0003",
        "optimizer.betas: [0.9, 0.95] -> [0.9, 0.99]",
        'model.adapter: null -> {"rank": 4}',
        "old: 1 -> (absent)",
        'new: (absent) -> {"key": 2}',
    ]
    assert compare_configs(saved, saved) == []


def test_metrics_are_cut_back_to_the_step(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    lines = [json.dumps({"kind": "train", "step": step, "loss": 1.0 / step}) for step in range(1, 6)]
    lines.insert(3, json.dumps({"kind": "eval", "step": 3, "loss": 0.5}))
    path.write_text("\n".join(lines) + '\n{"kind": "train", "st')
    truncate_metrics(path, 3)
    assert path.read_text().splitlines() == lines[:4]
    assert path.read_text().endswith("\n")
    truncate_metrics(path, 0)
    assert path.read_text() == ""


def test_metrics_with_a_half_written_character_or_none_at_all(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    truncate_metrics(path, 3)
    assert not path.exists()
    path.write_bytes(b'{"step": 1}\n{"step": 2, "note": "\xc3')
    truncate_metrics(path, 3)
    assert path.read_text() == '{"step": 1}\n'
