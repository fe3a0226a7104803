"""What is shown without training."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from pathlib import Path

import datasets
import pytest
from rich.console import Console

from framework.config import Config
from framework.errors import UserError
from framework.training.preview import dry_run, inspect_data

QUESTION, ANSWER = {"role": "user", "content": "a b"}, {"role": "assistant", "content": "c"}
# Labels, and the selection: the position before each label, where the model predicts it.
SPOKEN = "<bos><user>a b<end>⟪<assistant>⟫⟦⟪c⟫⟧⟦<end>⟧"

RECORDS = {
    "messages": ({"messages": [QUESTION, ANSWER]}, SPOKEN),
    "sharegpt": ({"conversations": [{"from": "human", "value": "a b"}, {"from": "gpt", "value": "c"}]}, SPOKEN),
    "alpaca": ({"instruction": "a b", "input": "", "output": "c"}, SPOKEN),
    "completion": ({"prompt": "a b", "completion": "c"}, "a ⟪b⟫⟦⟪c⟫⟧⟦<end>⟧"),
    "text": ({"text": "a b"}, "⟪a⟫⟦⟪ ⟫⟧⟦b⟧"),
}


def shown(config: Config, count: int) -> list[str]:
    stream = io.StringIO()
    inspect_data(config, count, Console(file=stream, width=200))
    return [line.rstrip(" ─") for line in stream.getvalue().splitlines()]


@pytest.mark.parametrize("format", RECORDS)
def test_samples_of_every_format_are_shown(make_config: Callable[..., Config], tmp_path: Path, format: str) -> None:
    record, text = RECORDS[format]
    path = tmp_path / "one.json"
    path.write_text(json.dumps([record]))
    lines = shown(make_config(data__train=[{"path": str(path)}], data__format="auto"), 1)
    assert lines[0].startswith("data.train: 1 samples of 1 records")
    assert lines[1] == f"  {path}: {format}"
    assert lines[2].startswith("tokens: ")
    assert lines[3].startswith("row 0, draw 0: ")
    assert lines[4:] == [text]


def test_samples_from_a_split_of_a_directory(make_config: Callable[..., Config], tmp_path: Path) -> None:
    datasets.disable_progress_bars()
    table = datasets.Dataset.from_list([RECORDS["completion"][0]] * 3)
    datasets.DatasetDict(train=table, test=table.select([0])).save_to_disk(tmp_path / "saved")
    source = {"path": str(tmp_path / "saved"), "split": "test"}
    lines = shown(make_config(data__train=[source]), 5)
    assert lines[0].startswith("data.train: 1 samples of 1 records")
    assert lines[1] == f"  {tmp_path / 'saved'} (test): completion"
    with pytest.raises(UserError, match="it has train, test"):
        shown(make_config(data__train=[source | {"split": "dev"}]), 5)


def test_a_dry_run_says_which_sources_are_not_here(make_config: Callable[..., Config], tmp_path: Path) -> None:
    config = make_config(data__train=[{"path": "org/name", "split": "train"}, str(tmp_path / "train.jsonl")])
    assert "not here       org/name: needed to train, so not checked" in dry_run(config)
