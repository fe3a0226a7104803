"""Rules about the model, its adapter, its tokens and where it comes from."""

from __future__ import annotations

from typing import Any

from framework.config.adapters import (
    ADAPTER_METHODS,
    TRAINS_TOKEN_ROWS,
    kind_problem,
    option_problems,
    packed_problem,
)
from framework.config.rules.registry import CLASSIFICATION, rule


@rule("model.path", "model.from_config")
def _model_is_named(path: str | None, from_config: dict[str, Any] | None) -> tuple[str, str] | None:
    if path is None and from_config is None:
        return "model.path", "missing: give model.path (weights), model.from_config (random weights), or both"
    if from_config is not None and not isinstance(from_config.get("model_type"), str):
        return "model.from_config", 'needs "model_type", such as "llama"'
    return None


@rule("model.adapter.kind")
def _adapter_is_known(kind: str | None) -> tuple[str, str] | None:
    problem = None if kind is None else kind_problem(kind)
    return None if problem is None else ("model.adapter.kind", problem)


def _adapter_number(key: str, empty: float | None) -> None:
    """A rule: `rank`, `alpha` or `dropout` is given to methods that have it, which need it unless it can be `empty`."""
    name = f"model.adapter.{key}"

    @rule("model.adapter.kind", name)
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


@rule("model.adapter.kind", "model.adapter.options")
def _adapter_options_are_free(kind: str | None, options: dict[str, Any]) -> tuple[str, str] | None:
    problems = [*option_problems(kind, options)] if kind in ADAPTER_METHODS else []
    if not problems:
        return None
    (name, first), *others = problems
    more = "".join(f"; {other}: {problem}" for other, problem in others)
    return f"model.adapter.options.{name}", first + more


@rule("model.quantization", "model.adapter.kind", "model.adapter.options")
def _quantised_weights_are_adapted(
    quantization: str | None, kind: str | None, options: dict[str, Any] | None
) -> tuple[str, str] | None:
    if quantization is None:
        return None
    if kind is None:
        return "model.quantization", f'"{quantization}" needs model.adapter: quantised weights cannot be trained'
    problem = packed_problem(kind, options or {}) if kind in ADAPTER_METHODS else None
    if problem is None:
        return None
    key, why = problem
    return f"model.adapter.{key}", f'does not go with model.quantization "{quantization}": {why}'


@rule("model.adapter.kind", "model.task")
def _adapter_trains_the_head(kind: str | None, task: str) -> tuple[str, str] | None:
    if kind == "trainable_tokens" and task in CLASSIFICATION:
        return "model.adapter.kind", (
            f'"{kind}" trains nothing but tokens, and model.task "{task}" a head too: use a method with '
            "model.adapter.modules_to_save, such as lora"
        )
    return None


@rule("model.added_tokens", "model.pad_vocabulary_to")
def _added_tokens_differ(added_tokens: list[str], pad_vocabulary_to: int | None) -> tuple[str, str] | None:
    twice = sorted({token for token in added_tokens if added_tokens.count(token) > 1})
    if twice:
        return "model.added_tokens", f"given twice: {', '.join(twice)}"
    if pad_vocabulary_to is not None and not added_tokens:
        return "model.pad_vocabulary_to", "has no effect without model.added_tokens, which changes the vocabulary"
    return None


@rule("model.added_tokens", "model.adapter.kind", "model.adapter.modules_to_save")
def _added_tokens_are_trained(
    added_tokens: list[str], kind: str | None, modules_to_save: list[str] | None
) -> tuple[str, str] | None:
    if not added_tokens or kind not in ADAPTER_METHODS or kind in TRAINS_TOKEN_ROWS or modules_to_save:
        return None
    return "model.added_tokens", (
        f'kind "{kind}" cannot train single rows of the embedding: name the embedding (and the head, if it is not '
        f"tied) in model.adapter.modules_to_save, or use {' or '.join(TRAINS_TOKEN_ROWS)}"
    )


@rule("model.path", "model.tokenizer", "model.revision", "model.offline", "model.trust_remote_code")
def _hub_options_have_a_source(
    path: str | None, tokenizer: str | None, revision: str | None, offline: bool, trust_remote_code: bool
) -> tuple[str, str] | None:
    if revision is not None and path is None:
        return "model.revision", "has no effect without model.path, whose revision it is"
    for name, value in (("offline", offline), ("trust_remote_code", trust_remote_code)):
        if value and path is None and tokenizer is None:
            return f"model.{name}", "has no effect without model.path or model.tokenizer"
    return None


@rule("model.dtype", "optimizer.precision")
def _precision_sets_dtype(dtype: str | None, precision: str) -> tuple[str, str] | None:
    implied = "bfloat16" if precision == "pure_bf16" else "float32"
    if dtype in (None, implied):
        return None
    return "model.dtype", (
        f'"{dtype}" contradicts optimizer.precision "{precision}", which holds weights in {implied}: '
        "leave model.dtype out, or change the precision"
    )


@rule("model.task", "model.tokenizer")
def _images_have_no_tokenizer(task: str, tokenizer: str | None) -> tuple[str, str] | None:
    if tokenizer is not None and task == "image_classification":
        return "model.tokenizer", "has no effect on images: leave it out"
    return None


@rule("model.task", "model.added_tokens")
def _images_have_no_tokens_to_add(task: str, added_tokens: list[str]) -> tuple[str, str] | None:
    if added_tokens and task == "image_classification":
        return "model.added_tokens", "a model of images has no tokenizer and no embedding of tokens: leave it out"
    return None
