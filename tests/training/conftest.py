"""A run small enough to repeat: a llama of some two thousand parameters on sums, as prompt and completion."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from task_runs import MODELS as TASK_MODELS
from task_runs import SELECTIONS, write_data

from framework.config import Config, load_config

MODEL = {
    "model_type": "llama",
    "vocab_size": 106,
    "hidden_size": 8,
    "intermediate_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 64,
    "tie_word_embeddings": True,
}


def write_sums(path: Path, start: int, count: int) -> None:
    """Prompts of different lengths and their short answers."""
    lines = []
    for number in range(start, start + count):
        left, right = number * 37 % 400, number * 11 % 90
        lines.append(json.dumps({"prompt": f"{left} + {right} = ", "completion": str(left + right)}))
    path.write_text("\n".join(lines) + "\n")


@pytest.fixture
def settings(tmp_path: Path, tiny_tokenizer_path: Path) -> dict[str, Any]:
    """A valid config as JSON values; its run directory is `run` in the test's own directory."""
    write_sums(tmp_path / "train.jsonl", 0, 48)
    write_sums(tmp_path / "eval.jsonl", 100, 8)
    return {
        "run": {"output_dir": str(tmp_path / "run"), "seed": 3},
        "model": {"from_config": MODEL, "tokenizer": str(tiny_tokenizer_path)},
        "data": {
            "train": str(tmp_path / "train.jsonl"),
            "eval": str(tmp_path / "eval.jsonl"),
            "format": "completion",
            "sequence_length": 32,
        },
        "selection": {"strategy": "supervised"},
        "retention": {"policy": "selective", "retain_linears": True},
        "optimizer": {"learning_rate": 0.01},
        "schedule": {"kind": "constant"},
        "training": {"max_steps": 6, "global_batch_size": 8, "micro_batch_size": 4, "deterministic": True},
    }


@pytest.fixture
def write_config(settings: dict[str, Any], tmp_path: Path) -> Callable[..., Path]:
    """Write the settings, with changes given as `section__key=value`, to a file."""

    def write(**changes: Any) -> Path:
        for name, value in changes.items():
            section, key = name.split("__")
            settings.setdefault(section, {})[key] = value
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
