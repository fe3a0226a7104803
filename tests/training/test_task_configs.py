"""Configs of masked language models and classifiers: what they describe, and what of them is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from task_runs import BERT

import framework
from framework.config import Config
from framework.errors import UserError
from framework.training.preview import dry_run, inspect_data


def test_the_classes_of_the_evaluation_set_are_those_of_the_training_set(make_task: Any) -> None:
    config = make_task("sequence_classification", "bert")
    path = Path(config.data.eval)
    path.write_text(path.read_text() + '{"text": "q", "label": "elsewhere"}\n')
    with pytest.raises(UserError, match=r"data\.eval.*\n.*eval\.jsonl:11: unknown label 'elsewhere'; the classes are"):
        framework.train(config)
    assert not Path(config.run.output_dir).exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_labels": 5}, r"data\.train: has 3 classes \(first, last, middle\), but the model's config says 5"),
        ({"id2label": {"0": "first", "1": "other"}}, r"unknown label 'middle'; the classes are first, other"),
        ({"problem_type": "regression"}, "problem_type 'regression' is not supported"),
        ({"pad_token_id": 4}, "pads with token 0, but the model's config says pad_token_id 4"),
    ],
)
def test_a_model_config_that_contradicts_the_data_is_refused(make_task: Any, changes: Any, message: str) -> None:
    config = make_task("sequence_classification", "bert", model__from_config={**BERT, **changes})
    with pytest.raises(UserError, match=message):
        framework.train(config)


def test_a_resumed_run_keeps_its_classes(make_task: Any) -> None:
    framework.train(make_task("sequence_classification", "bert", training__max_steps=2))
    changed = make_task("sequence_classification", "bert", data__label_names=["middle", "last", "first"])
    with pytest.raises(UserError, match=r"(?s)of another run.*data\.label_names"):
        framework.train(changed)
    same = make_task("sequence_classification", "bert", data__label_names=["first", "last", "middle"])
    assert framework.train(same).status == "completed"


def test_a_head_that_reads_more_than_it_is_known_for_is_refused(
    make_task: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(framework.models.architecture, "pooling_of", lambda model: "first")
    with pytest.raises(
        UserError, match=r"the classifier of dinov2 reads other tokens than the one taken for its pooled token"
    ):
        framework.train(make_task("image_classification", "dinov2"))
    assert framework.train(make_task("image_classification", "dinov2", "exact", training__max_steps=1)).step == 1


def test_dry_run_and_samples_of_each_task(make_task: Any, tmp_path: Path) -> None:
    from rich.console import Console

    def shown(config: Config) -> tuple[str, str]:
        console = Console(record=True, width=300, color_system=None, file=(tmp_path / "console").open("w"))
        inspect_data(config, 2, console)
        assert not Path(config.run.output_dir).exists()
        return dry_run(config), console.export_text()

    plan, samples = shown(make_task("masked_lm", "bert", data__mask_probability=0.5))
    assert "task           masked_lm, 50% of the tokens to be found" in plan
    assert samples.count(" supervised, ") == 2 and "⟦⟪<mask>" in samples
    plan, samples = shown(make_task("sequence_classification", "llama"))
    assert "of up to 32 tokens" in plan and "head on the last token" in plan
    assert samples.count(", class ") == 2 and "data.train: first: 12, last: 12, middle: 12" in samples
    plan, samples = shown(make_task("image_classification", "vit", "context", data__train=str(tmp_path / "train")))
    assert "of 17 tokens" in plan and "head on the first token" in plan
    assert samples.count("17 tokens, 8 selected") == 2 and samples.count("■") == 16 and ".png, class " in samples


@pytest.mark.parametrize(
    ("name", "task", "parameters"),
    [
        # As the models' own cards say, but for the head: 110 M, 149 M and 86 M.
        ("bert-masked", "task           masked_lm, 15% of the tokens to be found", "109,514,298"),
        ("classify", "head on the first token", "149,606,402"),
        ("vit", "head on the first token", "85,800,194"),
    ],
)
def test_shipped_configs_describe_their_models(name: str, task: str, parameters: str) -> None:
    plan = dry_run(framework.load_config(Path(__file__).parents[2] / "configs" / f"{name}.json"))
    assert task in plan and f"parameters     {parameters}, " in plan and "not here       " in plan
