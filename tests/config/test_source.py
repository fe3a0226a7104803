"""JSON text, files and overrides."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from framework.config import load_config

Write = Callable[[str], Path]
Problems = Callable[..., list[str]]


@pytest.mark.parametrize(
    ("value", "shown"),
    [("NaN", "NaN"), ("-Infinity", "-Infinity"), ("1e999", "Infinity")],
)
def test_numbers_are_finite(
    small: Path, value: str, shown: str, write: Write, problems: Problems, settings: dict[str, Any]
) -> None:
    assert problems(small, f"optimizer.weight_decay={value}") == [
        f"--set: optimizer.weight_decay: {shown} is not a finite number"
    ]
    text = json.dumps(settings).replace(
        '{"path": "some/model"}', f'{{"from_config": {{"model_type": "a", "b": [{value}]}}}}'
    )
    assert problems(write(text)) == [f"line 1: model.from_config.b[0]: {shown} is not a finite number"]


def test_overrides(small: Path) -> None:
    config = load_config(
        small,
        [
            "run.output_dir=runs/a=b",
            'data.train=["a.jsonl", "b.jsonl"]',
            "training.max_steps=5",
            "training.max_steps=6",
            "training.max_grad_norm=null",
            "optimizer.betas=[0.8, 0.9]",
            "model.adapter.kind=lora",
            "model.adapter.rank=4",
            "model.adapter.alpha=8",
            "model.from_config.model_type=llama",
            "model.from_config.vocab_size=128",
            "logging.track_cpu_memory=true",
        ],
    )
    assert config.run.output_dir == "runs/a=b"
    assert config.data.train == ["a.jsonl", "b.jsonl"]
    assert config.training.max_steps == 6
    assert config.training.max_grad_norm is None
    assert config.optimizer.betas == (0.8, 0.9)
    assert config.model.adapter is not None
    assert (config.model.adapter.rank, config.model.adapter.alpha) == (4, 8.0)
    assert config.model.from_config == {"model_type": "llama", "vocab_size": 128}
    assert config.logging.track_cpu_memory
    assert load_config(small, ["model.adapter.rank=4", "model.adapter=null"]).model.adapter is None


def test_bad_overrides_are_reported_with_the_rest(small: Path, problems: Problems) -> None:
    adapter = ["model.adapter.kind=lora", "model.adapter.rank=4"]
    assert problems(small, "training.max_steps", "data.train.0=a", ".x=1", "run.seed=-1", *adapter) == [
        "--set: run.seed: expected an integer of at least 0 and below 9223372036854775808, got -1",
        '--set: model.adapter.alpha: missing: kind "lora" needs a number',
        '--set: "training.max_steps" is not KEY=VALUE, such as training.max_steps=100',
        '--set: data.train.0: data.train is the string "train.jsonl", which has no keys',
        '--set: ".x=1" is not KEY=VALUE, such as training.max_steps=100',
    ]


def test_override_mends_the_file(write: Write, settings: dict[str, Any]) -> None:
    bad = settings | {"training": settings["training"] | {"max_steps": "ten"}}
    assert load_config(write(json.dumps(bad)), ["training.max_steps=10"]).training.max_steps == 10


def test_key_given_twice(write: Write, problems: Problems, settings: dict[str, Any]) -> None:
    text = json.dumps(settings, indent=1).replace('"max_steps": 10,', '"max_steps": 10,\n  "max_steps": 20,')
    first = next(index for index, line in enumerate(text.splitlines(), start=1) if "max_steps" in line)
    path = write(text)
    assert problems(path) == [f"line {first + 1}: training.max_steps: given twice, before in line {first}"]
    assert load_config(path, ["training.max_steps=30"]).training.max_steps == 30
    same_key_elsewhere = settings | {
        "model": {"from_config": {"model_type": "a", "x": [{"y": 1}, {"y": [2, {"y": 3}]}]}}
    }
    load_config(write(json.dumps(same_key_elsewhere)))


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ('{\n  "run" {"seed": 1}\n}', "line 2, column 9: not JSON: Expecting ':' delimiter"),
        ("", "line 1, column 1: not JSON: Expecting value"),
        ("[1]", "a config is a JSON object, not the list [1]"),
        ("[" * 100_000, "not a config: nested too deeply"),
    ],
)
def test_text_that_is_not_a_config(text: str, problem: str, write: Write, problems: Problems) -> None:
    assert problems(write(text)) == [problem]


def test_file_that_cannot_be_read(tmp_path: Path, problems: Problems) -> None:
    assert problems(tmp_path / "none.json") == ["no such file"]
    assert problems(tmp_path) == ["cannot be read: Is a directory"]
    path = tmp_path / "latin.json"
    path.write_bytes('{"run": "é"}'.encode("latin-1"))
    assert problems(path) == ["not UTF-8 text: 0xe9 at byte 9"]


def test_byte_order_mark_is_read(tmp_path: Path, settings: dict[str, Any]) -> None:
    path = tmp_path / "bom.json"
    path.write_text(json.dumps(settings), encoding="utf-8-sig")
    assert load_config(path).training.max_steps == 10


def test_half_of_a_surrogate_pair_is_refused(small: Path, problems: Problems) -> None:
    (problem,) = problems(small, r'run.output_dir="\ud800"')
    assert problem.startswith("config: Invalid JSON: ")
