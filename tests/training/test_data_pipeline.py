"""Runs on mixtures, split data, cached tokens, and batches made ahead."""

import io
import json
import re
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

import framework
from framework.data import TokenizedDataset, loading
from framework.errors import RunError, UserError
from framework.training.preview import dry_run, inspect_data

UNIFORM = {"selection__strategy": "uniform", "selection__ratio": 0.5}


def losses(run_dir: Path, kind: str = "train") -> list[float]:
    records = map(json.loads, (run_dir / "metrics.jsonl").read_text().splitlines())
    return [record["loss"] for record in records if record["kind"] == kind]


def write_sums(path: Path, start: int, count: int) -> str:
    """Prompts of different lengths and their answers; the path as a config has it."""
    numbers = range(start, start + count)
    records = [{"prompt": f"{number * 37 % 400} + {number} = ", "completion": str(number)} for number in numbers]
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return str(path)


@pytest.fixture
def mixture(tmp_path: Path) -> list[dict]:
    """Three quarters of the draws from 12 sums, a quarter from 40 others."""
    return [
        {"path": write_sums(tmp_path / "few.jsonl", 0, 12), "weight": 3},
        {"path": write_sums(tmp_path / "many.jsonl", 200, 40), "weight": 1.0},
    ]


@pytest.mark.parametrize("packing", [False, True], ids=["padded", "packed"])
def test_losses_are_equal_to_the_bit_for_any_number_of_workers(make_config, settings, mixture, packing):
    runs = []
    for workers in (0, 1, 3):
        settings["run"]["output_dir"] += f"-{workers}"
        changes = {"data__train": mixture, "data__workers": workers, "data__packing": packing}
        runs.append(framework.train(make_config(**UNIFORM, **changes, training__eval_every_steps=3)).run_dir)
    assert len(losses(runs[0])) == 6 and len(losses(runs[0], "eval")) == 2
    for run in runs[1:]:
        assert losses(run) == losses(runs[0])
        assert losses(run, "eval") == losses(runs[0], "eval")


@pytest.mark.parametrize("packing", [False, True], ids=["padded", "packed"])
def test_a_run_on_a_mixture_resumes_to_the_bit(make_config, settings, mixture, capsys, packing):
    changes = UNIFORM | {"data__train": mixture, "data__packing": packing}
    whole = framework.train(make_config(**changes))
    settings["run"]["output_dir"] += "-again"
    framework.train(make_config(**changes, training__max_steps=4))
    # Neither changes a result.
    resumed = framework.train(make_config(**changes, training__max_steps=6, data__workers=0, data__cache_dir=None))
    assert losses(resumed.run_dir) == losses(whole.run_dir)
    assert "another setting" not in capsys.readouterr().out


def test_each_source_is_reported_with_its_share_and_epochs(make_config, mixture, capsys):
    framework.train(make_config(data__train=mixture))
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("data.train")]
    assert lines[0].startswith("data.train: 52 samples of 52 records")
    assert re.match(
        r"data\.train: \S+few\.jsonl: 12 samples of 12 records, \d+ tokens, .* 75\.0% of the samples drawn", lines[1]
    )
    assert re.search(r"many\.jsonl: 40 samples of 40 records, .* 25\.0% of the samples drawn", lines[2])
    # 48 samples are drawn: 36 of 12 and 12 of 40.
    assert re.search(r"6 steps of 8 sequences are epochs: 3\.00 of \S+few\.jsonl, 0\.30 of \S+many\.jsonl$", lines[3])
    assert len(lines) == 4


@pytest.mark.parametrize(
    ("key", "value"), [("data__eval_fraction", 0.4), ("data__train", "another weight")], ids=["fraction", "weight"]
)
def test_a_checkpoint_of_another_split_or_mixture_is_refused(make_config, mixture, key, value):
    options = {"data__train": mixture, "data__eval": None, "data__eval_fraction": 0.3}
    framework.train(make_config(**options, training__max_steps=2))
    if key == "data__train":
        value = [mixture[0] | {"weight": 2}, mixture[1]]
    with pytest.raises(UserError, match=key.replace("__", r"\.")):
        framework.train(make_config(**options | {key: value}))


def test_what_is_held_out_is_evaluated_and_not_trained_on(make_config, settings, capsys):
    config = make_config(data__eval=None, data__eval_fraction=0.25)
    result = framework.train(config)
    evaluated = losses(result.run_dir, "eval")
    assert len(evaluated) == 1 and evaluated[0] == result.eval_loss
    lines = capsys.readouterr().out.splitlines()
    counts = [
        re.match(rf"data\.{side}: (\d+) samples of 48 records.*on the other side of the split: (\d+)$", line).groups()
        for side, line in zip(("train", "eval"), lines, strict=False)
    ]
    training, evaluation = int(counts[0][0]), int(counts[1][0])
    assert training + evaluation == 48 and counts == [
        (str(training), str(evaluation)),
        (str(evaluation), str(training)),
    ]
    assert 5 < evaluation < 20

    # The same as giving the two sides as files.
    records = Path(config.data.train).read_text().splitlines()
    whole = loading.load_dataset(
        config.data.train, tokenizer=framework.data.load_tokenizer(config.model.tokenizer), sequence_length=32
    )
    held = whole.contents < np.uint64(2**62)
    files = []
    for side, name in ((~held, "kept"), (held, "held")):
        files.append(Path(config.run.output_dir).with_name(f"{name}.jsonl"))
        files[-1].write_text("\n".join(records[place] for place in np.flatnonzero(side)) + "\n")
    settings["run"]["output_dir"] += "-files"
    again = framework.train(make_config(data__train=str(files[0]), data__eval=str(files[1]), data__eval_fraction=None))
    assert losses(again.run_dir) == losses(result.run_dir)
    assert again.eval_loss == result.eval_loss


def test_a_second_start_does_not_tokenise(make_config, settings, tmp_path, monkeypatch):
    first = framework.train(make_config(data__cache_dir=str(tmp_path / "tokens")))
    assert len(list((tmp_path / "tokens").iterdir())) == 2, "training and evaluation data"
    settings["run"]["output_dir"] += "-again"

    def label(*_, **__):
        raise AssertionError("tokenised again")

    monkeypatch.setattr(loading, "label_records", label)
    second = framework.train(make_config())
    assert losses(second.run_dir) == losses(first.run_dir)
    with pytest.raises(AssertionError, match="tokenised again"):
        framework.train(make_config(data__cache_dir=None))


def test_the_cache_is_in_the_users_cache_directory_by_default(make_config, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    framework.train(make_config(training__max_steps=1))
    assert len(list((tmp_path / "xdg/selectrain/tokens").iterdir())) == 2
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "unused"))
    framework.train(make_config(data__cache_dir=None), resume="none")
    assert not (tmp_path / "unused").exists()


@pytest.mark.parametrize("workers", [0, 2])
def test_a_sample_that_cannot_be_read_ends_the_run_by_name(make_config, monkeypatch, workers):
    config = make_config(data__workers=workers)
    read = TokenizedDataset.__getitem__

    def broken(self, index):
        if index == 47:
            raise OSError("bad sector")
        return read(self, index)

    monkeypatch.setattr(TokenizedDataset, "__getitem__", broken)
    expected = rf"sample 47 \(counted from 0\) of {re.escape(config.data.train)} cannot be read: bad sector"
    with pytest.raises(RunError, match=expected):
        framework.train(config)
    marker = json.loads((Path(config.run.output_dir) / "FAILED").read_text())
    assert re.fullmatch(expected, marker["message"]) and marker["code"] == 1


def test_inspected_samples_are_those_that_are_trained_on(make_config, mixture):
    config = make_config(data__train=mixture, data__eval=None, data__eval_fraction=0.5)
    console = Console(width=400, color_system=None, file=io.StringIO())
    inspect_data(config, 200, console)
    text = console.file.getvalue()
    shown = int(re.match(r"data\.train: (\d+) samples", text).group(1))
    assert shown < 52 and "75.0% of the samples drawn" in text
    drawn = {int(each) % shown for each in re.findall(r"row \d+, draw (\d+):", text)}
    assert drawn == set(range(shown))


def test_a_dry_run_says_what_a_mixture_is(make_config, mixture):
    lines = dry_run(make_config(data__train=mixture)).splitlines()
    few, many = (each["path"] for each in mixture)
    assert f"mixture        75.0% {few}, 25.0% {many}" in lines
    assert not [line for line in lines if line.startswith("not here")]
    assert "mixture" not in dry_run(make_config(data__train=[few, many]))
