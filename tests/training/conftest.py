"""Small runs as settings, files and configs."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from changed_settings import change
from small_run import small_run
from task_runs import MODELS as TASK_MODELS
from task_runs import SELECTIONS, write_data

from framework.config import Config, load_config


@pytest.fixture
def settings(tmp_path: Path, tiny_tokenizer_path: Path) -> dict[str, Any]:
    """A valid config as JSON values; its run directory is `run` in the test's own directory."""
    return small_run(tmp_path, tiny_tokenizer_path)


@pytest.fixture
def write_config(settings: dict[str, Any], tmp_path: Path) -> Callable[..., Path]:
    """Write the settings, with changes given as `section__key=value`, to a file."""

    def write(**changes: Any) -> Path:
        change(settings, changes)
        path = tmp_path / "config.json"
        path.write_text(json.dumps(settings))
        return path

    return write


@pytest.fixture
def make_config(write_config: Callable[..., Path]) -> Callable[..., Config]:
    """The same as a loaded config."""
    return lambda **changes: load_config(write_config(**changes))


@pytest.fixture
def make_task(
    tmp_path: Path, encoder_tokenizer_path: Path, tiny_tokenizer_path: Path, write_config: Any, settings: Any
) -> Callable[..., Config]:
    """A config for a task and a model of `task_runs.MODELS`, with changes given as `section__key=value`."""

    def config(task: str, name: str, selection: str = "supervised", **changes: Any) -> Config:
        tokenizer = tiny_tokenizer_path if name == "llama" else encoder_tokenizer_path
        images = task == "image_classification"
        settings["model"] = {"from_config": TASK_MODELS[name], "task": task}
        settings["data"] = {
            "train": str(write_data(tmp_path / "train", task, 36, seed=0)),
            "eval": str(write_data(tmp_path / "eval", task, 10, seed=1)),
        }
        if not images:
            settings["model"]["tokenizer"] = str(tokenizer)
            settings["data"]["sequence_length"] = 32
        settings["selection"] = dict(SELECTIONS[selection])
        policy = "all" if selection == "exact" else "selective"
        settings["retention"] = {"policy": policy, "retain_linears": policy == "selective"}
        return load_config(write_config(**changes))

    return config


@pytest.fixture(autouse=True)
def default_kernels():
    """Give back what `training.deterministic` switches for the whole process."""
    import torch

    yield
    torch.use_deterministic_algorithms(False)
