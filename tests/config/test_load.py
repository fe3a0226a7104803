"""What a config may say, and what is said about one that may not."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

import pytest

import framework
from framework.config import ConfigError, SourceConfig, data_sources, load_config
from framework.config.sections import Format

REPOSITORY = Path(__file__).parents[2]

Write = Callable[[str], Path]
Problems = Callable[..., list[str]]


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
        None,
        False,
    )
    assert config.optimizer.betas == (0.9, 0.95)
    assert config.gradient_accumulation(1) == 4
    assert config.weights_dtype == "float32"
    assert config.training.max_grad_norm == 1.0


def test_configs_in_the_repository_load() -> None:
    paths = sorted((REPOSITORY / "configs").glob("*.json"))
    assert {path.name for path in paths} >= {
        "bert-masked.json",
        "classify.json",
        "llama13b.json",
        "llama8b-lora.json",
        "tiny.json",
        "vit.json",
    }
    for path in paths:
        config = load_config(path)
        # Classifiers have no more than a pooled token to select, so theirs add a share of the context.
        ratio = {"classify": 0.25, "vit": 0.25, "llama13b": "auto"}.get(path.stem, "labelled")
        assert (config.selection.strategy, config.selection.ratio) == ("supervised", ratio)
        assert config.retention.policy == ("auto" if path.stem == "llama13b" else "selective")
        assert config.run.output_dir == f"runs/{path.stem}"
        assert config.weights_dtype == ("bfloat16" if path.stem == "llama8b-lora" else "float32")


def test_written_config_loads_as_the_same_config(small: Path, write: Write) -> None:
    config = load_config(small, ["model.adapter=" + json.dumps({"kind": "lora", "rank": 8, "alpha": 16})])
    again = load_config(write(json.dumps(config.to_json())))
    assert again == config
    assert again.model.adapter is not None
    assert again.model.adapter.target_modules is None
    assert again.sha256() == config.sha256()


def test_hash_covers_what_determines_the_losses(small: Path) -> None:
    plain = load_config(small).sha256()
    for neutral in (
        "run.output_dir=elsewhere",
        "logging.every_steps=7",
        "checkpoint.keep_last=5",
        'hardware.gpu_memory="80GiB"',
        "planner.objective=speed",
        "optimizer.weight_decay=0",
        "data.workers=0",
        "data.cache_dir=elsewhere",
        "data.supervised_fraction=0.3",
    ):
        assert load_config(small, [neutral]).sha256() == plain
    selective = ["retention.policy=selective"]
    on_host = load_config(small, [*selective, "retention.placement=host"])
    assert on_host.sha256() == load_config(small, selective).sha256() != plain
    for changed in ("run.seed=1", "optimizer.weight_decay=0.1", "training.micro_batch_size=4", "data.packing=true"):
        assert load_config(small, [changed]).sha256() != plain


def test_config_is_frozen(small: Path) -> None:
    with pytest.raises(ValueError, match="frozen"):
        load_config(small).training.max_steps = 3


def test_all_problems_are_reported_together_in_the_order_of_the_file(write: Write, problems: Problems) -> None:
    path = write(
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
        "line 6: training.max_step: unknown key, did you mean training.max_steps?",
        'line 7: training.global_batch_size: expected an integer of at least 1, got the string "8"',
        'line 8: training.micro_batch_size: expected an integer of at least 1, or "auto", got true',
        "line 9: training.deterministic: expected true or false, got 1",
        "line 11: data.train[1]: expected a non-empty string, or an object, got 1",
        "line 11: data.sequence_length: expected an integer of at least 2, or null, got 64.0",
        "line 12: optimizer.learning_rate: expected a number above 0, got 0",
        "line 12: optimizer.betas: expected a list of 2, each a number of at least 0 and below 1, got the list [0.9]",
        'line 12: optimizer.precision: expected "fp32", "fp32_master", "pure_bf16" or "fp16", got the string "bf16"',
        "line 12: optimizer.momentum: unknown key, optimizer has name, learning_rate, betas, epsilon, weight_decay, "
        "decay_embeddings, groups, precision, loss_scale",
        'line 13: selection.ratio: missing: selection.strategy "uniform" needs a number in (0, 1], or "auto"',
        'line 14: retention.policy: "all" is for exact training, but selection.strategy "uniform" without '
        'selection.ratio 1.0 leaves tokens out: set retention.policy "selective", or selection.strategy "none"',
        'line 14: retention.retain_linears: needs retention.policy "selective", which is "all"',
    ]
    assert problems(path) == expected
    with pytest.raises(ConfigError) as caught:
        load_config(path)
    assert str(caught.value) == "\n  ".join([f"{path}: 16 problems", *expected])


def test_one_problem_is_one_line(small: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        load_config(small, ["training.max_step=3"])
    assert str(caught.value) == f"{small}: --set: training.max_step: unknown key, did you mean training.max_steps?"


@pytest.mark.parametrize(
    ("key", "suggestion"),
    [
        ("optimizer.learning_rat", "did you mean optimizer.learning_rate?"),
        ("training.learning_rate", "did you mean optimizer.learning_rate or optimizer.groups[].learning_rate?"),
        ("learning_rate", "did you mean optimizer.learning_rate or optimizer.groups[].learning_rate?"),
        ("optimiser.learning_rate", "did you mean optimizer?"),
        ("training.every_steps", "did you mean checkpoint.every_steps or logging.every_steps?"),
        ("retention.lora_alpha", "retention has policy, retain_linears, kv_format, placement"),
        ("model.sequence_lenght", "did you mean data.sequence_length?"),
        (
            "cake.size",
            "the sections are run, model, data, selection, retention, sharding, optimizer, schedule, training, "
            "checkpoint, logging, hardware, planner, cluster",
        ),
    ],
)
def test_nearest_key_is_named(small: Path, key: str, suggestion: str, problems: Problems) -> None:
    unknown = "optimiser" if key.startswith("optimiser") else "cake" if key.startswith("cake") else key
    assert problems(small, f"{key}=1") == [f"--set: {unknown}: unknown key, {suggestion}"]


def test_sources_in_any_of_their_forms_are_the_same_tuple(small: Path) -> None:
    plain = (SourceConfig(path="a.jsonl"),)
    for value in ("a.jsonl", '["a.jsonl"]', '[{"path": "a.jsonl"}]'):
        assert data_sources(load_config(small, [f"data.train={value}"]).data.train) == plain
    assert data_sources(None) == ()
    mixed = ["a.jsonl", {"path": "org/name", "subset": "main", "split": "train[:5%]"}]
    config = load_config(small, [f"data.eval={json.dumps(mixed)}"])
    expected = (*plain, SourceConfig(path="org/name", subset="main", split="train[:5%]"))
    assert data_sources(config.data.eval) == expected
    assert data_sources(mixed) == expected, "rules read JSON values"


def test_problems_inside_a_list_of_sources_are_named_with_their_place(write: Write, problems: Problems) -> None:
    path = write(
        """{
  "run": {"output_dir": "out"},
  "model": {"path": "m"},
  "data": {
    "train": [
      "a.jsonl",
      {"pth": "b.jsonl", "weight": 0},
      {"path": "c.jsonl",
       "format": "mesages"},
      3,
      {"path": "d.jsonl", "packing": true}
    ],
    "eval": [{"path": ""}, {"name": "x"}],
    "pth": 1,
    "sequence_length": 64
  },
  "optimizer": {"learning_rate": 1},
  "training": {"max_steps": 1, "global_batch_size": 1, "micro_batch_size": 1}
}"""
    )
    formats = '"auto", ' + ", ".join(f'"{name}"' for name in get_args(Format)[:-1]) + f' or "{get_args(Format)[-1]}"'
    assert problems(path) == [
        "line 7: data.train[1].path: missing, expected a non-empty string",
        "line 7: data.train[1].weight: expected a number above 0, or null, got 0",
        "line 7: data.train[1].pth: unknown key, did you mean data.train[].path?",
        f'line 9: data.train[2].format: expected {formats}, or null, got the string "mesages"',
        "line 10: data.train[3]: expected a non-empty string, or an object, got 3",
        "line 11: data.train[4].packing: unknown key, did you mean data.packing?",
        'line 13: data.eval[0].path: expected a non-empty string, got the string ""',
        "line 13: data.eval[1].path: missing, expected a non-empty string",
        "line 13: data.eval[1].name: unknown key, did you mean optimizer.name?",
        "line 14: data.pth: unknown key, did you mean model.path or data.train[].path or data.eval[].path?",
    ]


def test_list_of_sources_is_not_empty(small: Path, problems: Problems) -> None:
    sources = "a non-empty string, or a non-empty list, each item a non-empty string, or an object"
    assert problems(small, "data.train=[]") == [f"--set: data.train: expected {sources}, got the list []"]
    assert problems(small, "data.eval=7") == [f"--set: data.eval: expected {sources}, or null, got 7"]


def test_integer_serves_as_number_but_not_otherwise(small: Path, problems: Problems) -> None:
    assert load_config(small, ["optimizer.learning_rate=1"]).optimizer.learning_rate == 1.0
    assert problems(small, "optimizer.learning_rate=true") == [
        "--set: optimizer.learning_rate: expected a number above 0, got true"
    ]
    assert problems(small, 'training.max_steps="8"') == [
        '--set: training.max_steps: expected an integer of at least 1, or null, got the string "8"'
    ]
    assert problems(small, "sharding.zero_stage=false") == [
        '--set: sharding.zero_stage: expected an integer of at least 0 and at most 3, or "auto", or null, got false'
    ]
    assert problems(small, "hardware.gpu_memory=80") == [
        '--set: hardware.gpu_memory: expected a string such as "80GiB", or null, got 80'
    ]


def test_bad_config_is_reported_without_torch(write: Write, settings: dict[str, Any]) -> None:
    path = write(json.dumps(settings | {"trainig": {}}))
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
