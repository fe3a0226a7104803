"""A data set in memory: all tokens in one array, samples as ranges of it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from framework.data.formats import ProblemList, Record, read_records
from framework.data.labels import label_records
from framework.data.sources import Paths, list_parts
from framework.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

CHUNK = 1024
"""Records that are tokenised together: enough to keep the tokenizer's threads busy, little to hold."""

IGNORED = -100
"""The label of a token that is not to be learnt (Hugging Face's convention)."""


class Sample(NamedTuple):
    """One tokenised document."""

    input_ids: np.ndarray
    """int32 `[sequence]`."""
    labels: np.ndarray
    """int32 `[sequence]`, unshifted: a token's own id where it is to be learnt, else -100; the first is always -100."""


@dataclass
class DataReport:
    """What became of the records of a data set."""

    formats: dict[str, str] = field(default_factory=dict)
    """Format of each file or split."""
    records: int = 0
    """Records read."""
    samples: int = 0
    """Records that made it into the data set."""
    empty: int = 0
    """Dropped: no token at all."""
    unsupervised: int = 0
    """Dropped: no token with a label, also where truncation took the labelled ones."""
    overlong: int = 0
    """Dropped: longer than the sequence length, with `overlong: "drop"`."""
    truncated: int = 0
    """Kept, but cut to the sequence length, with `overlong: "truncate"`."""
    longest: int = 0
    """Tokens of the longest record, before anything was dropped or cut."""
    tokens: int = 0
    """Tokens in the data set."""
    supervised_tokens: int = 0
    """Tokens in the data set that carry a label."""

    @property
    def labelled_share(self) -> float:
        """Supervised tokens / all tokens."""
        return self.supervised_tokens / self.tokens if self.tokens else 0.0

    def summary(self) -> str:
        """The report on one line, for a log."""
        notes = {
            "empty": self.empty,
            "without a label": self.unsupervised,
            "over the sequence length": self.overlong,
        }
        dropped = ", ".join(f"{count} {reason}" for reason, count in notes.items() if count)
        return (
            f"{self.samples} samples of {self.records} records, {self.tokens} tokens, "
            f"{self.labelled_share:.1%} with a label, longest record {self.longest}"
            + (f"; dropped: {dropped}" if dropped else "")
            + (f"; truncated: {self.truncated}" if self.truncated else "")
        )


class TokenizedDataset(Sequence[Sample]):
    """Tokenised samples, compact: five bytes a token, whatever the number of samples."""

    def __init__(self, input_ids: np.ndarray, supervised: np.ndarray, lengths: np.ndarray, report: DataReport) -> None:
        """Take the tokens of all samples, one after the other.

        Args:
            input_ids: int32 `[tokens]`.
            supervised: bool `[tokens]`, tokens with a label; the first of each sample is never one.
            lengths: Tokens of each sample, `[samples]`.
            report: What was read, dropped and truncated.
        """
        self.input_ids = input_ids
        self.supervised = supervised
        self.offsets = np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)])
        self.report = report

    @property
    def lengths(self) -> np.ndarray:
        """Tokens of each sample, int64 `[samples]`."""
        return np.diff(self.offsets)

    def __len__(self) -> int:
        """Samples."""
        return len(self.offsets) - 1

    def __getitem__(self, index: int) -> Sample:
        """The sample at `index`, counted from 0."""
        if not 0 <= index < len(self):
            raise IndexError(index)
        reach = slice(self.offsets[index], self.offsets[index + 1])
        input_ids = self.input_ids[reach]
        return Sample(input_ids, np.where(self.supervised[reach], input_ids, np.int32(IGNORED)))


def load_dataset(
    paths: Paths,
    *,
    tokenizer: PreTrainedTokenizerBase,
    sequence_length: int,
    format: str = "auto",
    overlong: str = "drop",
    train_on: str = "assistant",
    option: str = "data.train",
) -> TokenizedDataset:
    """Read, validate, tokenise and label data.

    Args:
        paths: Files, directories or hub names (see `framework.data.sources`); the order of samples follows them.
        tokenizer: From `load_tokenizer`.
        sequence_length: The most tokens that a sample may have.
        format: One of `framework.data.formats`, or `auto`: decided for each file by its first record.
        overlong: What happens to longer samples: `drop`, or `truncate` (the end is cut off).
        train_on: Which turns of conversations carry labels: `assistant` (all of its turns) or `last_assistant`.
        option: The config key that `paths` comes from, for error messages.

    Raises:
        UserError: A source is missing, a record is broken (its place and what is wrong; up to ten together), there is
            no record, none fits into the sequence length, or no token anywhere carries a label.
    """
    parts = list_parts(paths, option=option)
    problems = ProblemList(option)
    report = DataReport()
    ids_parts: list[np.ndarray] = []
    supervised_parts: list[np.ndarray] = []
    for part in parts:
        records = read_records(part, format=format, problems=problems)
        for chunk_format, chunk in _chunks(records):
            report.formats[str(part)] = chunk_format
            report.records += len(chunk)
            if problems.problems:
                continue  # only to find further broken lines
            for ids, supervised in label_records(chunk_format, chunk, tokenizer, train_on=train_on):
                if _admit(ids, supervised, sequence_length, overlong, report):
                    ids_parts.append(ids[:sequence_length])
                    supervised_parts.append(supervised[:sequence_length])
    problems.raise_if_any()
    if not ids_parts:
        raise UserError(f"{option}: {_why_empty(report, sequence_length)} ({', '.join(map(str, parts))})")
    lengths = np.array([len(ids) for ids in ids_parts], np.int64)
    return TokenizedDataset(np.concatenate(ids_parts), np.concatenate(supervised_parts), lengths, report)


def _chunks(records: Iterable[tuple[str, Record]]) -> Iterator[tuple[str, list[Record]]]:
    """Group the records of one file, which has one format."""
    records = iter(records)
    while chunk := list(islice(records, CHUNK)):
        yield chunk[0][0], [record for _, record in chunk]


def _admit(ids: np.ndarray, supervised: np.ndarray, sequence_length: int, overlong: str, report: DataReport) -> bool:
    """Whether a sample (cut to `sequence_length`) belongs in the data set; counts it. Unlabels its first token."""
    report.longest = max(report.longest, len(ids))
    if not len(ids):
        report.empty += 1
        return False
    too_long = len(ids) > sequence_length
    if too_long and overlong == "drop":
        report.overlong += 1
        return False
    supervised[0] = False  # nothing before it to learn it from
    labelled = int(supervised[:sequence_length].sum())
    if not labelled:
        report.unsupervised += 1
        return False
    report.truncated += too_long
    report.samples += 1
    report.tokens += min(len(ids), sequence_length)
    report.supervised_tokens += labelled
    return True


def _why_empty(report: DataReport, sequence_length: int) -> str:
    if not report.records:
        return "the data set is empty: there is no record"
    if report.overlong and not report.unsupervised:
        return (
            f"no sample is left: {report.overlong} of {report.records} records are longer than data.sequence_length = "
            f"{sequence_length} (the longest has {report.longest} tokens); raise it, or set data.overlong to 'truncate'"
        )
    return (
        "no label anywhere: no token of any sample is one to learn "
        f"({report.unsupervised} of {report.records} records have no label, {report.overlong} are longer than "
        f"data.sequence_length = {sequence_length}, {report.empty} are empty); `messages` needs assistant turns, and "
        "with data.overlong = 'truncate' long prompts can push all answers out"
    )
