"""Checkpoints small enough to save by the dozen."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from framework.checkpoint import (
    Checkpoint,
    save_checkpoint,
)
from framework.checkpoint.tensor_files import write_tensors


@pytest.fixture
def save() -> Callable[..., Path]:
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

        def write_shards(directory: Path) -> list[Path]:
            path = directory / "model.safetensors"
            write_tensors(path, {"value": torch.full((size,), float(value))})
            return [path]

        return save_checkpoint(
            run_dir,
            step,
            write_shards=write_shards,
            state={"value": value, "generator": torch.get_rng_state()},
            manifest={"tokens": value, "evaluation": evaluation},
            keep_last=keep_last,
            **best,
        )

    return save


@pytest.fixture
def content() -> Callable[..., tuple[int, int]]:
    def content(checkpoint: Checkpoint | None) -> tuple[int, int]:
        """Step and value of a checkpoint, after checking that all its parts are of one save."""
        assert checkpoint is not None
        value = checkpoint.load_state()["value"]
        assert checkpoint.manifest["tokens"] == value
        assert load_file(checkpoint.path / "model.safetensors")["value"].tolist() == [float(value)] * 64
        return checkpoint.step, value

    return content


@pytest.fixture
def names() -> Callable[[Path], list[str]]:
    def names(run_dir: Path) -> list[str]:
        return sorted(path.name for path in (run_dir / "checkpoints").iterdir())

    return names


@pytest.fixture
def steps(names: Callable[[Path], list[str]]) -> Callable[[Path], list[int]]:
    def steps(run_dir: Path) -> list[int]:
        return [int(name.removeprefix("step-")) for name in names(run_dir) if name.startswith("step-")]

    return steps


@pytest.fixture
def pointer() -> Callable[[Path, str], int]:
    def pointer(run_dir: Path, name: str) -> int:
        return int((run_dir / "checkpoints" / name).read_text().strip().removeprefix("step-"))

    return pointer


@pytest.fixture
def save_losses(save: Callable[..., Path]) -> Callable[..., None]:
    def save_losses(run_dir: Path, losses: list[float | None], **options: Any) -> None:
        """Steps 1, 2, … with these evaluation losses."""
        for step, loss in enumerate(losses, start=1):
            save(run_dir, step, keep_last=1, evaluation={"loss": loss}, **options)

    return save_losses
