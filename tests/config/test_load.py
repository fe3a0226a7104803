"""What a config may say, and what is said about a config that may not."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import framework
from framework.config import Config, ConfigError, load_config
from framework.errors import UserError

REPOSITORY = Path(__file__).parents[2]

SMALL: dict[str, Any] = {
    "run": {"output_dir": "runs/small"},
    "model": {"path": "some/model"},
    "data": {"train": "train.jsonl", "sequence_length": 64},
    "optimizer": {"learning_rate": 1e-3},
    "training": {"max_steps": 10, "global_batch_size": 8, "micro_batch_size": 2},
}


@pytest.fixture
def small(tmp_path: Path) -> Path:
    path = tmp_path / "small.json"
    path.write_text(json.dumps(SMALL))
    return path


def write(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "written.json"
    path.write_text(text)
    return path


def problems(path: Path, *overrides: str) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        load_config(path, overrides)
    assert caught.value.exit_code == 2
    assert isinstance(caught.value, UserError)
    return list(caught.value.problems)


def test_defaults_train_exactly(small: Path) -> None:
    config = load_config(small)
    assert (config.selection.strategy, config.selection.ratio, config.resolved_ratio) == ("none", None, 1.0)
    assert (config.retention.policy, config.retention.retain_linears, config.retention.kv_format) == (
        "all",
        False,
        "model",
    )
    assert (config.sharding.engine, config.sharding.zero_stage, config.sharding.offload_optimizer) == (
        "single",
        0,
        False,
    )
    assert config.optimizer.betas == (0.9, 0.95)
    assert config.gradient_accumulation == 4
    assert config.weights_dtype == "float32"
    assert config.training.max_grad_norm == 1.0


def test_configs_in_the_repository_load() -> None:
    paths = sorted((REPOSITORY / "configs").glob("*.json"))
    assert {path.name for path in paths} >= {"tiny.json", "llama13b.json", "llama8b-lora.json"}
    for path in paths:
        config = load_config(path)
        assert (config.selection.strategy, config.resolved_ratio) == ("supervised", "labelled")
        assert config.retention.policy == "selective"
        assert config.run.output_dir == f"runs/{path.stem}"
        assert config.weights_dtype == ("float32" if path.stem == "tiny" else "bfloat16")


def test_written_config_loads_as_the_same_config(small: Path, tmp_path: Path) -> None:
    config = load_config(small, ["model.adapter=" + json.dumps({"kind": "lora", "rank": 8, "alpha": 16})])
    again = load_config(write(tmp_path, json.dumps(config.to_json())))
    assert again == config
    assert again.model.adapter is not None
    assert again.model.adapter.target_modules == "all-linear"
    assert again.sha256() == config.sha256()


def test_hash_covers_what_determines_the_losses(small: Path) -> None:
    plain = load_config(small).sha256()
    for neutral in (
        "run.output_dir=elsewhere",
        "logging.every_steps=7",
        "checkpoint.keep_last=5",
        'hardware.gpu_memory="80GiB"',
        "optimizer.weight_decay=0",
    ):
        assert load_config(small, [neutral]).sha256() == plain
    for changed in ("run.seed=1", "optimizer.weight_decay=0.1", "training.micro_batch_size=4", "data.packing=true"):
        assert load_config(small, [changed]).sha256() != plain


def test_config_is_frozen(small: Path) -> None:
    with pytest.raises(ValueError, match="frozen"):
        load_config(small).training.max_steps = 3  # type: ignore[misc]


def test_rules_hold_for_configs_made_in_python() -> None:
    bad = SMALL | {"training": {"max_steps": 1, "global_batch_size": 8, "micro_batch_size": 3}}
    with pytest.raises(ValueError, match=r"3 does not divide training\.global_batch_size, which is 8"):
        Config.model_validate(bad)


def test_all_problems_are_reported_together_in_the_order_of_the_file(tmp_path: Path) -> None:
    path = write(
        tmp_path,
        """{
  "run": {"output_dir": ""},
  "model": {"path": "m", "rank": 8},
  "trainig": {},
  "training": {
    "max_step": 3,
    "global_batch_size": "8",
    "micro_batch_size": true,
    "deterministic": 1
  },
  "data": {"train": ["a", 1], "sequence_length": 64.0},
  "optimizer": {"learning_rate": 0, "betas": [0.9], "precision": "bf16", "momentum": 0.9},
  "selection": {"strategy": "uniform"},
  "retention": {"retain_linears": true}
}""",
    )
    expected = [
        'line 2: run.output_dir: expected a non-empty string, got the string ""',
        "line 3: model.rank: unknown key, did you mean model.adapter.rank?",
        "line 4: trainig: unknown key, did you mean training?",
        "line 5: training.max_steps: missing, expected an integer of at least 1",
        "line 6: training.max_step: unknown key, did you mean training.max_steps?",
        'line 7: training.global_batch_size: expected an integer of at least 1, got the string "8"',
        "line 8: training.micro_batch_size: expected an integer of at least 1, got true",
        "line 9: training.deterministic: expected true or false, got 1",
        "line 11: data.train: expected a non-empty string, or a non-empty list, each item a non-empty string, "
        'got the list ["a", 1]',
        "line 11: data.sequence_length: expected an integer of at least 2, got 64.0",
        "line 12: optimizer.learning_rate: expected a number above 0, got 0",
        "line 12: optimizer.betas: expected a list of 2, each a number of at least 0 and below 1, got the list [0.9]",
        'line 12: optimizer.precision: expected "fp32", "fp32_master", "pure_bf16" or "fp16", got the string "bf16"',
        "line 12: optimizer.momentum: unknown key, optimizer has name, learning_rate, betas, epsilon, weight_decay, "
        "precision",
        'line 13: selection.ratio: missing: selection.strategy "uniform" needs a number in (0, 1]',
        'line 14: retention.policy: "all" is for exact training, but selection.strategy "uniform" without '
        'selection.ratio 1.0 leaves tokens out: set retention.policy "selective", or selection.strategy "none"',
        'line 14: retention.retain_linears: needs retention.policy "selective", which is "all"',
    ]
    assert problems(path) == expected
    with pytest.raises(ConfigError) as caught:
        load_config(path)
    assert str(caught.value) == "\n  ".join([f"{path}: 17 problems", *expected])


def test_one_problem_is_one_line(small: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        load_config(small, ["training.max_step=3"])
    assert str(caught.value) == f"{small}: --set: training.max_step: unknown key, did you mean training.max_steps?"


@pytest.mark.parametrize(
    ("key", "suggestion"),
    [
        ("optimizer.learning_rat", "did you mean optimizer.learning_rate?"),
        ("training.learning_rate", "did you mean optimizer.learning_rate?"),
        ("learning_rate", "did you mean optimizer.learning_rate?"),
        ("optimiser.learning_rate", "did you mean optimizer?"),
        ("training.every_steps", "did you mean checkpoint.every_steps or logging.every_steps?"),
        ("data.lora_alpha", "data has train, eval, format, sequence_length, packing, overlong"),
        ("model.sequence_lenght", "did you mean data.sequence_length?"),
        (
            "cake.size",
            "the sections are run, model, data, selection, retention, sharding, optimizer, schedule, training, "
            "checkpoint, logging, hardware",
        ),
    ],
)
def test_nearest_key_is_named(small: Path, key: str, suggestion: str) -> None:
    unknown = "optimiser" if key.startswith("optimiser") else "cake" if key.startswith("cake") else key
    assert problems(small, f"{key}=1") == [f"--set: {unknown}: unknown key, {suggestion}"]


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (
            ["training.micro_batch_size=3"],
            "training.micro_batch_size: 3 does not divide training.global_batch_size, which is 8",
        ),
        (
            ["model.path=null"],
            "model.path: missing: give model.path (weights), model.from_config (random weights), or both",
        ),
        (['model.from_config={"vocab_size": 9}'], 'model.from_config: needs "model_type", such as "llama"'),
        (
            ["model.dtype=bfloat16"],
            'model.dtype: "bfloat16" contradicts optimizer.precision "fp32", which holds weights in float32: '
            "leave model.dtype out, or change the precision",
        ),
        (
            ["model.dtype=float32", "optimizer.precision=pure_bf16"],
            'model.dtype: "float32" contradicts optimizer.precision "pure_bf16", which holds weights in bfloat16: '
            "leave model.dtype out, or change the precision",
        ),
        (
            ["selection.ratio=0.25"],
            'selection.ratio: 0.25 has no effect with selection.strategy "none": name a strategy',
        ),
        (
            ["selection.ratio=labelled", "selection.strategy=uniform", "retention.policy=selective"],
            'selection.ratio: "labelled" needs selection.strategy "supervised", which is "uniform"',
        ),
        (["selection.tokentune=true"], 'selection.tokentune: needs selection.strategy "uniform", which is "none"'),
        (
            ["selection.strategy=supervised", "retention.policy=checkpoint"],
            'retention.policy: "checkpoint" is for exact training, but selection.strategy "supervised" without '
            'selection.ratio 1.0 leaves tokens out: set retention.policy "selective", or selection.strategy "none"',
        ),
        (
            ["retention.kv_format=int8", "retention.policy=checkpoint"],
            'retention.kv_format: "int8" needs retention.policy "selective", which is "checkpoint"',
        ),
        (
            ["sharding.offload_optimizer=true"],
            'sharding.offload_optimizer: sharding.engine "single" cannot offload: set it to false',
        ),
    ],
)
def test_keys_that_contradict_each_other(small: Path, overrides: list[str], expected: str) -> None:
    assert problems(small, *overrides) == [f"--set: {expected}"]


def test_rule_on_the_file_names_the_line_of_the_key(tmp_path: Path) -> None:
    text = json.dumps(SMALL, indent=1).replace('"micro_batch_size": 2', '"micro_batch_size": 5')
    number = next(index for index, line in enumerate(text.splitlines(), start=1) if "micro" in line)
    assert problems(write(tmp_path, text)) == [
        f"line {number}: training.micro_batch_size: 5 does not divide training.global_batch_size, which is 8"
    ]


def test_misspelt_key_is_not_blamed_on_the_default_in_its_place(small: Path) -> None:
    assert problems(small, "selection.strategy=supervised", "retention.polcy=selective") == [
        "--set: retention.polcy: unknown key, did you mean retention.policy?"
    ]


def test_ratio_one_is_exact_under_any_policy(small: Path) -> None:
    for strategy in ("supervised", "uniform", "bernoulli"):
        config = load_config(small, [f"selection.strategy={strategy}", "selection.ratio=1"])
        assert config.resolved_ratio == 1.0
    assert load_config(small, ["retention.policy=selective"]).resolved_ratio == 1.0
    supervised = ["selection.strategy=supervised", "retention.policy=selective"]
    assert load_config(small, supervised).resolved_ratio == "labelled"
    assert load_config(small, [*supervised, "selection.ratio=0.5"]).resolved_ratio == 0.5


@pytest.mark.parametrize(
    "key",
    [
        "selection.ratio",
        "retention.policy",
        "sharding.engine",
        "sharding.zero_stage",
        "training.micro_batch_size",
    ],
)
def test_auto_needs_a_planner(small: Path, key: str) -> None:
    assert problems(small, f"{key}=auto") == [
        f'--set: {key}: "auto" needs a planner, and there is none for {key}: give a value'
    ]


@pytest.mark.parametrize(
    ("value", "shown"),
    [("NaN", "NaN"), ("-Infinity", "-Infinity"), ("1e999", "Infinity")],
)
def test_numbers_are_finite(small: Path, tmp_path: Path, value: str, shown: str) -> None:
    assert problems(small, f"optimizer.weight_decay={value}") == [
        f"--set: optimizer.weight_decay: {shown} is not a finite number"
    ]
    text = json.dumps(SMALL).replace(
        '{"path": "some/model"}', f'{{"from_config": {{"model_type": "a", "b": [{value}]}}}}'
    )
    assert problems(write(tmp_path, text)) == [f"line 1: model.from_config.b.0: {shown} is not a finite number"]


def test_integer_serves_as_number_but_not_otherwise(small: Path) -> None:
    assert load_config(small, ["optimizer.learning_rate=1"]).optimizer.learning_rate == 1.0
    assert problems(small, "optimizer.learning_rate=true") == [
        "--set: optimizer.learning_rate: expected a number above 0, got true"
    ]
    assert problems(small, 'training.max_steps="8"') == [
        '--set: training.max_steps: expected an integer of at least 1, got the string "8"'
    ]
    assert problems(small, "sharding.zero_stage=false") == ["--set: sharding.zero_stage: expected 0, got false"]
    assert problems(small, "hardware.gpu_memory=80") == [
        '--set: hardware.gpu_memory: expected a string such as "80GiB", or null, got 80'
    ]


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


def test_bad_overrides_are_reported_with_the_rest(small: Path) -> None:
    assert problems(small, "training.max_steps", "data.train.0=a", ".x=1", "run.seed=-1", "model.adapter.rank=4") == [
        "--set: run.seed: expected an integer of at least 0 and below 9223372036854775808, got -1",
        '--set: model.adapter.kind: missing, expected "lora"',
        "--set: model.adapter.alpha: missing, expected a number above 0",
        '--set: "training.max_steps" is not KEY=VALUE, such as training.max_steps=100',
        '--set: data.train.0: data.train is the string "train.jsonl", which has no keys',
        '--set: ".x=1" is not KEY=VALUE, such as training.max_steps=100',
    ]


def test_override_mends_the_file(tmp_path: Path) -> None:
    bad = SMALL | {"training": SMALL["training"] | {"max_steps": "ten"}}
    assert load_config(write(tmp_path, json.dumps(bad)), ["training.max_steps=10"]).training.max_steps == 10


def test_key_given_twice(tmp_path: Path) -> None:
    text = json.dumps(SMALL, indent=1).replace('"max_steps": 10,', '"max_steps": 10,\n  "max_steps": 20,')
    first = next(index for index, line in enumerate(text.splitlines(), start=1) if "max_steps" in line)
    path = write(tmp_path, text)
    assert problems(path) == [f"line {first + 1}: training.max_steps: given twice, before in line {first}"]
    assert load_config(path, ["training.max_steps=30"]).training.max_steps == 30
    same_key_elsewhere = SMALL | {"model": {"from_config": {"model_type": "a", "x": [{"y": 1}, {"y": [2, {"y": 3}]}]}}}
    load_config(write(tmp_path, json.dumps(same_key_elsewhere)))


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ('{\n  "run" {"seed": 1}\n}', "line 2, column 9: not JSON: Expecting ':' delimiter"),
        ("", "line 1, column 1: not JSON: Expecting value"),
        ("[1]", "a config is a JSON object, not the list [1]"),
        ("[" * 100_000, "not a config: nested too deeply"),
    ],
)
def test_text_that_is_not_a_config(tmp_path: Path, text: str, problem: str) -> None:
    assert problems(write(tmp_path, text)) == [problem]


def test_file_that_cannot_be_read(tmp_path: Path) -> None:
    assert problems(tmp_path / "none.json") == ["no such file"]
    assert problems(tmp_path) == ["cannot be read: Is a directory"]
    path = tmp_path / "latin.json"
    path.write_bytes('{"run": "é"}'.encode("latin-1"))
    assert problems(path) == ["not UTF-8 text: 0xe9 at byte 9"]


def test_byte_order_mark_is_read(tmp_path: Path) -> None:
    path = tmp_path / "bom.json"
    path.write_text(json.dumps(SMALL), encoding="utf-8-sig")
    assert load_config(path).training.max_steps == 10


def test_half_of_a_surrogate_pair_is_refused(small: Path) -> None:
    (problem,) = problems(small, r'run.output_dir="\ud800"')
    assert problem.startswith("config: Invalid JSON: ")


def test_bad_config_is_reported_without_torch(tmp_path: Path) -> None:
    path = write(tmp_path, json.dumps(SMALL | {"trainig": {}}))
    program = f"""
import sys
import framework
try:
    framework.load_config({str(path)!r})
except ValueError as error:
    print(error)
    for module in ("torch", "transformers", "numpy"):
        assert module not in sys.modules, module
    sys.exit(error.exit_code)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.stderr == ""
    assert done.stdout == f"{path}: line 1: trainig: unknown key, did you mean training?\n"
    assert done.returncode == 2


def test_public_names_are_imported_on_first_use() -> None:
    assert framework.load_config is load_config
    assert "train" in dir(framework)
    with pytest.raises(AttributeError, match="module 'framework' has no attribute 'trian'"):
        _ = framework.trian
