"""Rules about steps, evaluations and the optimiser."""

from __future__ import annotations

import re
from typing import Any

from framework.config.rules.registry import TASK_METRICS, rule
from framework.config.sections import (
    CheckpointConfig,
    EarlyStoppingConfig,
    LossScaleConfig,
    ParameterGroupConfig,
    TrainingConfig,
)

EVALUATION_DATA = ("data.eval", "data.eval_fraction")
_NEEDED_DATA = "data.eval or data.eval_fraction"


@rule("training.max_steps", "training.epochs")
def _one_measure_of_length(max_steps: int | None, epochs: float | None) -> tuple[str, str] | None:
    if max_steps is None and epochs is None:
        return "training.max_steps", "missing: give training.max_steps, or training.epochs"
    if max_steps is not None and epochs is not None:
        return "training.epochs", f"contradicts training.max_steps, which is {max_steps}: leave one of them out"
    return None


@rule("schedule.warmup_steps", "schedule.warmup_ratio")
def _one_measure_of_warmup(warmup_steps: int, warmup_ratio: float | None) -> tuple[str, str] | None:
    if warmup_steps and warmup_ratio is not None:
        return "schedule.warmup_ratio", f"contradicts schedule.warmup_steps, which is {warmup_steps}: leave one out"
    return None


@rule("training.compile", "sharding.engine", "sharding.zero_stage")
def _stage_three_is_not_compiled(compile: bool, engine: str, zero_stage: int | str | None) -> tuple[str, str] | None:
    if compile and engine == "deepspeed" and zero_stage in (None, 3):
        return "training.compile", (
            "sharding.zero_stage 3 gathers weights by hooks inside of blocks, which cannot be compiled: set it to "
            'false, or sharding.engine to "fsdp", which shards as much'
        )
    return None


@rule("training.compile", "logging.track_cpu_memory")
def _compiled_operators_are_not_seen(compile: bool, track: bool) -> tuple[str, str] | None:
    if compile and track:
        return "logging.track_cpu_memory", "cannot see into operators that training.compile fuses: set it to false"
    return None


@rule("training.non_finite", "training.max_skipped_steps")
def _bound_needs_skipping(non_finite: str, max_skipped_steps: int) -> tuple[str, str] | None:
    if non_finite == "stop" and max_skipped_steps != TrainingConfig.model_fields["max_skipped_steps"].default:
        return "training.max_skipped_steps", 'needs training.non_finite "skip", which is "stop"'
    return None


@rule("training.eval_every_steps", "training.eval_before_training", *EVALUATION_DATA)
def _evaluation_needs_data(every: int, before: bool, data: Any, fraction: float | None) -> tuple[str, str] | None:
    if data is not None or fraction is not None or not (every or before):
        return None
    return "training.eval_every_steps" if every else "training.eval_before_training", f"needs {_NEEDED_DATA}"


@rule("training.early_stopping", "training.eval_every_steps", "model.task", *EVALUATION_DATA)
def _early_stopping_evaluates(
    early_stopping: Any, every: int, task: str, data: Any, fraction: float | None
) -> tuple[str, str] | None:
    if early_stopping is None:
        return None
    metric = EarlyStoppingConfig.model_validate(early_stopping).metric
    has_data = data is not None or fraction is not None
    return _compares_evaluations("training.early_stopping", "metric", metric, every, has_data, task)


@rule("checkpoint.keep_best", "checkpoint.best_metric", "training.eval_every_steps", "model.task", *EVALUATION_DATA)
def _best_is_evaluated(
    keep_best: int, metric: str, every: int, task: str, data: Any, fraction: float | None
) -> tuple[str, str] | None:
    if keep_best == 0:
        default = CheckpointConfig.model_fields["best_metric"].default
        return ("checkpoint.best_metric", "needs checkpoint.keep_best of at least 1") if metric != default else None
    has_data = data is not None or fraction is not None
    return _compares_evaluations("checkpoint.keep_best", "checkpoint.best_metric", metric, every, has_data, task)


def _compares_evaluations(
    key: str, metric_key: str, metric: str, every: int, has_data: bool, task: str
) -> tuple[str, str] | None:
    """What `key`, which compares evaluations of a run by a metric, needs."""
    metrics = ("loss", *TASK_METRICS.get(task, ()))
    if not has_data or every == 0:
        missing = "training.eval_every_steps of at least 1" if has_data else _NEEDED_DATA
        return key, f"compares evaluations on the way: needs {missing}"
    if metric not in metrics:
        return key, f'{metric_key} "{metric}" is not measured with model.task "{task}", but {", ".join(metrics)}'
    return None


@rule("optimizer.weight_decay", "optimizer.decay_embeddings")
def _embeddings_are_spared_some_decay(weight_decay: float, decay_embeddings: bool) -> tuple[str, str] | None:
    if not decay_embeddings and weight_decay == 0:
        return "optimizer.decay_embeddings", "has no effect with optimizer.weight_decay 0"
    return None


@rule("optimizer.groups")
def _groups_say_something(groups: list[Any]) -> tuple[str, str] | None:
    problems = []
    for group in map(ParameterGroupConfig.model_validate, groups):
        name = f'group "{group.pattern}"'
        try:
            re.compile(group.pattern)
        except re.error as error:
            problems.append(f"{name} is not a regular expression: {error}")
        if group.learning_rate is not None and group.learning_rate_scale is not None:
            problems.append(f"{name} has both learning_rate and learning_rate_scale: leave one of them out")
        elif group.learning_rate is None and group.learning_rate_scale is None and group.weight_decay is None:
            problems.append(f"{name} needs learning_rate, learning_rate_scale or weight_decay")
    return ("optimizer.groups", "; ".join(problems)) if problems else None


@rule("optimizer.precision", "optimizer.loss_scale")
def _only_fp16_is_scaled(precision: str, scale: Any) -> tuple[str, str] | None:
    if scale is not None and precision != "fp16":
        return "optimizer.loss_scale", f'needs optimizer.precision "fp16", which is "{precision}"'
    if scale is None or isinstance(scale, float | int):
        return None
    options = LossScaleConfig.model_validate(scale)
    if options.initial < options.minimum:
        return "optimizer.loss_scale", f"initial {options.initial} is below minimum {options.minimum}"
    return None


@rule("optimizer.name", "optimizer.precision")
def _eight_bits_need_float32_weights(name: str, precision: str) -> tuple[str, str] | None:
    if name == "adamw_8bit" and precision == "pure_bf16":
        return "optimizer.name", (
            f'"{name}" does not go with optimizer.precision "{precision}": it rounds weights to the nearest, where '
            'bfloat16 ones need stochastic rounding; use "adamw", or precision "fp32_master"'
        )
    return None


@rule("training.global_batch_size", "training.micro_batch_size")
def _micro_batch_divides(global_batch_size: int, micro_batch_size: int | str) -> tuple[str, str] | None:
    if not isinstance(micro_batch_size, str) and global_batch_size % micro_batch_size:
        return "training.micro_batch_size", (
            f"{micro_batch_size} does not divide training.global_batch_size, which is {global_batch_size}"
        )
    return None
