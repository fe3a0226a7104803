"""Checks over several keys.

Each rule names the keys it reads and is run only where all of them are valid by themselves, so that its findings are
reported together with those of single keys and never follow from them.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from framework.config.adapters import ADAPTER_METHODS, TRAINS_TOKEN_ROWS, kind_problem, option_problems
from framework.config.sections import (
    CheckpointConfig,
    EarlyStoppingConfig,
    LossScaleConfig,
    ParameterGroupConfig,
    ProfileConfig,
    Sources,
    TrainingConfig,
    data_sources,
)

TASK_METRICS = {"sequence_classification": ("accuracy",), "image_classification": ("accuracy",)}
"""What an evaluation gives beside the loss, for each task that has such a figure; higher is better for all of them."""

Check = Callable[..., tuple[str, str] | None]

CLASSIFICATION = ("sequence_classification", "image_classification")
"""Tasks with one class a sample, which the model reads from a pooled token."""

TASK_FORMATS = {
    "masked_lm": "text",
    "sequence_classification": "classification",
    "image_classification": "image_folder",
}
"""The one format of each task that has no choice of them."""


@dataclass(frozen=True)
class Rule:
    """A check over the values of `keys` (dotted) that returns the key to change and the problem, or None."""

    keys: tuple[str, ...]
    check: Check


RULES: list[Rule] = []


def _rule(*keys: str) -> Callable[[Check], Check]:
    def register(check: Check) -> Check:
        RULES.append(Rule(keys, check))
        return check

    return register


def broken_rules(value_of: Callable[..., Any]) -> list[tuple[str, str]]:
    """Run all rules and return (key, problem) for each broken one.

    Args:
        value_of: gives the value of a key by its parts (`"model", "adapter", "rank"`; None inside a section that is
            null), or raises LookupError where it has no valid one; rules that read it are not run.
    """
    findings = []
    for rule in RULES:
        try:
            values = [value_of(*key.split(".")) for key in rule.keys]
        except LookupError:
            continue
        if finding := rule.check(*values):
            findings.append(finding)
    return findings


@_rule("model.path", "model.from_config")
def _model_is_named(path: str | None, from_config: dict[str, Any] | None) -> tuple[str, str] | None:
    if path is None and from_config is None:
        return "model.path", "missing: give model.path (weights), model.from_config (random weights), or both"
    if from_config is not None and not isinstance(from_config.get("model_type"), str):
        return "model.from_config", 'needs "model_type", such as "llama"'
    return None


@_rule("model.adapter.kind")
def _adapter_is_known(kind: str | None) -> tuple[str, str] | None:
    problem = None if kind is None else kind_problem(kind)
    return None if problem is None else ("model.adapter.kind", problem)


def _adapter_number(key: str, empty: float | None) -> None:
    """A rule: `rank`, `alpha` or `dropout` is given to methods that have it, which need it unless it can be `empty`."""
    name = f"model.adapter.{key}"

    @_rule("model.adapter.kind", name)
    def check(kind: str | None, value: float | None) -> tuple[str, str] | None:
        if kind not in ADAPTER_METHODS:
            return None
        method = ADAPTER_METHODS[kind]
        has_it = getattr(method, key) is not None
        if value == empty and has_it and empty is None and method.instead_of_rank is None:
            return name, f'missing: kind "{kind}" needs a number'
        if value != empty and not has_it:
            return name, f'kind "{kind}" has no {key}: leave it out'
        return None


_adapter_number("rank", None)
_adapter_number("alpha", None)
_adapter_number("dropout", 0.0)


@_rule("model.adapter.kind", "model.adapter.options")
def _adapter_options_are_free(kind: str | None, options: dict[str, Any]) -> tuple[str, str] | None:
    problems = [*option_problems(kind, options)] if kind in ADAPTER_METHODS else []
    if not problems:
        return None
    (name, first), *others = problems
    more = "".join(f"; {other}: {problem}" for other, problem in others)
    return f"model.adapter.options.{name}", first + more


@_rule("model.adapter.kind", "model.task")
def _adapter_trains_the_head(kind: str | None, task: str) -> tuple[str, str] | None:
    if kind == "trainable_tokens" and task in CLASSIFICATION:
        return "model.adapter.kind", (
            f'"{kind}" trains nothing but tokens, and model.task "{task}" a head too: use a method with '
            "model.adapter.modules_to_save, such as lora"
        )
    return None


@_rule("model.added_tokens", "model.pad_vocabulary_to")
def _added_tokens_differ(added_tokens: list[str], pad_vocabulary_to: int | None) -> tuple[str, str] | None:
    twice = sorted({token for token in added_tokens if added_tokens.count(token) > 1})
    if twice:
        return "model.added_tokens", f"given twice: {', '.join(twice)}"
    if pad_vocabulary_to is not None and not added_tokens:
        return "model.pad_vocabulary_to", "has no effect without model.added_tokens, which changes the vocabulary"
    return None


@_rule("model.added_tokens", "model.adapter.kind", "model.adapter.modules_to_save")
def _added_tokens_are_trained(
    added_tokens: list[str], kind: str | None, modules_to_save: list[str] | None
) -> tuple[str, str] | None:
    if not added_tokens or kind not in ADAPTER_METHODS or kind in TRAINS_TOKEN_ROWS or modules_to_save:
        return None
    return "model.added_tokens", (
        f'kind "{kind}" cannot train single rows of the embedding: name the embedding (and the head, if it is not '
        f"tied) in model.adapter.modules_to_save, or use {' or '.join(TRAINS_TOKEN_ROWS)}"
    )


@_rule("model.path", "model.tokenizer", "model.revision", "model.offline", "model.trust_remote_code")
def _hub_options_have_a_source(
    path: str | None, tokenizer: str | None, revision: str | None, offline: bool, trust_remote_code: bool
) -> tuple[str, str] | None:
    if revision is not None and path is None:
        return "model.revision", "has no effect without model.path, whose revision it is"
    for name, value in (("offline", offline), ("trust_remote_code", trust_remote_code)):
        if value and path is None and tokenizer is None:
            return f"model.{name}", "has no effect without model.path or model.tokenizer"
    return None


@_rule("model.dtype", "optimizer.precision")
def _precision_sets_dtype(dtype: str | None, precision: str) -> tuple[str, str] | None:
    implied = "bfloat16" if precision == "pure_bf16" else "float32"
    if dtype in (None, implied):
        return None
    return "model.dtype", (
        f'"{dtype}" contradicts optimizer.precision "{precision}", which holds weights in {implied}: '
        "leave model.dtype out, or change the precision"
    )


@_rule("training.max_steps", "training.epochs")
def _one_measure_of_length(max_steps: int | None, epochs: float | None) -> tuple[str, str] | None:
    if max_steps is None and epochs is None:
        return "training.max_steps", "missing: give training.max_steps, or training.epochs"
    if max_steps is not None and epochs is not None:
        return "training.epochs", f"contradicts training.max_steps, which is {max_steps}: leave one of them out"
    return None


@_rule("schedule.warmup_steps", "schedule.warmup_ratio")
def _one_measure_of_warmup(warmup_steps: int, warmup_ratio: float | None) -> tuple[str, str] | None:
    if warmup_steps and warmup_ratio is not None:
        return "schedule.warmup_ratio", f"contradicts schedule.warmup_steps, which is {warmup_steps}: leave one out"
    return None


@_rule("training.non_finite", "training.max_skipped_steps")
def _bound_needs_skipping(non_finite: str, max_skipped_steps: int) -> tuple[str, str] | None:
    if non_finite == "stop" and max_skipped_steps != TrainingConfig.model_fields["max_skipped_steps"].default:
        return "training.max_skipped_steps", 'needs training.non_finite "skip", which is "stop"'
    return None


@_rule("training.eval_before_training", "data.eval")
def _evaluation_needs_data(before: bool, data: Any) -> tuple[str, str] | None:
    return ("training.eval_before_training", "needs data.eval") if before and data is None else None


@_rule("training.early_stopping", "training.eval_every_steps", "data.eval", "model.task")
def _early_stopping_evaluates(early_stopping: Any, every: int, data: Any, task: str) -> tuple[str, str] | None:
    if early_stopping is None:
        return None
    metric = EarlyStoppingConfig.model_validate(early_stopping).metric
    return _compares_evaluations("training.early_stopping", "metric", metric, every, data, task)


@_rule("checkpoint.keep_best", "checkpoint.best_metric", "training.eval_every_steps", "data.eval", "model.task")
def _best_is_evaluated(keep_best: int, metric: str, every: int, data: Any, task: str) -> tuple[str, str] | None:
    if keep_best == 0:
        default = CheckpointConfig.model_fields["best_metric"].default
        return ("checkpoint.best_metric", "needs checkpoint.keep_best of at least 1") if metric != default else None
    return _compares_evaluations("checkpoint.keep_best", "checkpoint.best_metric", metric, every, data, task)


def _compares_evaluations(
    key: str, metric_key: str, metric: str, every: int, data: Any, task: str
) -> tuple[str, str] | None:
    """What `key`, which compares evaluations of a run by a metric, needs."""
    metrics = ("loss", *TASK_METRICS.get(task, ()))
    if data is None or every == 0:
        missing = "data.eval" if data is None else "training.eval_every_steps of at least 1"
        return key, f"compares evaluations on the way: needs {missing}"
    if metric not in metrics:
        return key, f'{metric_key} "{metric}" is not measured with model.task "{task}", but {", ".join(metrics)}'
    return None


@_rule("optimizer.weight_decay", "optimizer.decay_embeddings")
def _embeddings_are_spared_some_decay(weight_decay: float, decay_embeddings: bool) -> tuple[str, str] | None:
    if not decay_embeddings and weight_decay == 0:
        return "optimizer.decay_embeddings", "has no effect with optimizer.weight_decay 0"
    return None


@_rule("optimizer.groups")
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


@_rule("optimizer.precision", "optimizer.loss_scale")
def _only_fp16_is_scaled(precision: str, scale: Any) -> tuple[str, str] | None:
    if scale is not None and precision != "fp16":
        return "optimizer.loss_scale", f'needs optimizer.precision "fp16", which is "{precision}"'
    if scale is None or isinstance(scale, float | int):
        return None
    options = LossScaleConfig.model_validate(scale)
    if options.initial < options.minimum:
        return "optimizer.loss_scale", f"initial {options.initial} is below minimum {options.minimum}"
    return None


@_rule("selection.strategy", "selection.ratio")
def _ratio_suits_strategy(strategy: str, ratio: float | str | None) -> tuple[str, str] | None:
    if ratio == "labelled" and strategy != "supervised":
        return "selection.ratio", f'"labelled" needs selection.strategy "supervised", which is "{strategy}"'
    if strategy == "none" and ratio not in (None, 1.0):
        return "selection.ratio", f'{ratio} has no effect with selection.strategy "none": name a strategy'
    if strategy in ("uniform", "bernoulli") and ratio is None:
        return "selection.ratio", f'missing: selection.strategy "{strategy}" needs a number in (0, 1]'
    return None


@_rule("selection.strategy", "selection.tokentune")
def _tokentune_is_uniform(strategy: str, tokentune: bool) -> tuple[str, str] | None:
    if tokentune and strategy != "uniform":
        return "selection.tokentune", f'needs selection.strategy "uniform", which is "{strategy}"'
    return None


@_rule("selection.strategy", "selection.ratio", "retention.policy")
def _selection_needs_selective(strategy: str, ratio: float | str | None, policy: str) -> tuple[str, str] | None:
    if strategy == "none" or ratio == 1.0 or policy == "selective":
        return None
    return "retention.policy", (
        f'"{policy}" is for exact training, but selection.strategy "{strategy}" without selection.ratio 1.0 '
        'leaves tokens out: set retention.policy "selective", or selection.strategy "none"'
    )


@_rule("retention.policy", "retention.retain_linears")
def _retain_linears_needs_selective(policy: str, retain_linears: bool) -> tuple[str, str] | None:
    if retain_linears and policy != "selective":
        return "retention.retain_linears", f'needs retention.policy "selective", which is "{policy}"'
    return None


@_rule("retention.policy", "retention.kv_format")
def _kv_format_needs_selective(policy: str, kv_format: str) -> tuple[str, str] | None:
    if kv_format != "model" and policy != "selective":
        return "retention.kv_format", f'"{kv_format}" needs retention.policy "selective", which is "{policy}"'
    return None


@_rule("sharding.engine", "sharding.offload_optimizer")
def _single_engine_keeps_optimizer(engine: str, offload_optimizer: bool) -> tuple[str, str] | None:
    if engine == "single" and offload_optimizer:
        return "sharding.offload_optimizer", 'sharding.engine "single" cannot offload: set it to false'
    return None


@_rule("data.train", "data.eval", "data.format", "data.train_on")
def _train_on_is_for_conversations(
    train: Sources, eval: Sources | None, format: str, train_on: str
) -> tuple[str, str] | None:
    formats = {source.format or format for source in (*data_sources(train), *data_sources(eval))}
    if train_on == "assistant" or formats & {"auto", "messages", "sharegpt", "alpaca", "completion"}:
        return None
    return "data.train_on", f'"{train_on}" has no effect on the format {" or ".join(sorted(formats))}: leave it out'


@_rule("training.global_batch_size", "training.micro_batch_size")
def _micro_batch_divides(global_batch_size: int, micro_batch_size: int) -> tuple[str, str] | None:
    if global_batch_size % micro_batch_size:
        return "training.micro_batch_size", (
            f"{micro_batch_size} does not divide training.global_batch_size, which is {global_batch_size}"
        )
    return None


@_rule("data.train")
def _all_sources_are_weighted(train: Sources) -> tuple[str, str] | None:
    sources = data_sources(train)
    unweighted = [source.path for source in sources if source.weight is None]
    if unweighted and len(unweighted) < len(sources):
        return (
            "data.train",
            f"some sources have a weight, but not {', '.join(unweighted)}: give all of them one, or none",
        )
    return None


@_rule("data.eval")
def _evaluation_has_no_weights(eval: Sources | None) -> tuple[str, str] | None:
    if any(source.weight is not None for source in data_sources(eval)):
        return "data.eval", "a weight has no effect in evaluation, which takes every sample once: leave it out"
    return None


@_rule("data.eval", "data.eval_fraction")
def _one_evaluation_set(eval: Sources | None, eval_fraction: float | None) -> tuple[str, str] | None:
    if eval is not None and eval_fraction is not None:
        return "data.eval_fraction", "contradicts data.eval: give the evaluation data, or hold some of data.train out"
    return None


@_rule("model.task", "data.format", "data.train", "data.eval")
def _formats_suit_task(task: str, format: str, train: Sources, eval: Sources | None) -> tuple[str, str] | None:
    wanted = TASK_FORMATS.get(task)
    formats: dict[str, set[str | None]] = {"data.format": {format}}
    formats["data.train"] = {source.format for source in data_sources(train)}
    formats["data.eval"] = {source.format for source in data_sources(eval)}
    for key, named in formats.items():
        for each in sorted(named - {None, "auto", wanted}, key=str):
            if wanted is not None:
                return key, f'the format "{each}" is not for model.task "{task}", whose format is "{wanted}"'
            if each in ("classification", "image_folder"):
                owner = next(name for name, its in TASK_FORMATS.items() if its == each)
                return key, f'the format "{each}" needs model.task "{owner}", which is "{task}"'
    return None


@_rule("model.task", "data.train", "data.eval")
def _images_are_in_directories(task: str, train: Sources, eval: Sources | None) -> tuple[str, str] | None:
    if task == "image_classification":
        for key, sources in (("data.train", data_sources(train)), ("data.eval", data_sources(eval))):
            if any(source.subset or source.split or source.revision for source in sources):
                return key, "subset, split and revision have no effect on directories of images: leave them out"
    return None


@_rule("model.task", "data.train_on")
def _turns_are_causal(task: str, train_on: str) -> tuple[str, str] | None:
    if train_on != "assistant" and task != "causal_lm":
        return "data.train_on", f'needs model.task "causal_lm", which is "{task}"'
    return None


@_rule("model.task", "data.cache_dir")
def _classes_are_not_cached(task: str, cache_dir: str | None) -> tuple[str, str] | None:
    if cache_dir not in (None, "auto") and task in CLASSIFICATION:
        return "data.cache_dir", f'has no effect with model.task "{task}", whose tokens are in memory: leave it out'
    return None


@_rule("model.task", "data.sequence_length")
def _tokens_have_a_limit(task: str, sequence_length: int | None) -> tuple[str, str] | None:
    if task == "image_classification":
        if sequence_length is not None:
            return (
                "data.sequence_length",
                "has no effect on images, whose number of tokens the model sets: leave it out",
            )
        return None
    return ("data.sequence_length", "missing, expected an integer of at least 2") if sequence_length is None else None


@_rule("model.task", "data.packing")
def _packing_is_causal(task: str, packing: bool) -> tuple[str, str] | None:
    if packing and task != "causal_lm":
        return "data.packing", f'needs model.task "causal_lm", which is "{task}": one sample a row here'
    return None


@_rule("model.task", "data.overlong")
def _images_are_never_overlong(task: str, overlong: str) -> tuple[str, str] | None:
    if overlong != "drop" and task == "image_classification":
        return "data.overlong", "has no effect on images: leave it out"
    return None


@_rule("model.task", "model.tokenizer")
def _images_have_no_tokenizer(task: str, tokenizer: str | None) -> tuple[str, str] | None:
    if tokenizer is not None and task == "image_classification":
        return "model.tokenizer", "has no effect on images: leave it out"
    return None


@_rule("model.task", "model.added_tokens")
def _images_have_no_tokens_to_add(task: str, added_tokens: list[str]) -> tuple[str, str] | None:
    if added_tokens and task == "image_classification":
        return "model.added_tokens", "a model of images has no tokenizer and no embedding of tokens: leave it out"
    return None


@_rule("model.task", "data.label_names")
def _labels_are_for_classes(task: str, label_names: list[str] | None) -> tuple[str, str] | None:
    if label_names is None:
        return None
    if task not in CLASSIFICATION:
        return "data.label_names", f'has no effect with model.task "{task}": it is for {" and ".join(CLASSIFICATION)}'
    repeated = sorted({name for name in label_names if label_names.count(name) > 1})
    return ("data.label_names", f"repeats {', '.join(repeated)}") if repeated else None


@_rule("model.task", "data.mask_probability")
def _masks_are_for_masked_lm(task: str, mask_probability: float | None) -> tuple[str, str] | None:
    if mask_probability is not None and task != "masked_lm":
        return "data.mask_probability", f'needs model.task "masked_lm", which is "{task}"'
    return None


@_rule("model.task", "data.augmentation")
def _augmentation_is_for_images(task: str, augmentation: str) -> tuple[str, str] | None:
    if augmentation != "none" and task != "image_classification":
        return "data.augmentation", f'needs model.task "image_classification", which is "{task}"'
    return None


@_rule("model.task", "selection.normalization")
def _one_label_a_sample_needs_no_weights(task: str, normalization: str) -> tuple[str, str] | None:
    if normalization != "supervised" and task in CLASSIFICATION:
        return "selection.normalization", (
            f'"{normalization}" has no effect with model.task "{task}": the pooled token, which alone carries a label, '
            "is always selected"
        )
    return None


@_rule("logging.trackers")
def _trackers_are_distinct(trackers: list[str]) -> tuple[str, str] | None:
    if len(set(trackers)) < len(trackers):
        return "logging.trackers", "names a tracker twice"
    return None


@_rule("logging.trackers", "logging.project")
def _project_needs_wandb(trackers: list[str], project: str | None) -> tuple[str, str] | None:
    return _needs_wandb("logging.project", trackers, project)


@_rule("logging.trackers", "logging.run_name")
def _run_name_needs_wandb(trackers: list[str], run_name: str | None) -> tuple[str, str] | None:
    return _needs_wandb("logging.run_name", trackers, run_name)


def _needs_wandb(key: str, trackers: list[str], value: str | None) -> tuple[str, str] | None:
    if value is not None and "wandb" not in trackers:
        return key, 'has no effect without "wandb" among logging.trackers'
    return None


@_rule("logging.profile", "training.max_steps")
def _profile_ends_within_run(profile: Any, max_steps: int | None) -> tuple[str, str] | None:
    if profile is None or max_steps is None:
        return None
    window = ProfileConfig.model_validate(profile)
    last = window.start + window.steps - 1
    if last > max_steps:
        return "logging.profile", f"ends with step {last}, but training.max_steps is {max_steps}"
    return None


@_rule("logging.memory_snapshot", "training.max_steps")
def _snapshot_is_within_run(memory_snapshot: bool | int, max_steps: int | None) -> tuple[str, str] | None:
    if memory_snapshot is not True and max_steps is not None and memory_snapshot > max_steps:
        return "logging.memory_snapshot", f"step {memory_snapshot} is beyond training.max_steps, which is {max_steps}"
    return None
