"""Names in a run's `checkpoints/` directory, and reading one checkpoint.

```
checkpoints/
├── step-00000100/          complete: it was renamed to this name after its manifest was synced
│   ├── model.safetensors, optimizer.safetensors
│   │                       of a single process; of several ranks model-00000-of-00002.safetensors and so on
│   ├── state.pt            state of the loop: loader, random states of all ranks
│   └── manifest.json       written last
├── latest                  a file that holds the name of the newest (a symbolic link does not survive every copy)
├── best                    the same for the best, where the best are kept
├── .step-00000200.tmp/     being written, or left by a killed save
└── .step-00000100.old/     being replaced by another save of the same step
```
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from framework.checkpoint.stored import StoredFragments

MANIFEST_FILE = "manifest.json"
STATE_FILE = "state.pt"
LATEST_FILE = "latest"
BEST_FILE = "best"
FORMAT = 2

_NAME = re.compile(r"step-(\d{8,})")
_REPLACED = re.compile(r"\.(step-\d{8,})\.old")


class DamagedCheckpointError(Exception):
    """A checkpoint directory that is not what its manifest says; the message is the reason."""


@dataclass(frozen=True)
class Checkpoint:
    """A complete checkpoint: every file of its manifest is there with its size.

    Attributes:
        path: Its directory.
        step: Optimiser steps done when it was saved.
        manifest: What `save_checkpoint` wrote.
    """

    path: Path
    step: int
    manifest: dict[str, Any]

    @classmethod
    def read(cls, path: Path) -> Checkpoint:
        """Read the manifest at `path` and compare it with the files.

        Raises:
            DamagedCheckpointError: The manifest is missing or unreadable, or a file is missing or of another size.
        """
        try:
            manifest = json.loads((path / MANIFEST_FILE).read_text(encoding="utf-8"))
            files = {entry["name"]: entry["bytes"] for entry in manifest["files"]}
            step, version = manifest["step"], manifest["format"]
        except FileNotFoundError as error:
            raise DamagedCheckpointError(f"{MANIFEST_FILE} is missing") from error
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise DamagedCheckpointError(f"{MANIFEST_FILE} cannot be read: {error!r}") from error
        if version != FORMAT:
            raise DamagedCheckpointError(f"it has format {version}, this version reads {FORMAT}")
        for name, size in files.items():
            try:
                found = (path / name).stat().st_size
            except OSError as error:
                raise DamagedCheckpointError(f"{name} is missing") from error
            if found != size:
                raise DamagedCheckpointError(f"{name} has {found} bytes instead of {size}")
        return cls(path=path, step=step, manifest=manifest)

    @property
    def sequence(self) -> int:
        """Counts the saves in a run directory: newer ones have higher numbers, also after going back to a step."""
        return int(self.manifest["sequence"])

    @property
    def evaluation(self) -> dict[str, float | None] | None:
        """Figures of the evaluation at its step by name, null where not finite; None if there was none."""
        figures: dict[str, float | None] | None = self.manifest.get("evaluation")
        return figures

    @property
    def size(self) -> int:
        """Bytes of its files, manifest apart."""
        return sum(entry["bytes"] for entry in self.manifest["files"])

    @property
    def world_size(self) -> int:
        """Number of ranks that saved it."""
        return int(self.manifest["world_size"])

    def weights(self) -> StoredFragments:
        """Its weights, of all ranks.

        Raises:
            UserError: a file cannot be read.
        """
        return StoredFragments(self.path, "model")

    def optimizer(self) -> StoredFragments:
        """The optimiser's tensors, of all ranks; errors as for `weights`."""
        return StoredFragments(self.path, "optimizer")

    def load_state(self) -> dict[str, Any]:
        """The `state` that was given to `save_checkpoint`, tensors on the CPU."""
        state: dict[str, Any] = torch.load(self.path / STATE_FILE, map_location="cpu", weights_only=True)
        return state


def checkpoints_directory(run_dir: Path) -> Path:
    """Where the checkpoints of a run are."""
    return run_dir / "checkpoints"


def checkpoint_name(step: int) -> str:
    """The name of the directory for a step."""
    return f"step-{step:08d}"


def temporary_directory(root: Path, step: int) -> Path:
    """Where a step is written before it has its name."""
    return root / f".{checkpoint_name(step)}.tmp"


def replaced_directory(root: Path, step: int) -> Path:
    """Where an older save of the same step waits until the new one has its name."""
    return root / f".{checkpoint_name(step)}.old"


def list_checkpoints(run_dir: Path) -> tuple[list[Checkpoint], dict[Path, str]]:
    """All checkpoints of a run.

    Returns:
        The complete ones, oldest save first, and the reason for each damaged one.
    """
    root = checkpoints_directory(run_dir)
    complete: list[Checkpoint] = []
    damaged: dict[Path, str] = {}
    for path in sorted(root.iterdir()) if root.is_dir() else []:
        replaced = _REPLACED.fullmatch(path.name)
        if not _NAME.fullmatch(path.name) and not (replaced and not (root / replaced[1]).exists()):
            continue
        try:
            complete.append(Checkpoint.read(path))
        except DamagedCheckpointError as error:
            damaged[path] = str(error)
    return sorted(complete, key=lambda checkpoint: checkpoint.sequence), damaged
