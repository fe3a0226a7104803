"""The files of a run directory that are neither metrics nor checkpoints. Must not import torch."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

COMPLETED, STOPPED, FAILED = MARKERS = ("COMPLETED", "STOPPED", "FAILED")

LOST_RANK, SECOND_SIGNAL = INTERRUPTIONS = ("lost rank", "second signal")
"""Causes of `FAILED` that are outside of the run: the same start may succeed."""


class RunDirectory:
    """Where a run writes.

    Attributes:
        path: the directory; made by `begin`, or by a marker.
        metrics: `metrics.jsonl`.
        tensorboard: folder of TensorBoard's event files.
        wandb_state: file with the id of the run at Weights & Biases.
        profile: folder of profiles.
        memory: folder of memory snapshots and reports.
        checkpoints: the folder of the checkpoints.
        stop_file: a file that users and job scripts create to stop the run.
        job: folder of what the submission to a cluster's scheduler left.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.metrics = self.path / "metrics.jsonl"
        self.tensorboard = self.path / "tensorboard"
        self.wandb_state = self.path / "wandb.json"
        self.profile = self.path / "profile"
        self.memory = self.path / "memory"
        self.checkpoints = self.path / "checkpoints"
        self.stop_file = self.path / "STOP"
        self.job = self.path / "slurm"

    def clear_markers(self) -> None:
        """Remove what the previous start left: its end marker, and a request to stop it."""
        for name in (*MARKERS, self.stop_file.name):
            (self.path / name).unlink(missing_ok=True)

    def begin(self, config: dict[str, Any], plan: dict[str, Any]) -> None:
        """Make the directory and write `config.json` and `plan.json`."""
        self.path.mkdir(parents=True, exist_ok=True)
        write_json(self.path / "config.json", config)
        write_json(self.path / "plan.json", plan)

    def mark(
        self, marker: str, *, code: int, message: str, rank: int, last_lines: Sequence[str], cause: str | None = None
    ) -> None:
        """Write the end marker, which job scripts trust more than exit codes. Of several, the first is the only one.

        A launcher that has seen a rank fail asks the others to stop, which is no reason for them to say `STOPPED`.

        Args:
            marker: one of `MARKERS`.
            code: exit code of the process.
            message: one or more lines for people.
            rank: of the process that writes.
            last_lines: of the log or the traceback.
            cause: of `STOPPED` what asked for it, signals or the stop file by name; of `FAILED` one of `INTERRUPTIONS`;
                None for anything else.
        """
        if self.ending is not None:
            return
        self.path.mkdir(parents=True, exist_ok=True)
        record = {"code": code, "message": message, "cause": cause, "rank": rank, "last_lines": list(last_lines)}
        own = self.path / f".{marker}.{rank}"
        write_json(own, record)
        try:
            os.link(own, self.path / marker)
        except FileExistsError:
            pass
        except OSError:
            # A file system without hard links.
            own.replace(self.path / marker)
        own.unlink(missing_ok=True)

    def read_marker(self, marker: str) -> dict[str, Any] | None:
        """What an end marker says, see `mark`; None if there is none."""
        try:
            record: dict[str, Any] = json.loads((self.path / marker).read_text(encoding="utf-8"))
        except FileNotFoundError:
            return None
        return record

    @property
    def ending(self) -> str | None:
        """The end marker that is there; None while the run goes on, or if nothing of it is left."""
        return next((name for name in MARKERS if (self.path / name).exists()), None)

    @property
    def latest_step(self) -> int | None:
        """Step of the newest complete checkpoint, as its pointer says; None without one."""
        try:
            name = (self.checkpoints / "latest").read_text(encoding="utf-8")
        except FileNotFoundError:
            return None
        return int(name.strip().removeprefix("step-"))

    def holds(self, checkpoint: Path) -> bool:
        """Whether a checkpoint is one of this run's, not one of another run's or one that was set aside."""
        return checkpoint.resolve().parent == self.checkpoints.resolve()

    def set_aside(self, after_step: int) -> Path | None:
        """Move checkpoints of later steps out of the way of a run that starts from `after_step`.

        Otherwise a later `--resume auto` would pick up the newest of them, which that run never reached. Metrics are
        copied along, before they are cut. A run that continues none of the checkpoints here starts after step 0 for
        this purpose, and everything is moved: checkpoints, metrics and curves.

        Returns:
            The folder `previous-N` they are in; None if there was nothing to move.
        """
        later = [path for path in self.checkpoints.glob("step-*") if int(path.name.removeprefix("step-")) > after_step]
        if not later and not (after_step == 0 and self.metrics.exists()):
            return None
        number = 1
        while (target := self.path / f"previous-{number}").exists():
            number += 1
        (target / self.checkpoints.name).mkdir(parents=True)
        if self.metrics.exists():
            (target / self.metrics.name).write_bytes(self.metrics.read_bytes())
        for pointer in ("latest", "best"):  # `update_pointers` makes them anew
            (self.checkpoints / pointer).unlink(missing_ok=True)
        for path in later:
            path.rename(target / self.checkpoints.name / path.name)
        if after_step == 0:
            self.metrics.unlink(missing_ok=True)
            # A run that continues nothing here has curves of its own.
            for curves in (self.tensorboard, self.wandb_state):
                if curves.exists():
                    curves.rename(target / curves.name)
        return target


def write_json(path: Path, value: dict[str, Any]) -> None:
    """Write a JSON file such that readers see the old one or the whole new one."""
    temporary = path.with_name(f".{path.name}.tmp")
    with temporary.open("w", encoding="utf-8") as file:
        json.dump(value, file, indent=2)
        file.write("\n")
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)
