"""The labelled share, against counts by hand with a tokenizer of one token a character."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from framework.config import Config
from framework.errors import UserError
from framework.planner.labelled import SAMPLES, labelled_share_of, share_for_planning


def write(path: Path, samples: list[tuple[int, int]]) -> str:
    """Prompts of so many tokens, and completions of so many, to which their end is added."""
    lines = [json.dumps({"prompt": "p" * prompt, "completion": "c" * (answer - 1)}) for prompt, answer in samples]
    path.write_text("\n".join(lines) + "\n")
    return str(path)


@pytest.fixture
def run(tiny_tokenizer_path: Path) -> Any:
    def config(train: Any, batch: tuple[Any, int] = (1, 4), **data: Any) -> Config:
        return Config.model_validate(
            {
                "run": {"output_dir": "unused"},
                "model": {"path": "some/model", "tokenizer": str(tiny_tokenizer_path)},
                "data": {"train": train, "format": "completion", "sequence_length": 64} | data,
                "optimizer": {"learning_rate": 1e-3},
                "training": {"max_steps": 1, "micro_batch_size": batch[0], "global_batch_size": batch[1]},
            }
        )

    return config


BOS = 1
SAMPLE_TOKENS = BOS + 19 + 8


def test_padding_counts_as_tokens(run: Any, tmp_path: Path) -> None:
    # 28 tokens are padded to 32, the longest of 39 + 1 + 8 = 48 to itself.
    path = write(tmp_path / "train.jsonl", [(19, 8)] * 3 + [(39, 8)])
    assert labelled_share_of(run(path)) == 4 * 8 / (3 * 32 + 48)
    assert labelled_share_of(run(path, ("auto", 4))) == 4 * 8 / (3 * 32 + 48)
    assert labelled_share_of(run(path, (2, 4))) == 4 * 8 / (2 * 48 + 2 * 32)
    assert labelled_share_of(run(path, (4, 4))) == 4 * 8 / (4 * 48)


def test_packed_rows_are_full_but_for_what_does_not_fit(run: Any, tmp_path: Path) -> None:
    # Two samples of 28 tokens share a row of 64.
    path = write(tmp_path / "train.jsonl", [(19, 8)] * 8)
    assert 2 * SAMPLE_TOKENS == 56
    assert labelled_share_of(run(path, packing=True)) == 8 * 8 / (4 * 64)
    many = write(tmp_path / "many.jsonl", [(19, 8)] * (2 * SAMPLES))
    assert labelled_share_of(run(many, packing=True)) == 2 * 8 / 64


def test_the_first_samples_are_counted_and_no_others(run: Any, tmp_path: Path) -> None:
    path = write(tmp_path / "train.jsonl", [(23, 8)] * SAMPLES + [(7, 24)] * SAMPLES)
    assert labelled_share_of(run(path)) == 8 / 32
    (tmp_path / "train.jsonl").open("a").write("broken\n")
    assert labelled_share_of(run(path)) == 8 / 32


@pytest.mark.parametrize("weights", [None, (3.0, 1.0)])
def test_sources_count_as_often_as_they_are_drawn(
    run: Any, tmp_path: Path, weights: tuple[float, float] | None
) -> None:
    # Rows of 32 and 64 tokens; a source of 1024 and one of 1024: without weights half of the samples are of each.
    paths = [
        write(tmp_path / "short.jsonl", [(23, 8)] * 1024),
        write(tmp_path / "long.jsonl", [(15, 48)] * 1024),
    ]
    train = paths if weights is None else [{"path": p, "weight": w} for p, w in zip(paths, weights, strict=True)]
    short, long = weights or (1.0, 1.0)
    expected = (short * 8 + long * 48) / (short * 32 + long * 64)
    # Their files differ in what is not text, which counts as tokens.
    assert labelled_share_of(run(train)) == pytest.approx(expected, rel=0.1 if weights is None else 1e-9)


def test_what_is_given_goes_before_what_is_counted(run: Any, tmp_path: Path) -> None:
    path = write(tmp_path / "train.jsonl", [(23, 8)] * 4)
    assert labelled_share_of(run(path, supervised_fraction=0.5)) == 0.5
    assert share_for_planning(run(path, supervised_fraction=0.5)).value == 0.5
    given = share_for_planning(run(path, supervised_fraction=0.5), 0.3)
    assert (given.value, given.source) == (0.3, "labelled share: 30.0%, as --labelled-share says")
    counted = share_for_planning(run(path))
    assert (counted.value, counted.assumed) == (0.25, False)
    with pytest.raises(UserError, match=r"--labelled-share: 1.5 is not above 0 and at most 1"):
        share_for_planning(run(path), 1.5)


def test_without_data_the_most_is_assumed_and_said(run: Any, tmp_path: Path) -> None:
    config = run([str(tmp_path / "none.jsonl"), "some/data"])
    assumed = share_for_planning(config)
    assert (assumed.value, assumed.assumed) == (1.0, True)
    assert f"{tmp_path / 'none.jsonl'}, some/data not here" in assumed.source
    with pytest.raises(UserError, match="no such file"):
        labelled_share_of(config)
