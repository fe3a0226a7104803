"""Saving: wherever the disk fills up, the last complete checkpoint stays."""

from __future__ import annotations

import errno
import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from framework.checkpoint import (
    find_checkpoint,
    publishing,
    save_checkpoint,
)
from framework.errors import RunError


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


def test_full_disk_leaves_the_last_good_checkpoint(
    small_disk: Path,
    fill: Callable[[], None],
    save: Callable[..., Path],
    content: Callable[..., tuple[int, int]],
    names: Callable[[Path], list[str]],
) -> None:
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


def test_full_disk_at_the_first_save(
    small_disk: Path, fill: Callable[[], None], save: Callable[..., Path], names: Callable[[Path], list[str]]
) -> None:
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
def test_full_disk_is_recognised_through_the_libraries(
    small_disk: Path, fill: Any, write: Any, save: Callable[..., Path], names: Callable[[Path], list[str]]
) -> None:
    if not small_disk.is_mount():
        fill()

        def failing(path: Path) -> list[Path]:
            write(path)
            os.fsync(0)

        write_shards: Callable[[Path], Any] = failing
    else:
        write_shards = write
    save(small_disk, 1)
    with pytest.raises(RunError, match="the disk is full: saving step 2"):
        save_checkpoint(small_disk, 2, write_shards=write_shards, state={}, manifest={}, keep_last=1)
    assert names(small_disk) == ["latest", "step-00000001"]


@pytest.mark.parametrize("name", ["state.pt", "manifest.json", ".latest.tmp"])
def test_full_disk_at_each_later_write(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    name: str,
    save: Callable[..., Path],
    content: Callable[..., tuple[int, int]],
    names: Callable[[Path], list[str]],
) -> None:
    save(tmp_path, 1)
    original = publishing.write_synced

    def full(path: Path, data: bytes) -> None:
        if path.name == name:
            path.write_bytes(data[:3])
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
        original(path, data)

    monkeypatch.setattr(publishing, "write_synced", full)
    with pytest.raises(RunError, match="the disk is full"):
        save(tmp_path, 2)
    assert content(find_checkpoint(tmp_path)) == ((2, 1002) if name == ".latest.tmp" else (1, 1001))
    assert not [name for name in names(tmp_path) if name.endswith(".tmp") and "step" in name]
