"""Texts with a class each, to exact ids, classes and pooled tokens."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer

from framework.data.classes import ClassLabels
from framework.data.classification import collate_classification, load_classification
from framework.errors import UserError


def write(path: Path, *records: Any) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


@pytest.fixture
def tokenizer(encoder_tokenizer_path: Path) -> Any:
    return AutoTokenizer.from_pretrained(encoder_tokenizer_path)


@pytest.fixture
def load(tmp_path: Path, tokenizer: Any) -> Any:
    def load_records(
        *records: Any, sequence_length: int = 32, known: Any = None, count: int | None = None, **options: Any
    ) -> Any:
        path = write(tmp_path / "data.jsonl", *records)
        labels = ClassLabels(known, count)
        data = load_classification(path, tokenizer=tokenizer, sequence_length=sequence_length, labels=labels, **options)
        data.names = labels.settle("data.train")
        return data

    return load_records


def test_texts_and_pairs_are_tokenised_as_the_tokenizer_does(load: Any, tokenizer: Any) -> None:
    data = load(
        {"text": "ab", "label": "yes", "source": "kept out"},
        {"text": "c", "text_pair": "de", "label": "no"},
        {"text": "f", "label": "yes"},
    )
    assert data.names == ["no", "yes"] and [sample.label for sample in data] == [1, 0, 1]
    for sample, arguments in zip(data, [("ab",), ("c", "de"), ("f",)], strict=True):
        expected = tokenizer(*arguments, return_token_type_ids=True)
        assert sample.input_ids.tolist() == expected["input_ids"]
        assert sample.token_types.tolist() == expected["token_type_ids"]
    assert data[1].token_types.tolist() == [0, 0, 0, 1, 1, 1]
    assert data.report.summary() == "3 samples of 3 records, 13 tokens, one class each, longest record 6"


def test_numbers_are_classes_without_names(load: Any) -> None:
    data = load(*({"text": "a", "label": label} for label in (2, 0, 1, 1)))
    assert data.names == ["LABEL_0", "LABEL_1", "LABEL_2"] and data.classes.tolist() == [2, 0, 1, 1]
    assert load({"text": "a", "label": 1}, known=["no", "yes"]).classes.tolist() == [1]
    assert load({"text": "a", "label": 1}, count=7).names == [f"LABEL_{number}" for number in range(7)]


def test_given_names_are_the_order(load: Any) -> None:
    data = load({"text": "a", "label": "no"}, {"text": "a", "label": "yes"}, known=["yes", "perhaps", "no"])
    assert data.classes.tolist() == [2, 0] and data.names == ["yes", "perhaps", "no"]


def test_the_order_of_names_is_that_of_the_alphabet_not_of_the_file(load: Any) -> None:
    assert load(*({"text": "a", "label": name} for name in "cab")).names == ["a", "b", "c"]


@pytest.mark.parametrize(
    ("record", "problem"),
    [
        ({"text": "a"}, "missing key `label` (found `text`)"),
        ({"text": "a", "label": 0.5}, "`label` must be a class, by its number or name, not 0.5: regression is not"),
        ({"text": "a", "label": True}, "`label` must be a class, by its number or name, not true or false"),
        ({"text": "a", "label": [1]}, "`label` must be a class, by its number or name, not a list"),
        ({"text": "a", "text_pair": None, "label": 1}, "`text_pair` must be a text, not null"),
        ({"text": "a", "label": -1}, "label -1: classes are counted from 0"),
        ({"text": "a", "label": "one"}, "label 'one': the labels before it are numbers; keep to one"),
    ],
)
def test_a_broken_record_is_named_by_its_line(load: Any, tmp_path: Path, record: Any, problem: str) -> None:
    with pytest.raises(UserError) as caught:
        load({"text": "a", "label": 1}, {"text": "b", "label": 0}, record)
    assert f"{tmp_path / 'data.jsonl'}:3: {problem}" in str(caught.value)


def test_labels_that_are_not_known_are_named_together(load: Any) -> None:
    records = [{"text": "a", "label": name} for name in ("cat", "dgo", "cow")]
    with pytest.raises(UserError, match=r"(?s):2: unknown label 'dgo'; the classes are cat, dog.*:3: unknown .*'cow'"):
        load(*records, known=["cat", "dog"])
    with pytest.raises(UserError, match="label 2: there are 2 classes, 0 to 1"):
        load({"text": "a", "label": 2}, known=["cat", "dog"])


def test_classes_that_make_no_sense_are_refused(load: Any) -> None:
    with pytest.raises(UserError, match=r"the labels are 1, 2, 5; classes are numbered from 0 without gaps"):
        load(*({"text": "a", "label": label} for label in (5, 1, 2)))
    with pytest.raises(UserError, match="all labels are 'yes': there is nothing to tell apart"):
        load({"text": "a", "label": "yes"})
    with pytest.raises(UserError, match=r"has 2 classes \(no, yes\), but the model's config says 3"):
        load({"text": "a", "label": "yes"}, {"text": "a", "label": "no"}, count=3)


def test_long_texts_are_dropped_or_cut_between_the_special_tokens(load: Any, tokenizer: Any) -> None:
    records = [
        {"text": "abcdefgh", "label": 0},
        {"text": "ab", "label": 1},
        {"text": "a", "text_pair": "b" * 9, "label": 0},
    ]
    dropped = load(*records, sequence_length=6, known=["no", "yes"])
    assert (len(dropped), dropped.report.overlong, dropped.classes.tolist()) == (1, 2, [1])
    cut = load(*records, sequence_length=6, overlong="truncate")
    assert cut.report.truncated == 2 and cut.report.longest == 13
    assert [tokenizer.decode(sample.input_ids) for sample in cut] == [
        "<cls>abcd<sep>",
        "<cls>ab<sep>",
        "<cls>a<sep>bb<sep>",
    ]
    with pytest.raises(UserError, match=r"no sample is left of 3 records: 3 are longer than data\.sequence_length = 3"):
        load(*records, sequence_length=3)


def test_a_pair_whose_special_tokens_alone_are_too_long_is_dropped_once(load: Any) -> None:
    records = [
        {"text": "abcd", "label": 0},
        {"text": "a", "text_pair": "b", "label": 1},
        {"text": "ab", "text_pair": "", "label": 1},
    ]
    data = load(*records, sequence_length=2, overlong="truncate", known=["no", "yes"])
    report = data.report
    assert (report.records, report.samples, report.truncated, report.overlong) == (3, 1, 1, 2)
    with pytest.raises(UserError) as caught:
        load(*records[1:], sequence_length=2, overlong="truncate", known=["no", "yes"])
    assert (
        "no sample is left of 2 records: 2 are longer than data.sequence_length = 2 even when they are cut to their "
        "special tokens (raise it), 0 are empty"
    ) in str(caught.value)


def test_a_file_without_a_record_is_empty(load: Any, tmp_path: Path) -> None:
    with pytest.raises(UserError) as caught:
        load()
    assert str(caught.value) == (f"data.train: the data set is empty: there is no record ({tmp_path / 'data.jsonl'})")


def collate(data: Any, pooling: str, **options: Any) -> Any:
    options = {"sequence_length": 32, "pad_token_id": 0, "token_types": True} | options
    return collate_classification(data, [0, 1, 5], pooling=pooling, **options)


def test_rows_are_padded_on_the_right_and_know_their_pooled_token(load: Any) -> None:
    data = load(
        {"text": "ab", "label": "x"}, {"text": "c", "text_pair": "d", "label": "y"}, {"text": "e", "label": "y"}
    )
    batch = collate(data, "last")
    assert batch.inputs["labels"].tolist() == [0, 1, 1]
    assert batch.inputs["attention_mask"].sum(1).tolist() == [4, 5, 3]
    assert batch.inputs["input_ids"].shape == (3, 8)
    assert batch.inputs["token_type_ids"][1].tolist() == [0, 0, 0, 1, 1, 0, 0, 0]
    assert batch.documents[2].tolist() == [5, 5, 5, -1, -1, -1, -1, -1]
    assert batch.pooled.nonzero().tolist() == [[0, 3], [1, 4], [2, 2]]
    assert torch.equal(batch.supervised, batch.pooled) and batch.supervised_tokens == 3 and batch.tokens == 12
    first = collate(data, "first", token_types=False)
    assert first.pooled.nonzero().tolist() == [[0, 0], [1, 0], [2, 0]] and "token_type_ids" not in first.inputs
    mean = collate(data, "mean")
    assert torch.equal(mean.supervised, mean.documents >= 0) and torch.equal(mean.pooled, first.pooled)


def test_the_last_token_is_the_one_that_transformers_pools(load: Any) -> None:
    """Where padding equals the end of sequence, the text's own end is passed over, as the model does."""
    data = load({"text": "ab", "label": 0}, {"text": "c", "label": 1}, {"text": "d", "label": 1})
    batch = collate(data, "last", pad_token_id=2)  # <sep>
    assert batch.pooled.nonzero().tolist() == [[0, 2], [1, 1], [2, 1]]


def test_the_fingerprint_is_of_tokens_and_classes(load: Any) -> None:
    records = [{"text": "ab", "label": 0}, {"text": "c", "label": 1}]
    plain = load(*records).fingerprint
    assert load(*({**record, "id": 7} for record in records)).fingerprint == plain
    assert load({"text": "ab", "label": 1}, {"text": "c", "label": 0}).fingerprint != plain
    assert load({"text": "abc", "label": 0}, {"text": "c", "label": 1}).fingerprint != plain
