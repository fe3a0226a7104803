"""A job with everything but offloading left to the planner."""

from __future__ import annotations

from typing import Any

from changed_settings import change

from framework.config import Config

OPEN: dict[str, dict[str, Any]] = {
    "run": {"output_dir": "runs/open"},
    "model": {"path": "some/model"},
    "data": {"train": "train.jsonl", "sequence_length": 1024},
    "selection": {"strategy": "supervised", "ratio": "auto"},
    "retention": {"policy": "auto"},
    "sharding": {"engine": "auto", "zero_stage": "auto", "offload_optimizer": False},
    "optimizer": {"learning_rate": 1e-4, "precision": "fp32_master"},
    "training": {"max_steps": 10, "global_batch_size": 64, "micro_batch_size": "auto"},
    "hardware": {"nodes": 2, "gpus_per_node": 4},
}


def open_job(**changes: Any) -> Config:
    """The job, with changes given as `section__key=value`; `...` leaves the key out."""
    settings = {section: dict(keys) for section, keys in OPEN.items()}
    change(settings, changes)
    return Config.model_validate(settings)
