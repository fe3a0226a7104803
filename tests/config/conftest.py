"""A small valid config as a file, and what is wrong with one."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from framework.config import ConfigError, load_config
from framework.errors import UserError

SMALL: dict[str, Any] = {
    "run": {"output_dir": "runs/small"},
    "model": {"path": "some/model"},
    "data": {"train": "train.jsonl", "sequence_length": 64},
    "optimizer": {"learning_rate": 1e-3},
    "training": {"max_steps": 10, "global_batch_size": 8, "micro_batch_size": 2},
}


@pytest.fixture
def settings() -> dict[str, Any]:
    return copy.deepcopy(SMALL)


@pytest.fixture
def write(tmp_path: Path) -> Callable[[str], Path]:
    def write_text(text: str) -> Path:
        path = tmp_path / "written.json"
        path.write_text(text)
        return path

    return write_text


@pytest.fixture
def small(tmp_path: Path) -> Path:
    path = tmp_path / "small.json"
    path.write_text(json.dumps(SMALL))
    return path


@pytest.fixture
def problems() -> Callable[..., list[str]]:
    def problems_of(path: Path, *overrides: str) -> list[str]:
        with pytest.raises(ConfigError) as caught:
            load_config(path, overrides)
        assert caught.value.exit_code == 2
        assert isinstance(caught.value, UserError)
        return list(caught.value.problems)

    return problems_of
