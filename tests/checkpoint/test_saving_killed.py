"""Saving: whatever kills it, the last complete checkpoint stays."""

from __future__ import annotations

import os
import shutil
import signal
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from framework.checkpoint import (
    find_best,
    find_checkpoint,
    publishing,
    remove_leftovers,
    save_checkpoint,
    saving,
    update_pointers,
)
from framework.checkpoint.tensor_files import write_tensors

NEW_IS_LOST = [
    "while writing a shard",
    "before the state",
    "before the manifest",
    "while writing the manifest",
    "before the rename",
]


NEW_IS_KEPT = [
    "after the rename, before latest",
    "while moving latest",
    "before best",
    "while moving best",
    "before pruning",
    "while pruning",
    "after everything",
]


def patch_to_die(point: str, step: int) -> Callable[[Path], list[Path]]:
    """Make this process, a child, die at one point of the save; gives its `write_shards`."""

    def die(*_: Any, **__: Any) -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    def write_shards(directory: Path) -> list[Path]:
        path = directory / "model.safetensors"
        write_tensors(path, {"value": torch.full((64,), 2000.0 + step)})
        if point == "while writing a shard":
            (directory / "optimizer.safetensors").write_bytes(b"half of it")
            die()
        return [path]

    def half_manifest(path: Path, data: bytes) -> None:
        write_synced(path, data[: len(data) // 2] if path.name == "manifest.json" else data)
        if path.name == "manifest.json":
            die()

    def rename(path: Path, target: Path) -> Path:
        return die() if path.name.endswith(".tmp") else original_rename(path, target)

    def replace(path: Path, target: Path) -> Path:
        moved = {"while moving latest": ".latest.tmp", "while moving best": ".best.tmp"}
        return die() if path.name == moved[point] else original_replace(path, target)

    def rmtree(path: Path, **_: Any) -> None:
        (path / "model.safetensors").unlink()
        die()

    def prune_and_die(*arguments: Any) -> None:
        original_prune(*arguments)
        die()

    write_synced, original_prune = publishing.write_synced, saving.prune
    original_rename, original_replace = Path.rename, Path.replace
    patches: dict[str, tuple[Any, str, Any]] = {
        "while writing a shard": (publishing, "_LIBRARIES", ()),
        "before the state": (saving, "write_state", die),
        "before the manifest": (saving, "write_manifest", die),
        "while writing the manifest": (publishing, "write_synced", half_manifest),
        "before the rename": (saving, "publish", die),
        "between the renames": (Path, "rename", rename),
        "after the rename, before latest": (saving, "move_latest", die),
        "while moving latest": (Path, "replace", replace),
        "before best": (saving, "move_best", die),
        "while moving best": (Path, "replace", replace),
        "before pruning": (saving, "prune", die),
        "while pruning": (shutil, "rmtree", rmtree),
        "after everything": (saving, "prune", prune_and_die),
    }
    setattr(*patches[point])
    return write_shards


def kill_while_saving(run_dir: Path, point: str, step: int, loss: float = 1.0, keep_last: int = 2) -> None:
    """Save values of 2000 + step and an evaluation in a child process that is killed at `point`."""
    with warnings.catch_warnings():
        # A child that only writes files is safe beside the threads of the test runner.
        warnings.simplefilter("ignore", DeprecationWarning)
        child = os.fork()
    if child == 0:
        try:
            save_checkpoint(
                run_dir,
                step,
                write_shards=patch_to_die(point, step),
                state={"value": 2000 + step},
                manifest={"tokens": 2000 + step, "evaluation": {"loss": loss}},
                keep_last=keep_last,
                keep_best=1,
            )
        finally:
            os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL


@pytest.mark.parametrize("point", NEW_IS_LOST)
def test_killed_before_the_rename_the_former_checkpoint_counts(
    tmp_path: Path,
    point: str,
    save: Callable[..., Path],
    content: Callable[..., tuple[int, int]],
    names: Callable[[Path], list[str]],
) -> None:
    for step in (1, 2):
        save(tmp_path, step)
    kill_while_saving(tmp_path, point, 3)
    assert content(find_checkpoint(tmp_path)) == (2, 1002)
    assert ".step-00000003.tmp" in names(tmp_path)
    remove_leftovers(tmp_path)
    assert names(tmp_path) == ["latest", "step-00000001", "step-00000002"]
    save(tmp_path, 3)
    assert content(find_checkpoint(tmp_path)) == (3, 1003)


@pytest.mark.parametrize("point", NEW_IS_KEPT)
def test_killed_after_the_rename_the_new_checkpoint_counts(
    tmp_path: Path,
    point: str,
    save: Callable[..., Path],
    content: Callable[..., tuple[int, int]],
    names: Callable[[Path], list[str]],
) -> None:
    for step in (1, 2):
        save(tmp_path, step)
    kill_while_saving(tmp_path, point, 3)
    assert content(find_checkpoint(tmp_path)) == (3, 2003)
    save(tmp_path, 4)
    assert content(find_checkpoint(tmp_path)) == (4, 1004)
    assert [name for name in names(tmp_path) if "step" in name] == ["step-00000003", "step-00000004"]
    assert (tmp_path / "checkpoints" / "latest").read_text() == "step-00000004\n"


@pytest.mark.parametrize("point", [*NEW_IS_LOST, "between the renames", *NEW_IS_KEPT])
def test_killed_while_replacing_the_only_checkpoint(
    tmp_path: Path,
    point: str,
    save: Callable[..., Path],
    content: Callable[..., tuple[int, int]],
    names: Callable[[Path], list[str]],
) -> None:
    save(tmp_path, 1)
    kill_while_saving(tmp_path, point, 1)
    expected = 2001 if point in NEW_IS_KEPT else 1001
    assert content(find_checkpoint(tmp_path)) == (1, expected)
    remove_leftovers(tmp_path)
    assert content(find_checkpoint(tmp_path)) == (1, expected)
    assert [name for name in names(tmp_path) if "step" in name] == ["step-00000001"]


# Step 2 is the best so far and not among the newest; the save of step 4 is killed.
@pytest.mark.parametrize("loss", [1.0, 9.0], ids=["a new best", "no new best"])
@pytest.mark.parametrize("point", [*NEW_IS_LOST, *NEW_IS_KEPT])
def test_killed_anywhere_the_best_of_what_is_complete_is_there(
    tmp_path: Path,
    point: str,
    loss: float,
    save: Callable[..., Path],
    steps: Callable[[Path], list[int]],
    pointer: Callable[[Path, str], int],
    save_losses: Callable[..., None],
) -> None:
    save_losses(tmp_path, [4.0, 2.0, 3.0], keep_best=1)
    kill_while_saving(tmp_path, point, 4, loss=loss, keep_last=1)
    saved = point in NEW_IS_KEPT
    best = 4 if saved and loss == 1.0 else 2
    assert find_best(tmp_path, "loss").step == best
    named = pointer(tmp_path, "best")
    assert (tmp_path / "checkpoints" / f"step-{named:08d}" / "manifest.json").exists()
    # What the next start does.
    remove_leftovers(tmp_path)
    update_pointers(tmp_path, keep_best=1, best_metric="loss")
    assert (pointer(tmp_path, "latest"), pointer(tmp_path, "best")) == (4 if saved else 3, best)
    save(tmp_path, 5, keep_last=1, keep_best=1, evaluation={"loss": 7.0})
    assert (steps(tmp_path), pointer(tmp_path, "best")) == ([best, 5], best)


def test_first_save_killed_leaves_nothing_to_resume(tmp_path: Path, names: Callable[[Path], list[str]]) -> None:
    kill_while_saving(tmp_path, "before the rename", 1)
    assert find_checkpoint(tmp_path) is None
    remove_leftovers(tmp_path)
    assert names(tmp_path) == []
