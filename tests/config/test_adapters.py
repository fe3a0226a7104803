"""Keys of `model.adapter` and what each method takes of them, found without PEFT."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest

from framework.config import load_config
from framework.config.adapters import ADAPTER_METHODS, REFUSED_INITS, REFUSED_METHODS, REFUSED_OPTIONS

Problems = Callable[..., list[str]]


def adapter(**values: Any) -> str:
    return f"model.adapter={json.dumps(values)}"


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({"kind": "lroa"}, 'kind: "lroa" is no adapter method, did you mean road or lora?'),
        (
            {"kind": "prefix_tuning"},
            'kind: "prefix_tuning" is not supported: it puts trained keys and values before the text, which a block '
            "cannot retain or replay",
        ),
        ({"kind": "bone"}, 'kind: "bone" is not supported: PEFT calls it "miss"'),
        ({"kind": "lora", "alpha": 1}, 'rank: missing: kind "lora" needs a number'),
        ({"kind": "lora", "rank": 1}, 'alpha: missing: kind "lora" needs a number'),
        ({"kind": "ia3", "rank": 4}, 'rank: kind "ia3" has no rank: leave it out'),
        ({"kind": "hra", "rank": 4, "alpha": 2}, 'alpha: kind "hra" has no alpha: leave it out'),
        ({"kind": "hra", "rank": 4, "dropout": 0.1}, 'dropout: kind "hra" has no dropout: leave it out'),
        ({"kind": "lora", "rank": 4, "alpha": 8, "options": {"r": 8}}, "options.r: set model.adapter.rank"),
        (
            {"kind": "lora", "rank": 4, "alpha": 8, "options": {"lora_alpha": 8, "inference_mode": True}},
            "options.lora_alpha: set model.adapter.alpha; inference_mode: cannot be set: it would train nothing",
        ),
        (
            {"kind": "lora", "rank": 4, "alpha": 8, "options": {"init_lora_weights": "eva"}},
            'options.init_lora_weights: "eva" is not supported: it needs a pass over data before training',
        ),
        (
            {"kind": "dora", "rank": 4, "alpha": 8, "options": {"use_dora": False}},
            'options.use_dora: kind "dora" says it',
        ),
        (
            {"kind": "oft", "options": {"module_dropout": 0.1}},
            "options.module_dropout: cannot be set: PEFT 0.21 takes it and never applies it",
        ),
    ],
)
def test_what_a_method_does_not_take(small: Path, values: dict[str, Any], expected: str, problems: Problems) -> None:
    assert problems(small, adapter(**values)) == [f"--set: model.adapter.{expected}"]


def test_problems_of_an_adapter_are_reported_together(small: Path, problems: Problems) -> None:
    found = problems(small, adapter(kind="ia3", rank=0, alpha=2, dropot=0.1, options={"peft_type": "LORA"}))
    assert found == [
        "--set: model.adapter.rank: expected an integer of at least 1, or null, got 0",
        "--set: model.adapter.dropot: unknown key, did you mean model.adapter.dropout?",
        '--set: model.adapter.alpha: kind "ia3" has no alpha: leave it out',
        "--set: model.adapter.options.peft_type: cannot be set: model.adapter.kind says it",
    ]


def test_methods_load_with_what_they_need(small: Path) -> None:
    for kind, method in ADAPTER_METHODS.items():
        numbers = {"rank": method.rank, "alpha": method.alpha}
        values = {name: 4 for name, option in numbers.items() if option is not None}
        loaded = load_config(small, [adapter(kind=kind, **values)]).model.adapter
        assert loaded is not None and loaded.kind == kind
    assert load_config(small, [adapter(kind="oft")]).model.adapter is not None


def test_tables_agree_with_peft() -> None:
    """Every method of the installed PEFT is taken or refused with a reason, and every named option exists there."""
    from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING

    known = {method.peft_type.lower() for method in ADAPTER_METHODS.values()}
    assert {kind.value.lower() for kind in PEFT_TYPE_TO_CONFIG_MAPPING} <= known | REFUSED_METHODS.keys()
    assert not known & REFUSED_METHODS.keys()
    every_option: set[str] = set()
    for kind, method in ADAPTER_METHODS.items():
        options = {field.name for field in fields(PEFT_TYPE_TO_CONFIG_MAPPING[method.peft_type])}
        every_option |= options
        own = {method.rank, method.alpha, method.dropout, method.instead_of_rank, *method.fixed, *method.refused}
        assert own - {None} <= options, kind
        # A number that PEFT has under its usual name is not left out.
        assert ("r" in options) <= (method.rank is not None or kind in ("supertuning", "ia3")), kind
    assert REFUSED_OPTIONS.keys() <= every_option
    assert REFUSED_INITS.keys() == {"eva", "corda", "lora_ga", "loftq", "mica"}


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (['model.added_tokens=["<a>", "<b>", "<a>"]'], "model.added_tokens: given twice: <a>"),
        (
            ["model.pad_vocabulary_to=64"],
            "model.pad_vocabulary_to: has no effect without model.added_tokens, which changes the vocabulary",
        ),
        (
            ['model.added_tokens=["<a>"]', adapter(kind="ia3")],
            'model.added_tokens: kind "ia3" cannot train single rows of the embedding: name the embedding (and the '
            "head, if it is not tied) in model.adapter.modules_to_save, or use lora or dora or trainable_tokens",
        ),
        (
            ["model.task=image_classification", "data.sequence_length=null", 'model.added_tokens=["<a>"]'],
            "model.added_tokens: a model of images has no tokenizer and no embedding of tokens: leave it out",
        ),
        (
            ["model.task=sequence_classification", adapter(kind="trainable_tokens")],
            'model.adapter.kind: "trainable_tokens" trains nothing but tokens, and model.task '
            '"sequence_classification" a head too: use a method with model.adapter.modules_to_save, such as lora',
        ),
        (
            ["model.path=null", 'model.from_config={"model_type": "llama"}', "model.revision=v1"],
            "model.revision: has no effect without model.path, whose revision it is",
        ),
        (
            ["model.path=null", 'model.from_config={"model_type": "llama"}', "model.offline=true"],
            "model.offline: has no effect without model.path or model.tokenizer",
        ),
        (
            ["model.path=null", 'model.from_config={"model_type": "llama"}', "model.trust_remote_code=true"],
            "model.trust_remote_code: has no effect without model.path or model.tokenizer",
        ),
    ],
)
def test_keys_of_the_model_without_effect(small: Path, overrides: list[str], expected: str, problems: Problems) -> None:
    assert problems(small, *overrides) == [f"--set: {expected}"]


def test_offline_leaves_the_hash_of_a_run(small: Path) -> None:
    assert load_config(small, ["model.offline=true"]).sha256() == load_config(small).sha256()
    assert load_config(small, ["model.revision=v1"]).sha256() != load_config(small).sha256()
