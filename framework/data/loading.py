"""From sources to data sets: reading, validating, tokenising, labelling, or taking all this from the token cache."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from framework.data.cache import CacheError, TokenCache, file_hash
from framework.data.dataset import TokenizedDataset, sample_digest
from framework.data.formats import ProblemList, Record, read_records
from framework.data.labels import label_records
from framework.data.readers import first_line
from framework.data.report import DataReport
from framework.data.sources import Part, Paths, list_parts
from framework.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

logger = logging.getLogger(__name__)

CHUNK = 1024
"""Records that are tokenised together: enough to keep the tokenizer's threads busy, little to hold."""

CONTENT_KEYS = (
    "messages",
    "conversations",
    "conversation",
    "system",
    "tools",
    "chat_template_kwargs",
    "instruction",
    "input",
    "output",
    "history",
    "prompt",
    "completion",
    "text",
    "text_pair",
)
"""Keys of a record that a sample is made from, in all formats."""


def load_dataset(
    paths: Paths,
    *,
    tokenizer: PreTrainedTokenizerBase,
    sequence_length: int,
    format: str = "auto",
    overlong: str = "drop",
    train_on: str = "assistant",
    option: str = "data.train",
    cache: TokenCache | None = None,
    most: int | None = None,
) -> TokenizedDataset:
    """Read, validate, tokenise and label data, or take the tokens from the cache.

    Args:
        paths: Files, directories or hub names (see `framework.data.sources`); the order of samples follows them.
        tokenizer: From `load_tokenizer`.
        sequence_length: The most tokens that a sample may have.
        format: One of `framework.data.formats`, or `auto`: decided for each file by its first record.
        overlong: What happens to longer samples: `drop`, or `truncate` (the end is cut off).
        train_on: Which turns of conversations carry labels: `assistant` (all of its turns) or `last_assistant`.
        option: The config key that `paths` comes from, for error messages.
        cache: Where the tokens are taken from, or written to for the next time; None: they are kept in memory.
        most: Samples to read, without a cache: the first ones of every file, equally many; None: all.

    Raises:
        UserError: A source is missing, a record is broken (its place and what is wrong; up to ten together), there is
            no record, none fits into the sequence length, or no token anywhere carries a label.
    """
    assert cache is None or most is None, "a cache has all samples"
    parts = list_parts(paths, option=option)
    of_part = None if most is None else -(-most // len(parts))
    reading = _Reading(parts, tokenizer, sequence_length, format, overlong, train_on, option, of_part)
    dataset = _in_memory(reading) if cache is None else _cached(reading, cache)
    dataset.name = str(parts[0]) if len(parts) == 1 else ", ".join(dict.fromkeys(part.source.path for part in parts))
    return dataset


class _Reading(NamedTuple):
    """What `load_dataset` is to read, and how."""

    parts: Sequence[Part]
    tokenizer: PreTrainedTokenizerBase
    sequence_length: int
    format: str
    overlong: str
    train_on: str
    option: str
    most: int | None
    """Samples of each part."""

    def samples(self, report: DataReport) -> Iterator[tuple[np.ndarray, np.ndarray, int]]:
        """Tokens, labels and `content_hash` of each sample that is kept; all records are counted in `report`.

        Raises:
            UserError: see `load_dataset`; at the end, when there may have been samples already.
        """
        problems = ProblemList(self.option)
        for part in self.parts:
            records = read_records(part, format=self.format, problems=problems)
            enough = None if self.most is None else report.samples + self.most
            for format, chunk in _chunks(records, CHUNK if self.most is None else min(CHUNK, self.most)):
                if report.samples == enough:
                    break
                report.formats[str(part)] = format
                report.records += len(chunk)
                if problems.problems:
                    continue  # only to find further broken records
                labelled = label_records(format, chunk, self.tokenizer, train_on=self.train_on)
                for record, (ids, supervised) in zip(chunk, labelled, strict=True):
                    if report.samples != enough and _admit(
                        ids, supervised, self.sequence_length, self.overlong, report
                    ):
                        kept = slice(self.sequence_length)
                        yield ids[kept], supervised[kept], content_hash(record)
        problems.raise_if_any()
        if not report.samples:
            names = ", ".join(map(str, self.parts))
            raise UserError(f"{self.option}: {_why_empty(report, self.sequence_length)} ({names})")

    def key(self, cache: TokenCache) -> str:
        """Name of the cache's entry for it, which depends on what is read and how, not on what it is called."""
        return cache.key(
            parts=[
                [part.fingerprint] if part.path is None else [*part.path.suffixes[-2:], _file_hash(part.path)]
                for part in self.parts
            ],
            formats=[part.source.format or self.format for part in self.parts],
            sequence_length=self.sequence_length,
            overlong=self.overlong,
            train_on=self.train_on,
        )

    def stamps(self) -> list[tuple[int, int]]:
        """What changes when a file is written to while it is read."""
        statuses = [part.path.stat() for part in self.parts if part.path is not None]
        return [(status.st_size, status.st_mtime_ns) for status in statuses]


def _file_hash(path: Path) -> str:
    try:
        return file_hash(path)
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {first_line(error)}") from error


def _in_memory(reading: _Reading) -> TokenizedDataset:
    report = DataReport()
    ids, supervised, contents = zip(*reading.samples(report), strict=True)
    lengths = np.array([len(each) for each in ids], np.int64)
    return TokenizedDataset(
        np.concatenate(ids), np.concatenate(supervised), lengths, report, contents=np.array(contents, np.uint64)
    )


def _cached(reading: _Reading, cache: TokenCache) -> TokenizedDataset:
    """The data set from the cache or, when it has been written there; in memory if it cannot be."""
    stamps = reading.stamps()
    key = reading.key(cache)
    names = [str(part) for part in reading.parts]
    dataset = cache.load(key)
    if dataset is None:
        try:
            with cache.writer(key) as writer:
                report = DataReport()
                for ids, supervised, content in reading.samples(report):
                    writer.add(ids, supervised, digest=sample_digest(ids, supervised), content=content)
                if reading.stamps() != stamps:
                    raise CacheError("a file was changed while it was read")
                # The cache knows parts by their place in the list, since their names may change.
                report.formats = {str(names.index(name)): format for name, format in report.formats.items()}
                dataset = writer.finish(report)
        except CacheError as error:
            logger.warning("token cache: %s cannot be written, going on without: %s", cache.directory, error)
            return _in_memory(reading)
    dataset.report.formats = {names[int(place)]: format for place, format in dataset.report.formats.items()}
    return dataset


def content_hash(record: Record) -> int:
    """A hash of what a sample is made from, of 64 bits: the same for records that differ in other keys only."""
    content = {key: record.content[key] for key in CONTENT_KEYS if key in record.content}
    digest = hashlib.blake2b(json.dumps(content, sort_keys=True, default=str).encode(), digest_size=8)
    return int.from_bytes(digest.digest(), "little")


def _chunks(records: Iterable[tuple[str, Record]], size: int) -> Iterator[tuple[str, list[Record]]]:
    """Group the records of one file, which has one format."""
    records = iter(records)
    while chunk := list(islice(records, size)):
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
