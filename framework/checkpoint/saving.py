"""Saving: complete under its name, or not there."""

from __future__ import annotations

import copy
import io
import shutil
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch

from framework.checkpoint.agreement import agree
from framework.checkpoint.disk import free_bytes, is_disk_full, readable_bytes, sync, tree_bytes
from framework.checkpoint.layout import (
    STATE_FILE,
    checkpoint_name,
    checkpoints_directory,
    list_checkpoints,
    temporary_directory,
)
from framework.checkpoint.publishing import (
    move_best,
    move_latest,
    next_sequence,
    prune,
    publish,
    remove_leftovers,
    write_manifest,
    write_state,
)
from framework.errors import RunError
from framework.sharding.ranks import Ranks

WriteShards = Callable[[Path], Iterable[Path]]


def save_checkpoint(
    run_dir: Path,
    step: int,
    *,
    write_shards: WriteShards,
    state: dict[str, Any],
    manifest: dict[str, Any],
    keep_last: int,
    keep_best: int = 0,
    best_metric: str = "loss",
    ranks: Ranks | None = None,
) -> Path:
    """Save a checkpoint. Killed at any moment, the run keeps its last complete one. Called by every rank.

    Everything is written and synced under a temporary name, the manifest last; then renamed, `latest` and `best` moved,
    and the checkpoints removed that are neither among the newest nor among the best. An earlier checkpoint of the same
    step is replaced. What is written once, the first rank writes when all have written their own.

    Args:
        run_dir: The run directory, the same for all ranks.
        step: Optimiser steps done.
        write_shards: Writes this rank's part of weights and optimiser into the directory it is given, and returns the
            files.
        state: What else resuming needs (state of the loader, every rank's `capture_random_state()`), of tensors and
            plain values; the first rank's is saved.
        manifest: JSON values that describe the checkpoint: tokens, data state, selection seed, plan, config and its
            hash, and as `evaluation` the figures of this step's evaluation by name; the first rank's is saved.
            `format`, `step`, `sequence`, `state`, `world_size`, `files` and `libraries` are added.
        keep_last: Number of newest checkpoints to keep, this one included; at least 1.
        keep_best: Number of best checkpoints to keep beside them.
        best_metric: The figure of `evaluation` that they are compared by, see `best_first`.
        ranks: Of the run; None for a single process.

    Returns:
        The directory of the checkpoint.

    Raises:
        RunError: The disk is full or cannot be written, for whichever rank; says the path and, if full, the bytes
            needed and free. The unfinished directory is removed, complete checkpoints stay.
    """
    pending = PendingSave(run_dir, step, state=state, manifest=manifest, ranks=ranks or Ranks())
    pending.write(write_shards)
    return pending.finish(keep_last=keep_last, keep_best=keep_best, best_metric=best_metric)


class PendingSave:
    """A checkpoint that is being saved, see `save_checkpoint` for arguments and errors.

    Every rank makes one, calls `write` and then `finish`. Making it and `finish` wait for the other ranks; `write` does
    not, and may run in a thread.
    """

    def __init__(
        self, run_dir: Path, step: int, *, state: dict[str, Any], manifest: dict[str, Any], ranks: Ranks
    ) -> None:
        self._run_dir, self._step, self._ranks = run_dir, step, ranks
        self._root = checkpoints_directory(run_dir)
        self._directory = temporary_directory(self._root, step)
        self._manifest = copy.deepcopy(manifest)
        self._state = b""
        self._free = 0
        self._files: dict[str, int] = {}
        self._error: BaseException | None = None
        try:
            if ranks.is_first:
                self._state = _encoded(state)
                self._make_directory()
        # Agreed on with the other ranks, which wait for this one, and raised there.
        except BaseException as error:
            self.fail(error)
        self._agree()
        self._free = ranks.broadcast(self._free)
        if not self._directory.is_dir():
            self.fail(_invisible(self._directory))
        self._agree()

    def write(self, write_shards: WriteShards) -> None:
        """Let this rank write its files, and sync them. An error is kept for `finish`."""
        try:
            for path in write_shards(self._directory):
                sync(path)
                self._files[path.name] = path.stat().st_size
        # Whatever it is, `finish` raises it, on all ranks.
        except BaseException as error:
            self.fail(error)

    def fail(self, error: BaseException) -> None:
        """Let `finish` raise an error; one of the disk is explained."""
        if is_disk_full(error):
            written = tree_bytes(self._directory) if self._directory.exists() else 0
            message = _full_message(self._run_dir, self._step, written=written, free=self._free)
        elif isinstance(error, OSError):
            message = f"cannot save step {self._step} to {self._root}: {error}"
        else:
            self._error = error
            return
        self._error = RunError(message)
        self._error.__cause__ = error

    def finish(self, *, keep_last: int, keep_best: int, best_metric: str) -> Path:
        """Complete the checkpoint when all ranks have written their files; give its directory."""
        assert keep_last >= 1
        self._agree()
        files = {name: size for written in self._ranks.gather(self._files) for name, size in written.items()}
        try:
            if self._ranks.is_first:
                self._complete(files)
                move_latest(self._root, checkpoint_name(self._step))
                move_best(self._run_dir, keep_best, best_metric)
                prune(self._run_dir, keep_last, keep_best, best_metric)
        # Agreed on with the other ranks, which wait for this one, and raised there.
        except BaseException as error:
            self.fail(error)
        self._agree()
        return self._root / checkpoint_name(self._step)

    def _make_directory(self) -> None:
        self._root.mkdir(parents=True, exist_ok=True)
        remove_leftovers(self._run_dir)
        self._free = free_bytes(self._root)
        self._directory.mkdir()

    def _complete(self, files: dict[str, int]) -> None:
        """Write what is written once, and give the directory its name."""
        for name, size in files.items():
            path = self._directory / name
            if not path.is_file() or path.stat().st_size != size:
                raise _invisible(path)
        write_state(self._directory, self._state)
        described = {
            **self._manifest,
            "step": self._step,
            "sequence": next_sequence(self._run_dir),
            "world_size": self._ranks.world_size,
        }
        write_manifest(self._directory, described, [*files, STATE_FILE])
        publish(self._root, self._directory, self._step)

    def _agree(self) -> None:
        """Raise if any rank has an error; nothing unfinished is left then."""
        error, self._error = self._error, None
        try:
            agree(self._ranks, error)
        except BaseException:
            if self._ranks.is_first:
                shutil.rmtree(self._directory, ignore_errors=True)
            raise
        finally:
            # The error's traceback refers to this frame: a cycle would keep the files of a failed write open.
            del error


def _invisible(path: Path) -> RunError:
    return RunError(
        f"{path} is not there for every rank: run.output_dir must be on a file system that all machines share"
    )


def _encoded(state: dict[str, Any]) -> bytes:
    """The content of a state's file; fails now, not at the resume, if it is more than tensors and plain values."""
    buffer = io.BytesIO()
    torch.save(state, buffer)
    content = buffer.getvalue()
    torch.load(io.BytesIO(content), weights_only=True)
    return content


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
