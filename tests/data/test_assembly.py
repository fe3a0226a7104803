from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from framework.config import SourceConfig
from framework.data import (
    DataReport,
    JoinedDataset,
    TokenizedDataset,
    epochs_line,
    hold_out,
    load_dataset,
    load_sources,
    source_lines,
)
from framework.data.classes import ClassLabels, counted
from framework.data.images import load_image_folder
from framework.errors import UserError


def write(path: Path, *records: dict) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def make(ids: list[list[int]], name: str = "a") -> TokenizedDataset:
    lengths = [len(each) for each in ids]
    supervised = np.concatenate([np.arange(length) > 0 for length in lengths])
    tokens = sum(lengths)
    report = DataReport({name: "text"}, len(ids), len(ids), longest=max(lengths), tokens=tokens)
    report.supervised_tokens = int(supervised.sum())
    return TokenizedDataset(np.concatenate(ids).astype(np.int32), supervised, np.array(lengths), report, name=name)


def ids(dataset) -> list[list[int]]:
    return [sample.input_ids.tolist() for sample in dataset]


FIRST, SECOND = [[1, 2, 3], [4, 5]], [[6, 7], [8, 9, 10, 11], [12, 13]]


def test_joined_data_sets_follow_each_other() -> None:
    joined = JoinedDataset([make(FIRST, "a"), make(SECOND, "b")])
    assert ids(joined) == FIRST + SECOND
    assert joined.lengths.tolist() == [3, 2, 2, 4, 2]
    assert joined.supervised_lengths.tolist() == [2, 1, 1, 3, 1]
    assert joined[3].labels.tolist() == [-100, 9, 10, 11]
    assert (joined.report.samples, joined.report.tokens, joined.report.supervised_tokens) == (5, 13, 8)
    assert joined.report.formats == {"a": "text", "b": "text"} and joined.report.longest == 4
    assert joined.locate(3) == ("b", 1)
    assert joined.named([3, 0, 4, 0]) == "0 of a; 1, 2 of b"
    assert joined.named(range(5), limit=3) == "0, 1 of a; 0 of b; …"
    for index in (-1, 5):
        with pytest.raises(IndexError):
            joined[index]


def test_the_fingerprint_is_of_samples_order_and_shares() -> None:
    whole = make(FIRST + SECOND).fingerprint
    assert JoinedDataset([make(FIRST, "b"), make(SECOND, "c")]).fingerprint == whole, "not of how they are stored"
    other_label = make(FIRST + SECOND)
    other_label.supervised[1] = False
    mixtures = [JoinedDataset([make(FIRST), make(SECOND)], shares=np.array(each)) for each in ([0.5, 0.5], [0.4, 0.6])]
    others = [
        JoinedDataset([make(SECOND), make(FIRST)]),
        make([[1, 2], [3, 4, 5], *SECOND]),
        make([[1, 2, 4], [4, 5], *SECOND]),
        other_label,
        *mixtures,
        # The same samples and shares, but other sources.
        JoinedDataset([make(FIRST[:1]), make(FIRST[1:] + SECOND)], shares=np.array([0.5, 0.5])),
    ]
    assert len({whole, *(each.fingerprint for each in others)}) == len(others) + 1


def test_sources_are_joined_in_their_order_and_mixed_if_they_have_weights() -> None:
    parts = {"a": make(FIRST, "a"), "b": make(SECOND, "b")}

    def load(source: SourceConfig) -> TokenizedDataset:
        return parts[source.path]

    assert load_sources([SourceConfig(path="a")], load) is parts["a"]
    joined = load_sources([SourceConfig(path="b"), SourceConfig(path="a")], load)
    assert ids(joined) == SECOND + FIRST and joined.shares is None
    mixed = load_sources([SourceConfig(path="a", weight=3), SourceConfig(path="b", weight=1)], load)
    assert mixed.shares.tolist() == [0.75, 0.25]


def test_problems_of_all_sources_are_reported_together(tmp_path: Path, tiny_tokenizer) -> None:
    broken = [write(tmp_path / f"{name}.jsonl", {"text": "ab"}, {"text": 1}) for name in "ab"]
    sources = [SourceConfig(path=str(path)) for path in (*broken, tmp_path / "missing.jsonl")]
    with pytest.raises(UserError) as error:
        load_sources(sources, lambda each: load_dataset(each, tokenizer=tiny_tokenizer, sequence_length=8))
    for place in (f"{broken[0]}:2: ", f"{broken[1]}:2: ", "missing.jsonl"):
        assert place in str(error.value)


@pytest.fixture
def texts(tmp_path: Path, tiny_tokenizer):
    """Load texts as a data set."""

    def load(*texts: str, name: str = "a", **options) -> TokenizedDataset:
        path = write(tmp_path / f"{name}.jsonl", *({"text": text, "id": place} for place, text in enumerate(texts)))
        return load_dataset(path, tokenizer=tiny_tokenizer, **({"sequence_length": 40} | options))

    return load


def sides(data: TokenizedDataset, tokenizer, fraction: float = 0.3) -> dict[str, bool]:
    """Whether each text is held out; fails if one is on both sides."""
    training, evaluation = hold_out(data, fraction)
    assert len(training) + len(evaluation) == len(data)
    sides = [{tokenizer.decode(sample.input_ids) for sample in side} for side in (training, evaluation)]
    assert not sides[0] & sides[1]
    return dict.fromkeys(sides[0], False) | dict.fromkeys(sides[1], True)


TEXTS = [f"text {number}" for number in range(300)]


def test_the_split_takes_its_share_and_duplicates_stay_together(texts, tiny_tokenizer) -> None:
    held = sides(texts(*TEXTS, *TEXTS[::-1], *TEXTS), tiny_tokenizer)
    assert len(held) == 300
    assert 60 < sum(held.values()) < 120  # mean 90, standard deviation 8
    more = sides(texts(*TEXTS), tiny_tokenizer, fraction=0.6)
    assert all(more[text] for text, side in held.items() if side), "a larger share holds the smaller one"


def test_neither_more_data_nor_another_order_or_length_moves_a_sample(texts, tiny_tokenizer) -> None:
    held = sides(texts(*TEXTS), tiny_tokenizer)
    more = sides(texts("further", *reversed(TEXTS), "and more", name="b"), tiny_tokenizer)
    assert {text: more[text] for text in TEXTS} == held
    short = sides(texts(*TEXTS, sequence_length=7), tiny_tokenizer)
    assert short == {text: held[text] for text in TEXTS[:100]}
    tiny_tokenizer.chat_template += " "
    assert sides(texts(*TEXTS), tiny_tokenizer) == held


def test_both_sides_of_a_split_are_reported(texts) -> None:
    whole = texts(*TEXTS, "x" * 50)
    training, evaluation = hold_out(whole, 0.3)
    for side in (training, evaluation):
        report = side.report
        assert (report.records, report.overlong) == (301, 1)
        assert report.samples == len(side) == 300 - report.held_out
        assert report.tokens == sum(len(sample.input_ids) for sample in side) == side.lengths.sum()
        assert report.supervised_tokens == sum(int((sample.labels != -100).sum()) for sample in side)
        assert f"on the other side of the split: {report.held_out}" in report.summary()
    assert training.report.tokens + evaluation.report.tokens == whole.report.tokens
    # A message names a sample as the whole counts it.
    name, number = evaluation.locate(3)
    assert name == whole.name
    assert whole[number].input_ids.tolist() == evaluation[3].input_ids.tolist()
    assert training.fingerprint != whole.fingerprint


def test_a_mixture_is_split_source_by_source(texts) -> None:
    first, second = texts(*TEXTS), texts(*(f"other {number}" for number in range(50)), name="b")
    mixture = JoinedDataset([first, second], shares=np.array([0.2, 0.8]))
    training, evaluation = hold_out(mixture, 0.3)
    alone = [hold_out(part, 0.3) for part in (first, second)]
    assert ids(training) == ids(alone[0][0]) + ids(alone[1][0])
    assert ids(evaluation) == ids(alone[0][1]) + ids(alone[1][1])
    assert training.shares.tolist() == [0.2, 0.8] and evaluation.shares is None


def test_a_split_without_a_side_is_refused(texts) -> None:
    data = texts("abc", "def", "ghi")
    with pytest.raises(UserError, match=r"data\.eval_fraction: 1e-06 of 3 samples holds none out: raise it"):
        hold_out(data, 1e-6)
    with pytest.raises(UserError, match=r"data\.eval_fraction: 0\.999999 leaves no sample of .*a\.jsonl to train on"):
        hold_out(data, 0.999999)


def test_what_is_said_of_each_source() -> None:
    # Two samples of 2.5 tokens on average, three of 8 / 3.
    parts = [make(FIRST, "a"), make(SECOND, "b")]
    assert source_lines(parts[0]) == []
    assert source_lines(JoinedDataset(parts)) == [
        "a: 2 samples of 2 records, 5 tokens, 60.0% with a label, longest record 3; "
        "40.0% of the samples drawn, 38.5% of their tokens",
        "b: 3 samples of 3 records, 8 tokens, 62.5% with a label, longest record 4; "
        "60.0% of the samples drawn, 61.5% of their tokens",
    ]
    mixture = JoinedDataset(parts, shares=np.array([0.8, 0.2]))
    assert [line.split("; ")[1] for line in source_lines(mixture)] == [
        "80.0% of the samples drawn, 78.9% of their tokens",
        "20.0% of the samples drawn, 21.1% of their tokens",
    ]
    for part in parts:  # as images
        part.report.tokens = 0
    assert [line.split("; ")[1] for line in source_lines(mixture)] == [
        "80.0% of the samples drawn",
        "20.0% of the samples drawn",
    ]
    assert epochs_line(JoinedDataset(parts), 20) == "4.00 epochs"
    assert epochs_line(mixture, 20) == "epochs: 8.00 of a, 1.33 of b"


@pytest.mark.parametrize("small", [1e-300, 1e-16])
def test_a_source_that_would_never_be_drawn_is_refused(small: float) -> None:
    parts = {"a": make(FIRST, "a"), "b": make(SECOND, "b")}
    sources = [SourceConfig(path="a", weight=small), SourceConfig(path="b", weight=1e300 if small == 1e-300 else 3)]
    with pytest.raises(UserError) as caught:
        load_sources(sources, lambda source: parts[source.path])
    assert str(caught.value) == (
        f"data.train: the weight {small} of a is so small beside the others that no sample of it would ever be drawn: "
        "raise it, or leave the source out"
    )
    sources[0] = SourceConfig(path="a", weight=1e-9)
    sources[1] = SourceConfig(path="b", weight=3)
    assert load_sources(sources, lambda source: parts[source.path]).shares[0] == 1e-9 / (3 + 1e-9)


def test_classes_of_parts_and_of_what_they_are_split_into(tmp_path: Path) -> None:
    labels = ClassLabels()
    parts = []
    for name, given in {"a": "ynnyyn", "b": "nyyn"}.items():
        for place, label in enumerate(given):
            file = tmp_path / name / label / f"{place}.png"
            file.parent.mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (2, 2), (place, len(given), 0)).save(file)
        parts.append(load_image_folder(tmp_path / name, labels=labels))
    labels.settle("data.train")
    joined = JoinedDataset(parts)
    assert joined.classes.tolist() == [0, 0, 0, 1, 1, 1, 0, 0, 1, 1]
    train, held_out = hold_out(joined, 0.4)
    assert len(train) and len(held_out)
    for side in (train, held_out):
        assert side.classes.tolist() == [sample.label for sample in side]
    assert counted(joined.classes, ["n", "y", "none"]) == "n: 5, y: 5, none: 0"
