"""What is written once for a checkpoint: its state and manifest, its name, the pointers; and what is removed."""

from __future__ import annotations

import json
import platform
import re
import shutil
from collections.abc import Iterable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from framework.checkpoint.disk import sync, write_synced
from framework.checkpoint.layout import (
    BEST_FILE,
    FORMAT,
    LATEST_FILE,
    MANIFEST_FILE,
    STATE_FILE,
    checkpoint_name,
    checkpoints_directory,
    list_checkpoints,
    replaced_directory,
    temporary_directory,
)
from framework.checkpoint.ranking import best_checkpoint, best_first

_LIBRARIES = ("transformers", "peft", "safetensors", "numpy", "selectrain")
_LEFTOVER = re.compile(r"\.(step-\d+)\.(tmp|old)")


def remove_leftovers(run_dir: Path) -> None:
    """Remove what killed saves left. Call it where nothing else saves to this run: at the start, before a save."""
    root = checkpoints_directory(run_dir)
    for path in list(root.iterdir()) if root.is_dir() else []:
        match = _LEFTOVER.fullmatch(path.name)
        if match is None:
            continue
        published = root / match[1]
        if match[2] == "old" and not published.exists():
            # Killed between taking away the earlier save of a step and naming the new one.
            path.rename(published)
            sync(root)
        else:
            shutil.rmtree(path)


def write_state(directory: Path, content: bytes) -> None:
    """Write the content of the state's file."""
    write_synced(directory / STATE_FILE, content)


def write_manifest(directory: Path, manifest: dict[str, Any], names: Iterable[str]) -> None:
    """Sync the names of all files, then write the manifest that lists them."""
    sync(directory)
    listed = [{"name": name, "bytes": (directory / name).stat().st_size} for name in sorted(names)]
    content = {**manifest, "format": FORMAT, "state": STATE_FILE, "files": listed, "libraries": _library_versions()}
    write_synced(directory / MANIFEST_FILE, json.dumps(content, indent=2, allow_nan=False).encode())
    sync(directory)


def publish(root: Path, directory: Path, step: int) -> None:
    """Give a finished directory its name."""
    path = root / checkpoint_name(step)
    earlier = replaced_directory(root, step)
    if path.exists():
        path.rename(earlier)
    directory.rename(path)
    sync(root)
    if earlier.exists():
        shutil.rmtree(earlier)


def update_pointers(run_dir: Path, *, keep_best: int, best_metric: str) -> None:
    """Make `latest` and `best` say what is there, as after a save; for a run that starts from what others left."""
    root = checkpoints_directory(run_dir)
    complete, _ = list_checkpoints(run_dir)
    if complete:
        move_latest(root, complete[-1].path.name)
        move_best(run_dir, keep_best, best_metric)


def move_latest(root: Path, name: str) -> None:
    """Let `latest` name a checkpoint."""
    _point(root / LATEST_FILE, name)


def move_best(run_dir: Path, keep_best: int, metric: str) -> None:
    """Let `best` name the best checkpoint; without one, or where the best are not kept, it must name none."""
    pointer = checkpoints_directory(run_dir) / BEST_FILE
    best = best_checkpoint(run_dir, metric)
    if keep_best and best is not None:
        _point(pointer, best.path.name)
    else:
        pointer.unlink(missing_ok=True)


def _point(pointer: Path, name: str) -> None:
    temporary = pointer.with_name(f".{pointer.name}.tmp")
    write_synced(temporary, f"{name}\n".encode())
    temporary.replace(pointer)
    sync(pointer.parent)


def prune(run_dir: Path, keep_last: int, keep_best: int, metric: str) -> None:
    """Remove what is neither new nor good. Renamed first, so that a kill leaves a leftover and no damaged one."""
    root = checkpoints_directory(run_dir)
    complete, _ = list_checkpoints(run_dir)
    kept = [*complete[-keep_last:], *best_first(complete, metric)[:keep_best]]
    for checkpoint in complete:
        if checkpoint in kept:
            continue
        doomed = temporary_directory(root, checkpoint.step)
        checkpoint.path.rename(doomed)
        shutil.rmtree(doomed)


def next_sequence(run_dir: Path) -> int:
    """The number of the next save."""
    complete, _ = list_checkpoints(run_dir)
    return complete[-1].sequence + 1 if complete else 1


def _library_versions() -> dict[str, str]:
    # The packages of torch's builds share one version, which only torch itself completes, such as 2.11.0+cu130.
    versions = {"python": platform.python_version(), "torch": torch.__version__}
    for name in _LIBRARIES:
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            # Run from a checkout that is not installed.
            versions[name] = "not installed"
    return versions
