"""Rules about what is written about a run."""

from __future__ import annotations

from typing import Any

from framework.config.rules.registry import rule
from framework.config.sections import ProfileConfig


@rule("logging.trackers")
def _trackers_are_distinct(trackers: list[str]) -> tuple[str, str] | None:
    if len(set(trackers)) < len(trackers):
        return "logging.trackers", "names a tracker twice"
    return None


@rule("logging.trackers", "logging.project")
def _project_needs_wandb(trackers: list[str], project: str | None) -> tuple[str, str] | None:
    return _needs_wandb("logging.project", trackers, project)


@rule("logging.trackers", "logging.run_name")
def _run_name_needs_wandb(trackers: list[str], run_name: str | None) -> tuple[str, str] | None:
    return _needs_wandb("logging.run_name", trackers, run_name)


def _needs_wandb(key: str, trackers: list[str], value: str | None) -> tuple[str, str] | None:
    if value is not None and "wandb" not in trackers:
        return key, 'has no effect without "wandb" among logging.trackers'
    return None


@rule("logging.profile", "training.max_steps")
def _profile_ends_within_run(profile: Any, max_steps: int | None) -> tuple[str, str] | None:
    if profile is None or max_steps is None:
        return None
    window = ProfileConfig.model_validate(profile)
    last = window.start + window.steps - 1
    if last > max_steps:
        return "logging.profile", f"ends with step {last}, but training.max_steps is {max_steps}"
    return None


@rule("logging.memory_snapshot", "training.max_steps")
def _snapshot_is_within_run(memory_snapshot: bool | int, max_steps: int | None) -> tuple[str, str] | None:
    if memory_snapshot is not True and max_steps is not None and memory_snapshot > max_steps:
        return "logging.memory_snapshot", f"step {memory_snapshot} is beyond training.max_steps, which is {max_steps}"
    return None
