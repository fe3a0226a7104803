"""Saving: what a checkpoint holds, which stay, and what a failure leaves."""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from framework.checkpoint import (
    find_checkpoint,
    save_checkpoint,
)
from framework.errors import RunError


def test_layout_and_manifest(
    tmp_path: Path, save: Callable[..., Path], content: Callable[..., tuple[int, int]]
) -> None:
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


def test_state_comes_back_with_weights_only(tmp_path: Path, save: Callable[..., Path]) -> None:
    torch.manual_seed(9)
    expected = torch.get_rng_state()
    save(tmp_path, 1)
    found = find_checkpoint(tmp_path)
    assert found is not None and torch.equal(found.load_state()["generator"], expected)


def test_state_that_could_not_be_loaded_is_refused_while_saving(
    tmp_path: Path, save: Callable[..., Path], names: Callable[[Path], list[str]]
) -> None:
    save(tmp_path, 1)
    with pytest.raises(Exception, match="weights_only"):
        save_checkpoint(
            tmp_path, 2, write_shards=lambda directory: [], state={"bad": object()}, manifest={}, keep_last=1
        )
    assert names(tmp_path) == ["latest", "step-00000001"]


@pytest.mark.parametrize(("keep_last", "kept"), [(1, [4]), (2, [3, 4]), (9, [1, 2, 3, 4])])
def test_oldest_are_pruned(
    tmp_path: Path, keep_last: int, kept: list[int], save: Callable[..., Path], names: Callable[[Path], list[str]]
) -> None:
    for step in (1, 2, 3, 4):
        save(tmp_path, step, keep_last=keep_last)
    assert names(tmp_path) == ["latest", *(f"step-{step:08d}" for step in kept)]


def test_nothing_is_pruned_before_the_new_one_is_complete(
    tmp_path: Path, save: Callable[..., Path], names: Callable[[Path], list[str]]
) -> None:
    save(tmp_path, 1, keep_last=1)
    seen: list[list[str]] = []

    def write_shards(directory: Path) -> list[Path]:
        seen.append(names(tmp_path))
        return []

    save_checkpoint(tmp_path, 2, write_shards=write_shards, state={}, manifest={}, keep_last=1)
    assert seen == [[".step-00000002.tmp", "latest", "step-00000001"]]
    assert names(tmp_path) == ["latest", "step-00000002"]


def test_after_going_back_the_newest_save_counts_and_not_the_highest_step(
    tmp_path: Path,
    save: Callable[..., Path],
    content: Callable[..., tuple[int, int]],
    names: Callable[[Path], list[str]],
) -> None:
    for step in (100, 200, 300):
        save(tmp_path, step, keep_last=3)
    save(tmp_path, 150, keep_last=3, value=7)
    assert content(find_checkpoint(tmp_path)) == (150, 7)
    assert names(tmp_path) == ["latest", "step-00000150", "step-00000200", "step-00000300"]
    save(tmp_path, 200, keep_last=3, value=8)
    assert content(find_checkpoint(tmp_path)) == (200, 8)
    assert names(tmp_path) == ["latest", "step-00000150", "step-00000200", "step-00000300"]


def test_other_failure_of_the_disk_is_a_run_error_without_leftovers(
    tmp_path: Path, names: Callable[[Path], list[str]]
) -> None:
    def broken(directory: Path) -> list[Path]:
        (directory / "half").write_bytes(b"x")
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    with pytest.raises(RunError, match=r"cannot save step 1 to .*Input/output error"):
        save_checkpoint(tmp_path, 1, write_shards=broken, state={}, manifest={}, keep_last=1)
    assert names(tmp_path) == []


def test_bug_in_an_engine_keeps_its_type_and_leaves_nothing(tmp_path: Path, names: Callable[[Path], list[str]]) -> None:
    def broken(directory: Path) -> list[Path]:
        (directory / "half").write_bytes(b"x")
        raise KeyError("bug")

    with pytest.raises(KeyError):
        save_checkpoint(tmp_path, 1, write_shards=broken, state={}, manifest={}, keep_last=1)
    assert names(tmp_path) == []


def test_run_directory_that_cannot_be_written(tmp_path: Path, save: Callable[..., Path]) -> None:
    (tmp_path / "checkpoints").write_text("a file is in the way")
    with pytest.raises(RunError, match="cannot save step 1 to"):
        save(tmp_path, 1)


def test_copied_run_directory_is_found(
    tmp_path: Path, save: Callable[..., Path], content: Callable[..., tuple[int, int]]
) -> None:
    save(tmp_path / "run", 5)
    shutil.copytree(tmp_path / "run", tmp_path / "copy")
    shutil.rmtree(tmp_path / "run")
    assert content(find_checkpoint(tmp_path / "copy")) == (5, 1005)
