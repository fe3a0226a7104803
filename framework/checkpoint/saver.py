"""Saving a run's checkpoints, at once or while training goes on."""

from __future__ import annotations

import threading
from collections.abc import Iterable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from framework.checkpoint.saving import PendingSave
from framework.checkpoint.stored import Kind, rank_file
from framework.checkpoint.tensor_files import write_fragments
from framework.config import CheckpointConfig
from framework.errors import RunError
from framework.sharding.fragments import Fragment
from framework.sharding.ranks import Ranks

Fragments = Mapping[Kind, list[Fragment]]

GIVING_UP_SECONDS = 5.0
"""How long a run that ends by an error waits for a thread that still writes; its error has to be told first."""


class CheckpointSaver:
    """Saves checkpoints of a run, with the same files whether `checkpoint.asynchronous` is set or not.

    With it, `save` copies what this rank holds to the host and returns while a thread writes. The thread talks to no
    other rank. The checkpoint becomes one, for all ranks at the same place, in the first `poll` at which every rank has
    written its files, or in `wait`. A run that ends in between leaves a directory that the next start removes.

    All methods but `close` are called by every rank, in the same order. They return the directory of a checkpoint that
    they completed, and raise what `save_checkpoint` does, on all ranks.
    """

    def __init__(self, run_dir: Path, settings: CheckpointConfig, ranks: Ranks) -> None:
        """Save nothing yet.

        Args:
            run_dir: the run directory, the same for all ranks.
            settings: which checkpoints are kept, and whether saving is asynchronous.
            ranks: of the run.
        """
        self._run_dir, self._settings, self._ranks = run_dir, settings, ranks
        self._copies = HostCopies()
        self._pending: PendingSave | None = None
        self._thread: threading.Thread | None = None
        self._given_up = threading.Event()

    def save(
        self,
        step: int,
        *,
        weights: Iterable[Fragment],
        optimizer: Iterable[Fragment],
        state: dict[str, Any],
        manifest: dict[str, Any],
    ) -> Path | None:
        """Save a step, after the save before it is complete; see `save_checkpoint` for `state` and `manifest`.

        Args:
            step: optimiser steps done.
            weights: what this rank is to save of the weights.
            optimizer: what it is to save of the optimiser's tensors.
            state: of the loop.
            manifest: describes the checkpoint.
        """
        self.wait()
        pending = PendingSave(self._run_dir, step, state=state, manifest=manifest, ranks=self._ranks)
        self._pending = pending
        held: Fragments = {"model": list(weights), "optimizer": list(optimizer)}
        if not self._settings.asynchronous:
            pending.write(partial(self._write, held))
            return self.wait()
        try:
            copied = self._copies.of(held)
        except (RuntimeError, MemoryError) as error:
            # torch's allocators raise the first. It is raised where the other ranks learn of it too.
            pending.fail(
                RunError(f"checkpoint.asynchronous: the host cannot hold a copy of what this rank saves: {error}")
            )
            return None
        # A daemon, so that a process that ends by an error does not stay to write what nobody completes.
        self._thread = threading.Thread(
            target=pending.write, args=(partial(self._write, copied),), name=f"save step {step}", daemon=True
        )
        self._thread.start()
        return None

    def poll(self) -> Path | None:
        """Complete a pending checkpoint if all ranks have written their files. To be called at every step boundary."""
        if self._pending is None or self._ranks.any(self._thread is not None and self._thread.is_alive()):
            return None
        return self.wait()

    def wait(self) -> Path | None:
        """Complete a pending checkpoint as soon as all ranks have written their files."""
        if self._pending is None:
            return None
        pending, settings = self._pending, self._settings
        self._pending = None
        self._join(None)
        return pending.finish(
            keep_last=settings.keep_last, keep_best=settings.keep_best, best_metric=settings.best_metric
        )

    def close(self) -> None:
        """Give up what is pending: this rank's thread begins no further file. Called at the end, also after errors."""
        self._pending = None
        self._given_up.set()
        self._join(GIVING_UP_SECONDS)

    def _join(self, seconds: float | None) -> None:
        if self._thread is not None:
            self._thread.join(seconds)
            self._thread = None

    def _write(self, held: Fragments, directory: Path) -> list[Path]:
        """Write this rank's files."""
        self._copies.wait()
        paths = []
        for kind, fragments in held.items():
            if self._given_up.is_set():
                break
            path = directory / rank_file(kind, self._ranks.rank, self._ranks.world_size)
            write_fragments(path, fragments)
            paths.append(path)
        return paths


class HostCopies:
    """Copies of fragments in the host's memory, which every copy uses again; pinned for those of a CUDA device."""

    def __init__(self) -> None:
        self._buffers: dict[tuple[Kind, str, int], Tensor] = {}
        self._copied: torch.cuda.Event | None = None

    def of(self, held: Fragments) -> Fragments:
        """Copy fragments; those of before are overwritten. Complete after `wait`.

        Copies from a CUDA device are made in its stream's order, so that a step may follow at once.
        """
        on_cuda = any(fragment.values.is_cuda for fragments in held.values() for fragment in fragments)
        copied: Fragments = {
            kind: [
                Fragment(fragment.name, fragment.shape, fragment.start, self._copy(kind, fragment))
                for fragment in fragments
            ]
            for kind, fragments in held.items()
        }
        self._copied = None
        if on_cuda:
            self._copied = torch.cuda.Event()
            self._copied.record()
        return copied

    def wait(self) -> None:
        """Until the last copies are complete; in any thread."""
        if self._copied is not None:
            self._copied.synchronize()

    def _copy(self, kind: Kind, fragment: Fragment) -> Tensor:
        values, key = fragment.values, (kind, fragment.name, fragment.start)
        buffer = self._buffers.get(key)
        if buffer is None or buffer.shape != values.shape or buffer.dtype != values.dtype:
            buffer = torch.empty(values.shape, dtype=values.dtype, pin_memory=values.is_cuda)
            self._buffers[key] = buffer
        return buffer.copy_(values, non_blocking=True)
