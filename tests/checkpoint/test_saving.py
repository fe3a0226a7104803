"""Saving: whatever kills it, and wherever the disk fills up, the last complete checkpoint stays."""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
import subprocess
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from framework.checkpoint import (
    Checkpoint,
    find_best,
    find_checkpoint,
    remove_leftovers,
    save_checkpoint,
    saving,
    update_pointers,
)
from framework.checkpoint.weights import write_tensors
from framework.errors import RunError

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


def patch_to_die(point: str, step: int) -> Callable[[Path], None]:
    """Make this process, a child, die at one point of the save; gives its `write_shards`."""

    def die(*_: Any, **__: Any) -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    def write_shards(directory: Path) -> None:
        write_tensors(directory / "model.safetensors", {"value": torch.full((64,), 2000.0 + step)})
        if point == "while writing a shard":
            (directory / "optimizer.safetensors").write_bytes(b"half of it")
            die()

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

    write_synced, original_prune = saving.write_synced, saving._prune
    original_rename, original_replace = Path.rename, Path.replace
    patches: dict[str, tuple[Any, str, Any]] = {
        "while writing a shard": (saving, "_LIBRARIES", ()),
        "before the state": (saving, "_write_state", die),
        "before the manifest": (saving, "_write_manifest", die),
        "while writing the manifest": (saving, "write_synced", half_manifest),
        "before the rename": (saving, "_publish", die),
        "between the renames": (Path, "rename", rename),
        "after the rename, before latest": (saving, "_move_latest", die),
        "while moving latest": (Path, "replace", replace),
        "before best": (saving, "_move_best", die),
        "while moving best": (Path, "replace", replace),
        "before pruning": (saving, "_prune", die),
        "while pruning": (shutil, "rmtree", rmtree),
        "after everything": (saving, "_prune", prune_and_die),
    }
    setattr(*patches[point])
    return write_shards


def save(
    run_dir: Path,
    step: int,
    *,
    keep_last: int = 2,
    value: int | None = None,
    size: int = 64,
    evaluation: dict[str, float | None] | None = None,
    **best: Any,
) -> Path:
    value = 1000 + step if value is None else value

    def write_shards(directory: Path) -> None:
        write_tensors(directory / "model.safetensors", {"value": torch.full((size,), float(value))})

    return save_checkpoint(
        run_dir,
        step,
        write_shards=write_shards,
        state={"value": value, "generator": torch.get_rng_state()},
        manifest={"tokens": value, "evaluation": evaluation},
        keep_last=keep_last,
        **best,
    )


def content(checkpoint: Checkpoint | None) -> tuple[int, int]:
    """Step and value of a checkpoint, after checking that all its parts are of one save."""
    assert checkpoint is not None
    value = checkpoint.load_state()["value"]
    assert checkpoint.manifest["tokens"] == value
    assert load_file(checkpoint.path / "model.safetensors")["value"].tolist() == [float(value)] * 64
    return checkpoint.step, value


def names(run_dir: Path) -> list[str]:
    return sorted(path.name for path in (run_dir / "checkpoints").iterdir())


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


def test_layout_and_manifest(tmp_path: Path) -> None:
    path = save(tmp_path, 100)
    assert path == tmp_path / "checkpoints" / "step-00000100"
    assert (tmp_path / "checkpoints" / "latest").read_text() == "step-00000100\n"
    manifest = json.loads((path / "manifest.json").read_text())
    assert (manifest["step"], manifest["sequence"], manifest["tokens"], manifest["state"]) == (100, 1, 1100, "state.pt")
    assert {entry["name"]: entry["bytes"] for entry in manifest["files"]} == {
        file.name: file.stat().st_size for file in path.iterdir() if file.name != "manifest.json"
    }
    assert manifest["libraries"]["torch"] == torch.__version__
    assert content(find_checkpoint(tmp_path)) == (100, 1100)


def test_state_comes_back_with_weights_only(tmp_path: Path) -> None:
    torch.manual_seed(9)
    expected = torch.get_rng_state()
    save(tmp_path, 1)
    found = find_checkpoint(tmp_path)
    assert found is not None and torch.equal(found.load_state()["generator"], expected)


def test_state_that_could_not_be_loaded_is_refused_while_saving(tmp_path: Path) -> None:
    save(tmp_path, 1)
    with pytest.raises(Exception, match="weights_only"):
        save_checkpoint(
            tmp_path, 2, write_shards=lambda directory: None, state={"bad": object()}, manifest={}, keep_last=1
        )
    assert names(tmp_path) == ["latest", "step-00000001"]


@pytest.mark.parametrize(("keep_last", "kept"), [(1, [4]), (2, [3, 4]), (9, [1, 2, 3, 4])])
def test_oldest_are_pruned(tmp_path: Path, keep_last: int, kept: list[int]) -> None:
    for step in (1, 2, 3, 4):
        save(tmp_path, step, keep_last=keep_last)
    assert names(tmp_path) == ["latest", *(f"step-{step:08d}" for step in kept)]


def test_nothing_is_pruned_before_the_new_one_is_complete(tmp_path: Path) -> None:
    save(tmp_path, 1, keep_last=1)
    seen: list[list[str]] = []

    def write_shards(directory: Path) -> None:
        seen.append(names(tmp_path))

    save_checkpoint(tmp_path, 2, write_shards=write_shards, state={}, manifest={}, keep_last=1)
    assert seen == [[".step-00000002.tmp", "latest", "step-00000001"]]
    assert names(tmp_path) == ["latest", "step-00000002"]


def test_after_going_back_the_newest_save_counts_and_not_the_highest_step(tmp_path: Path) -> None:
    for step in (100, 200, 300):
        save(tmp_path, step, keep_last=3)
    save(tmp_path, 150, keep_last=3, value=7)
    assert content(find_checkpoint(tmp_path)) == (150, 7)
    assert names(tmp_path) == ["latest", "step-00000150", "step-00000200", "step-00000300"]
    save(tmp_path, 200, keep_last=3, value=8)
    assert content(find_checkpoint(tmp_path)) == (200, 8)
    assert names(tmp_path) == ["latest", "step-00000150", "step-00000200", "step-00000300"]


@pytest.mark.parametrize("point", NEW_IS_LOST)
def test_killed_before_the_rename_the_former_checkpoint_counts(tmp_path: Path, point: str) -> None:
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
def test_killed_after_the_rename_the_new_checkpoint_counts(tmp_path: Path, point: str) -> None:
    for step in (1, 2):
        save(tmp_path, step)
    kill_while_saving(tmp_path, point, 3)
    assert content(find_checkpoint(tmp_path)) == (3, 2003)
    save(tmp_path, 4)
    assert content(find_checkpoint(tmp_path)) == (4, 1004)
    assert [name for name in names(tmp_path) if "step" in name] == ["step-00000003", "step-00000004"]
    assert (tmp_path / "checkpoints" / "latest").read_text() == "step-00000004\n"


@pytest.mark.parametrize("point", [*NEW_IS_LOST, "between the renames", *NEW_IS_KEPT])
def test_killed_while_replacing_the_only_checkpoint(tmp_path: Path, point: str) -> None:
    save(tmp_path, 1)
    kill_while_saving(tmp_path, point, 1)
    expected = 2001 if point in NEW_IS_KEPT else 1001
    assert content(find_checkpoint(tmp_path)) == (1, expected)
    remove_leftovers(tmp_path)
    assert content(find_checkpoint(tmp_path)) == (1, expected)
    assert [name for name in names(tmp_path) if "step" in name] == ["step-00000001"]


def save_losses(run_dir: Path, losses: list[float | None], **options: Any) -> None:
    """Steps 1, 2, … with these evaluation losses."""
    for step, loss in enumerate(losses, start=1):
        save(run_dir, step, keep_last=1, evaluation={"loss": loss}, **options)


def steps(run_dir: Path) -> list[int]:
    return [int(name.removeprefix("step-")) for name in names(run_dir) if name.startswith("step-")]


def pointer(run_dir: Path, name: str) -> int:
    return int((run_dir / "checkpoints" / name).read_text().strip().removeprefix("step-"))


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
    tmp_path: Path, losses: list[float | None], keep_best: int, kept: list[int], best: int
) -> None:
    save_losses(tmp_path, losses, keep_best=keep_best)
    assert steps(tmp_path) == kept
    assert (pointer(tmp_path, "latest"), pointer(tmp_path, "best")) == (len(losses), best)


def test_of_another_metric_more_is_better(tmp_path: Path) -> None:
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


def test_without_evaluations_or_without_keeping_them_there_is_no_best(tmp_path: Path) -> None:
    save(tmp_path, 1, keep_best=1)
    assert names(tmp_path) == ["latest", "step-00000001"]
    save(tmp_path, 2, evaluation={"loss": 2.0}, keep_best=1)
    assert pointer(tmp_path, "best") == 2
    save(tmp_path, 3, evaluation={"loss": 1.0})
    assert names(tmp_path) == ["latest", "step-00000002", "step-00000003"]


def test_saved_again_with_its_evaluation_a_step_becomes_the_best(tmp_path: Path) -> None:
    save_losses(tmp_path, [2.0, 3.0], keep_best=1)
    save(tmp_path, 3, keep_last=1, keep_best=1)
    save(tmp_path, 3, keep_last=1, keep_best=1, evaluation={"loss": 1.0})
    assert (steps(tmp_path), pointer(tmp_path, "best")) == ([3], 3)


# Step 2 is the best so far and not among the newest; the save of step 4 is killed.
@pytest.mark.parametrize("loss", [1.0, 9.0], ids=["a new best", "no new best"])
@pytest.mark.parametrize("point", [*NEW_IS_LOST, *NEW_IS_KEPT])
def test_killed_anywhere_the_best_of_what_is_complete_is_there(tmp_path: Path, point: str, loss: float) -> None:
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


def test_first_save_killed_leaves_nothing_to_resume(tmp_path: Path) -> None:
    kill_while_saving(tmp_path, "before the rename", 1)
    assert find_checkpoint(tmp_path) is None
    remove_leftovers(tmp_path)
    assert names(tmp_path) == []


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A real file system of 256 KiB where mounting is allowed; elsewhere a directory, which `fill` limits."""
    disk = tmp_path / "disk"
    disk.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", str(disk)]
    mounted = shutil.which("mount") is not None and subprocess.run(command, capture_output=True).returncode == 0
    yield disk
    if mounted:
        subprocess.run(["umount", str(disk)], check=True)


@pytest.fixture
def fill(small_disk: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """Make writes of more than 200 KiB in all fail with ENOSPC from now on."""
    if small_disk.is_mount():
        return lambda: None

    def limit() -> None:
        original = os.fsync

        def fsync(descriptor: int) -> None:
            if sum(file.stat().st_size for file in small_disk.rglob("*") if file.is_file()) > 200 * 1024:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            original(descriptor)

        monkeypatch.setattr(os, "fsync", fsync)

    return limit


def test_full_disk_leaves_the_last_good_checkpoint(small_disk: Path, fill: Callable[[], None]) -> None:
    run_dir = small_disk / "run"
    save(run_dir, 1)
    before = {file: file.read_bytes() for file in run_dir.rglob("*") if file.is_file()}
    fill()
    with pytest.raises(RunError) as caught:
        save(run_dir, 2, size=100_000)
    assert {file: file.read_bytes() for file in run_dir.rglob("*") if file.is_file()} == before
    assert names(run_dir) == ["latest", "step-00000001"]
    message = str(caught.value)
    assert message.startswith(f"the disk is full: saving step 2 to {run_dir / 'checkpoints'} needs about ")
    assert "were free" in message and "KiB" in message and "step-00000001" in message
    assert caught.value.exit_code == 1
    save(run_dir, 2)
    assert content(find_checkpoint(run_dir)) == (2, 1002)


def test_full_disk_at_the_first_save(small_disk: Path, fill: Callable[[], None]) -> None:
    fill()
    with pytest.raises(RunError, match=r"needs more than .* were free; there is no checkpoint yet"):
        save(small_disk, 1, size=100_000)
    assert names(small_disk) == []


@pytest.mark.parametrize(
    "write",
    [
        lambda path: torch.save({"value": torch.zeros(100_000)}, path / "optimizer.pt"),
        lambda path: save_file({"a": torch.zeros(100_000)}, path / "a"),
    ],
    ids=["torch.save", "safetensors"],
)
def test_full_disk_is_recognised_through_the_libraries(small_disk: Path, fill: Any, write: Any) -> None:
    if not small_disk.is_mount():
        fill()

        def failing(path: Path) -> None:
            write(path)
            os.fsync(0)

        write_shards: Callable[[Path], None] = failing
    else:
        write_shards = write
    save(small_disk, 1)
    with pytest.raises(RunError, match="the disk is full: saving step 2"):
        save_checkpoint(small_disk, 2, write_shards=write_shards, state={}, manifest={}, keep_last=1)
    assert names(small_disk) == ["latest", "step-00000001"]


@pytest.mark.parametrize("name", ["state.pt", "manifest.json", ".latest.tmp"])
def test_full_disk_at_each_later_write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    save(tmp_path, 1)
    original = saving.write_synced

    def full(path: Path, data: bytes) -> None:
        if path.name == name:
            path.write_bytes(data[:3])
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
        original(path, data)

    monkeypatch.setattr(saving, "write_synced", full)
    with pytest.raises(RunError, match="the disk is full"):
        save(tmp_path, 2)
    assert content(find_checkpoint(tmp_path)) == ((2, 1002) if name == ".latest.tmp" else (1, 1001))
    assert not [name for name in names(tmp_path) if name.endswith(".tmp") and "step" in name]


def test_other_failure_of_the_disk_is_a_run_error_without_leftovers(tmp_path: Path) -> None:
    def broken(directory: Path) -> None:
        (directory / "half").write_bytes(b"x")
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    with pytest.raises(RunError, match=r"cannot save step 1 to .*Input/output error"):
        save_checkpoint(tmp_path, 1, write_shards=broken, state={}, manifest={}, keep_last=1)
    assert names(tmp_path) == []


def test_bug_in_an_engine_keeps_its_type_and_leaves_nothing(tmp_path: Path) -> None:
    def broken(directory: Path) -> None:
        (directory / "half").write_bytes(b"x")
        raise KeyError("bug")

    with pytest.raises(KeyError):
        save_checkpoint(tmp_path, 1, write_shards=broken, state={}, manifest={}, keep_last=1)
    assert names(tmp_path) == []


def test_run_directory_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "checkpoints").write_text("a file is in the way")
    with pytest.raises(RunError, match="cannot save to"):
        save(tmp_path, 1)


def test_copied_run_directory_is_found(tmp_path: Path) -> None:
    save(tmp_path / "run", 5)
    shutil.copytree(tmp_path / "run", tmp_path / "copy")
    shutil.rmtree(tmp_path / "run")
    assert content(find_checkpoint(tmp_path / "copy")) == (5, 1005)
