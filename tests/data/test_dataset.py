from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from framework.data import DataReport, load_dataset
from framework.errors import UserError


def write(path: Path, *records: dict) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def test_samples_have_ids_and_unshifted_labels(tmp_path: Path, tiny_tokenizer) -> None:
    path = write(tmp_path / "a.jsonl", {"prompt": "ab", "completion": "c"}, {"prompt": "", "completion": "ab"})
    dataset = load_dataset(path, tokenizer=tiny_tokenizer, sequence_length=8)
    assert len(dataset) == 2
    assert dataset[0].input_ids.tolist() == [16, 17, 18, 2]
    assert dataset[0].labels.tolist() == [-100, -100, 18, 2]
    # Nothing stands before a document's first token to learn it from.
    assert dataset[1].input_ids.tolist() == [16, 17, 2]
    assert dataset[1].labels.tolist() == [-100, 17, 2]
    assert {array.dtype for sample in dataset for array in sample} == {np.dtype("int32")}
    assert dataset.lengths.tolist() == [4, 3]
    assert (dataset.report.tokens, dataset.report.supervised_tokens) == (7, 4)
    assert dataset.report.labelled_share == 4 / 7
    with pytest.raises(IndexError):
        dataset[2]


def test_files_of_different_formats_are_joined_in_order(tmp_path: Path, tiny_tokenizer) -> None:
    first = write(tmp_path / "b.jsonl", {"text": "ab"})
    second = write(tmp_path / "a.jsonl", {"prompt": "c", "completion": "d"})
    dataset = load_dataset([str(first), str(second)], tokenizer=tiny_tokenizer, sequence_length=8)
    assert [sample.input_ids.tolist() for sample in dataset] == [[16, 17], [18, 19, 2]]
    assert dataset.report.formats == {str(first): "text", str(second): "completion"}


def test_many_records_are_tokenised_in_chunks_of_one_order(tmp_path: Path, tiny_tokenizer) -> None:
    records = [{"text": "a" * (1 + number % 7) + "b"} for number in range(2500)]
    dataset = load_dataset(write(tmp_path / "a.jsonl", *records), tokenizer=tiny_tokenizer, sequence_length=8)
    assert dataset.lengths.tolist() == [2 + number % 7 for number in range(2500)]


def test_samples_that_teach_nothing_are_dropped_and_counted(tmp_path: Path, tiny_tokenizer) -> None:
    def turns(*roles: str) -> dict:
        return {"messages": [{"role": role, "content": "a"} for role in roles]}

    path = write(tmp_path / "a.jsonl", turns("user"), turns("user", "assistant"), turns("system", "user"))
    texts = write(tmp_path / "b.jsonl", {"text": ""}, {"text": "a"}, {"text": "ab"})
    dataset = load_dataset([path, texts], tokenizer=tiny_tokenizer, sequence_length=16)
    assert [sample.input_ids.tolist() for sample in dataset] == [[1, 3, 16, 2, 4, 16, 2], [16, 17]]
    report = dataset.report
    assert (report.records, report.samples, report.empty, report.unsupervised) == (6, 2, 1, 3)
    assert report.summary() == (
        "2 samples of 6 records, 9 tokens, 33.3% with a label, longest record 7; dropped: 1 empty, 3 without a label"
    )


OVERLONG = [
    {"prompt": "aaaa", "completion": "bbbb"},
    {"prompt": "aaaaaa", "completion": "b"},
    {"prompt": "a", "completion": "bbbb"},
]


def test_overlong_samples_are_dropped(tmp_path: Path, tiny_tokenizer) -> None:
    path = write(tmp_path / "a.jsonl", *OVERLONG)
    dataset = load_dataset(path, tokenizer=tiny_tokenizer, sequence_length=6, overlong="drop")
    assert [sample.input_ids.tolist() for sample in dataset] == [[16, 17, 17, 17, 17, 2]]
    assert (dataset.report.overlong, dataset.report.truncated, dataset.report.longest) == (2, 0, 9)


def test_overlong_samples_are_truncated_unless_no_label_is_left(tmp_path: Path, tiny_tokenizer) -> None:
    path = write(tmp_path / "a.jsonl", *OVERLONG)
    dataset = load_dataset(path, tokenizer=tiny_tokenizer, sequence_length=6, overlong="truncate")
    assert [sample.input_ids.tolist() for sample in dataset] == [[16, 16, 16, 16, 17, 17], [16, 17, 17, 17, 17, 2]]
    assert dataset[0].labels.tolist() == [-100, -100, -100, -100, 17, 17]
    report = dataset.report
    assert (report.overlong, report.truncated, report.unsupervised, report.samples) == (0, 1, 1, 2)
    assert (report.tokens, report.supervised_tokens) == (12, 7)


@pytest.mark.parametrize(
    ("records", "message"),
    [
        ([], "the data set is empty: there is no record"),
        ([{"messages": [{"role": "user", "content": "a"}]}], "no label anywhere"),
        (
            [{"text": "abcdefghijk"}],
            "1 of 1 records are longer than data.sequence_length = 8 (the longest has 11 tokens)",
        ),
    ],
)
def test_a_data_set_without_anything_to_learn_is_refused(
    tmp_path: Path, tiny_tokenizer, records: list, message: str
) -> None:
    path = write(tmp_path / "a.jsonl", *records)
    with pytest.raises(UserError) as error:
        load_dataset(path, tokenizer=tiny_tokenizer, sequence_length=8, option="data.eval")
    assert str(error.value).startswith("data.eval: ")
    assert message in str(error.value)
    assert str(path) in str(error.value)


def test_broken_lines_of_all_files_are_reported_together(tmp_path: Path, tiny_tokenizer) -> None:
    first = write(tmp_path / "a.jsonl", {"text": "a"}, {"text": 1})
    second = write(tmp_path / "b.jsonl", {"prompt": "a"}, {"text": "a"})
    with pytest.raises(UserError) as error:
        load_dataset([first, second], tokenizer=tiny_tokenizer, sequence_length=8)
    assert f"{first}:2: " in str(error.value)
    assert f"{second}:1: " in str(error.value)
    assert error.value.exit_code == 2


def test_a_label_a_sample_is_no_class() -> None:
    report = DataReport(records=3, samples=3, tokens=12, supervised_tokens=3)
    assert report.summary() == "3 samples of 3 records, 12 tokens, 25.0% with a label"
    classified = replace(report, one_class_each=True)
    assert classified.summary() == "3 samples of 3 records, 12 tokens, one class each"
    assert DataReport.total([classified, classified]) == replace(
        classified, records=6, samples=6, tokens=24, supervised_tokens=6
    )
    assert DataReport.total([report, report]).one_class_each is False
