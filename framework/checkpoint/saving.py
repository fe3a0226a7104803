"""Saving: complete under its name, or not there."""

from __future__ import annotations

import io
import json
import platform
import re
import shutil
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from framework.checkpoint.disk import (
    free_bytes,
    is_disk_full,
    readable_bytes,
    sync,
    tree_bytes,
    write_synced,
)
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
from framework.errors import RunError

_LIBRARIES = ("transformers", "peft", "safetensors", "numpy", "selectrain")
_LEFTOVER = re.compile(r"\.(step-\d+)\.(tmp|old)")


def save_checkpoint(
    run_dir: Path,
    step: int,
    *,
    write_shards: Callable[[Path], None],
    state: dict[str, Any],
    manifest: dict[str, Any],
    keep_last: int,
    keep_best: int = 0,
    best_metric: str = "loss",
) -> Path:
    """Save a checkpoint. Killed at any moment, the run keeps its last complete one.

    Everything is written and synced under a temporary name, the manifest last; then renamed, `latest` and `best` moved,
    and the checkpoints removed that are neither among the newest nor among the best. An earlier checkpoint of the same
    step is replaced.

    Args:
        run_dir: The run directory.
        step: Optimiser steps done.
        write_shards: Writes weights and optimiser into the directory it is given (the engine's `save`).
        state: What else resuming needs (state of the loader, `capture_random_state()`), of tensors and plain values.
        manifest: JSON values that describe the checkpoint: tokens, data state, selection seed, plan, config and its
            hash, world size, and as `evaluation` the figures of this step's evaluation by name. `format`, `step`,
            `sequence`, `state`, `files` and `libraries` are added.
        keep_last: Number of newest checkpoints to keep, this one included; at least 1.
        keep_best: Number of best checkpoints to keep beside them.
        best_metric: The figure of `evaluation` that they are compared by, see `best_first`.

    Returns:
        The directory of the checkpoint.

    Raises:
        RunError: The disk is full or cannot be written; says the path and, if full, the bytes needed and free. The
            unfinished directory is removed, complete checkpoints stay.
    """
    assert keep_last >= 1
    root = checkpoints_directory(run_dir)
    try:
        root.mkdir(parents=True, exist_ok=True)
        remove_leftovers(run_dir)
        free = free_bytes(root)
    except OSError as error:
        raise RunError(f"cannot save to {root}: {error}") from error
    directory = temporary_directory(root, step)
    try:
        directory.mkdir()
        write_shards(directory)
        _write_state(directory, state)
        _write_manifest(directory, {**manifest, "step": step, "sequence": _next_sequence(run_dir)})
        path = _publish(root, directory, step)
        _move_latest(root, path.name)
        _move_best(run_dir, keep_best, best_metric)
        _prune(run_dir, keep_last, keep_best, best_metric)
    except BaseException as error:
        written = tree_bytes(directory) if directory.exists() else 0
        shutil.rmtree(directory, ignore_errors=True)
        if is_disk_full(error):
            raise RunError(_full_message(run_dir, step, written=written, free=free)) from error
        if isinstance(error, OSError):
            raise RunError(f"cannot save step {step} to {root}: {error}") from error
        raise
    return path


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


def _write_state(directory: Path, state: dict[str, Any]) -> None:
    """Write `state`, and fail now rather than at the resume if it holds more than tensors and plain values."""
    buffer = io.BytesIO()
    torch.save(state, buffer)
    content = buffer.getvalue()
    torch.load(io.BytesIO(content), weights_only=True)
    write_synced(directory / STATE_FILE, content)


def _write_manifest(directory: Path, manifest: dict[str, Any]) -> None:
    """Sync all files, then write the manifest that lists them."""
    files = sorted(path for path in directory.rglob("*") if path.is_file())
    for path in [*files, *(path for path in directory.rglob("*") if path.is_dir())]:
        sync(path)
    listed = [{"name": str(path.relative_to(directory)), "bytes": path.stat().st_size} for path in files]
    content = {**manifest, "format": FORMAT, "state": STATE_FILE, "files": listed, "libraries": _library_versions()}
    write_synced(directory / MANIFEST_FILE, json.dumps(content, indent=2, allow_nan=False).encode())
    sync(directory)


def _publish(root: Path, directory: Path, step: int) -> Path:
    """Give a finished directory its name."""
    path = root / checkpoint_name(step)
    earlier = replaced_directory(root, step)
    if path.exists():
        path.rename(earlier)
    directory.rename(path)
    sync(root)
    if earlier.exists():
        shutil.rmtree(earlier)
    return path


def update_pointers(run_dir: Path, *, keep_best: int, best_metric: str) -> None:
    """Make `latest` and `best` say what is there, as after a save; for a run that starts from what others left."""
    root = checkpoints_directory(run_dir)
    complete, _ = list_checkpoints(run_dir)
    if complete:
        _move_latest(root, complete[-1].path.name)
        _move_best(run_dir, keep_best, best_metric)


def _move_latest(root: Path, name: str) -> None:
    _point(root / LATEST_FILE, name)


def _move_best(run_dir: Path, keep_best: int, metric: str) -> None:
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


def _prune(run_dir: Path, keep_last: int, keep_best: int, metric: str) -> None:
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


def _next_sequence(run_dir: Path) -> int:
    complete, _ = list_checkpoints(run_dir)
    return complete[-1].sequence + 1 if complete else 1


def _full_message(run_dir: Path, step: int, *, written: int, free: int) -> str:
    root = checkpoints_directory(run_dir)
    complete, _ = list_checkpoints(run_dir)
    if complete:
        needed = f"about {readable_bytes(max(complete[-1].size, written))}"
        kept = f"the last good checkpoint is {complete[-1].path}"
    else:
        needed = f"more than {readable_bytes(max(free, written))}"
        kept = "there is no checkpoint yet"
    return (
        f"the disk is full: saving step {step} to {root} needs {needed}, {readable_bytes(free)} were free; {kept}. "
        "Free space, or set run.output_dir to another disk, or checkpoint.keep_last or keep_best to a smaller number"
    )


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
