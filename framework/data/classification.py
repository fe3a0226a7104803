"""Texts, or pairs of texts, with one class each."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import islice
from typing import TYPE_CHECKING, Literal, NamedTuple

import numpy as np
import torch

from framework.data.batch import NO_DOCUMENT, Batch, drawn, padded_length
from framework.data.classes import ClassLabels, digest
from framework.data.dataset import Dataset
from framework.data.formats import ProblemList, Record, read_records
from framework.data.loading import CHUNK, content_hash
from framework.data.report import DataReport
from framework.data.sources import Paths, list_parts
from framework.errors import UserError
from framework.selection import pooled_positions

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Pooling = Literal["first", "last", "mean"]
"""Which tokens a classifier's head reads: the first, the last that is not padding, or all of them."""

_Encoded = tuple[np.ndarray, np.ndarray]  # token ids, token types


class ClassifiedText(NamedTuple):
    """One tokenised text or pair of texts."""

    input_ids: np.ndarray
    """int32 `[sequence]`."""
    token_types: np.ndarray
    """uint8 `[sequence]`: 0 in a first text and what belongs to it, 1 in a second, as the tokenizer says."""
    label: int
    """Number of the class."""


class ClassificationDataset(Dataset):
    """Tokenised texts with their classes, compact."""

    def __init__(
        self,
        texts: Sequence[_Encoded],
        codes: Sequence[int],
        labels: ClassLabels,
        report: DataReport,
        *,
        name: str,
        contents: Sequence[int],
    ) -> None:
        """Take the samples of a source.

        Args:
            texts: Tokens and token types of each.
            codes: Code of each label.
            labels: Those of the whole data set; samples can be taken when they are settled.
            report: What was read, dropped and truncated.
            name: What messages call the data set.
            contents: A hash of the text of each.
        """
        self.input_ids = np.concatenate([ids for ids, _ in texts])
        self.token_types = np.concatenate([types for _, types in texts])
        self.offsets = np.concatenate([[0], np.cumsum([len(ids) for ids, _ in texts], dtype=np.int64)])
        self.report = report
        self.name = name
        self._codes = np.asarray(codes, np.int64)
        self._labels = labels
        self._contents = np.asarray(contents, np.uint64)

    @cached_property
    def classes(self) -> np.ndarray:
        """Class number of each sample, int64 `[samples]`."""
        return self._labels.numbers(self._codes)

    @property
    def contents(self) -> np.ndarray:
        """A hash of the text that each sample was made from, uint64 `[samples]`."""
        return self._contents

    @property
    def lengths(self) -> np.ndarray:
        """Tokens of each sample, int64 `[samples]`."""
        return np.diff(self.offsets)

    @property
    def supervised_lengths(self) -> np.ndarray:
        """Ones: a sample has one label. int64 `[samples]`."""
        return np.ones(len(self), np.int64)

    @cached_property
    def digests(self) -> np.ndarray:
        """A hash of tokens, token types and class of each sample, uint64 `[samples]`."""
        digests = (digest(ids.tobytes(), types.tobytes(), bytes(f"{label}", "ascii")) for ids, types, label in self)
        return np.fromiter(digests, np.uint64, len(self))

    def __len__(self) -> int:
        """Samples."""
        return len(self.offsets) - 1

    def __getitem__(self, index: int) -> ClassifiedText:
        """The sample at `index`, counted from 0."""
        if not 0 <= index < len(self):
            raise IndexError(index)
        reach = slice(self.offsets[index], self.offsets[index + 1])
        return ClassifiedText(self.input_ids[reach], self.token_types[reach], int(self.classes[index]))


@dataclass
class _Reading:
    """A data set in the making."""

    labels: ClassLabels
    report: DataReport = field(default_factory=lambda: DataReport(one_class_each=True))
    texts: list[_Encoded] = field(default_factory=list)
    codes: list[int] = field(default_factory=list)
    contents: list[int] = field(default_factory=list)


def load_classification(
    paths: Paths,
    *,
    tokenizer: PreTrainedTokenizerBase,
    sequence_length: int,
    labels: ClassLabels,
    overlong: str = "drop",
    option: str = "data.train",
) -> ClassificationDataset:
    """Read, validate and tokenise `classification` records.

    Args:
        paths: Files, directories or hub names (see `framework.data.sources`); the order of samples follows them.
        tokenizer: From `load_tokenizer`; puts its special tokens around a text or between the texts of a pair.
        sequence_length: The most tokens that a sample may have.
        labels: Takes the labels; to be settled when all sources are read.
        overlong: What happens to longer samples: `drop`, or `truncate` (the tokenizer cuts the longer text of a pair
            first and keeps its special tokens).
        option: The config key that `paths` comes from, for error messages.

    Raises:
        UserError: A source is missing, a record or its label is broken (its place and what is wrong; up to ten
            together), or nothing fits.
    """
    parts = list_parts(paths, option=option)
    problems = ProblemList(option)
    reading = _Reading(labels)
    for part in parts:
        reading.report.formats[str(part)] = "classification"
        records = (record for _, record in read_records(part, format="classification", problems=problems))
        for chunk in _chunks(records):
            for record in chunk:
                if problem := labels.problem(record.content["label"]):
                    problems.add(record.place, problem)
                else:
                    labels.code(record.content["label"])
            if not problems.problems:
                _encode_chunk(chunk, reading, tokenizer, sequence_length, overlong)
    problems.raise_if_any()
    report, name = reading.report, ", ".join(map(str, parts))
    if not reading.texts:
        raise UserError(f"{option}: {_why_empty(report, sequence_length, overlong)} ({name})")
    return ClassificationDataset(reading.texts, reading.codes, labels, report, name=name, contents=reading.contents)


def _why_empty(report: DataReport, sequence_length: int, overlong: str) -> str:
    if not report.records:
        return "the data set is empty: there is no record"
    advice = (
        "even when they are cut to their special tokens (raise it)"
        if overlong == "truncate"
        else f"(the longest has {report.longest} tokens; raise it, or set data.overlong to 'truncate')"
    )
    return (
        f"no sample is left of {report.records} records: {report.overlong} are longer than data.sequence_length = "
        f"{sequence_length} {advice}, {report.empty} are empty"
    )


def _chunks(records: Iterable[Record]) -> Iterator[list[Record]]:
    records = iter(records)
    while chunk := list(islice(records, CHUNK)):
        yield chunk


def _encode_chunk(
    chunk: list[Record], reading: _Reading, tokenizer: PreTrainedTokenizerBase, sequence_length: int, overlong: str
) -> None:
    report = reading.report
    report.records += len(chunk)
    encoded = _encode(chunk, tokenizer)
    too_long = [index for index, (ids, _) in enumerate(encoded) if len(ids) > sequence_length]
    report.longest = max([report.longest, *(len(ids) for ids, _ in encoded)])
    if overlong == "truncate" and too_long:
        cut = _encode([chunk[index] for index in too_long], tokenizer, truncation=True, max_length=sequence_length)
        for index, sample in zip(too_long, cut, strict=True):
            encoded[index] = sample
            report.truncated += len(sample[0]) <= sequence_length  # not so if special tokens alone are too many
    for record, (ids, types) in zip(chunk, encoded, strict=True):
        if not len(ids):
            report.empty += 1
        elif len(ids) > sequence_length:
            report.overlong += 1
        else:
            reading.codes.append(reading.labels.code(record.content["label"]))
            reading.contents.append(content_hash(record))
            reading.texts.append((ids, types))
            report.samples += 1
            report.tokens += len(ids)
    report.supervised_tokens = report.samples


def _encode(records: Sequence[Record], tokenizer: PreTrainedTokenizerBase, **truncation: bool | int) -> list[_Encoded]:
    """Tokens and token types of each record."""
    encoded: dict[int, _Encoded] = {}
    for paired in (False, True):
        places = [place for place, record in enumerate(records) if ("text_pair" in record.content) is paired]
        if not places:
            continue
        texts = [[records[place].content[key] for place in places] for key in ("text", "text_pair")[: 1 + paired]]
        # Not verbose: samples over the tokenizer's own length limit are the business of `data.sequence_length`.
        output = tokenizer(*texts, return_attention_mask=False, return_token_type_ids=True, verbose=False, **truncation)
        for place, ids, types in zip(places, output["input_ids"], output["token_type_ids"], strict=True):
            encoded[place] = np.asarray(ids, np.int32), np.asarray(types, np.uint8)
    return [encoded[place] for place in range(len(records))]


def collate_classification(
    dataset: Dataset,
    draws: Sequence[int],
    *,
    sequence_length: int,
    pad_token_id: int,
    pooling: Pooling,
    token_types: bool,
) -> Batch:
    """One sample a row, padded on the right.

    Args:
        dataset: Where the samples are.
        draws: Draw index of each row.
        sequence_length: The most tokens that a row may have.
        pad_token_id: What fills up; the model's own, or a decoder would pool another token than it is told here.
        pooling: Which tokens the model's head reads.
        token_types: Whether the model takes `token_type_ids`.
    """
    samples = [drawn(dataset, draw) for draw in draws]
    length = padded_length(max(len(sample.input_ids) for sample in samples), sequence_length)
    shape = (len(samples), length)
    input_ids = torch.full(shape, pad_token_id, dtype=torch.int64)
    types, attention_mask = torch.zeros(shape, dtype=torch.int64), torch.zeros(shape, dtype=torch.int64)
    documents = torch.full(shape, NO_DOCUMENT, dtype=torch.int64)
    for row, (sample, draw) in enumerate(zip(samples, draws, strict=True)):
        reach = slice(len(sample.input_ids))
        input_ids[row, reach] = torch.from_numpy(sample.input_ids.astype(np.int64))
        types[row, reach] = torch.from_numpy(sample.token_types.astype(np.int64))
        attention_mask[row, reach], documents[row, reach] = 1, int(draw)
    labels = torch.tensor([sample.label for sample in samples])
    inputs = {"input_ids": input_ids, "attention_mask": attention_mask, "labels": labels}
    if token_types:
        inputs["token_type_ids"] = types
    pooled = pooled_positions(pooling, shape, input_ids, pad_token_id)
    read = documents != NO_DOCUMENT if pooling == "mean" else pooled
    return Batch(inputs, documents, read, supervised_tokens=len(samples), pooled=pooled)
