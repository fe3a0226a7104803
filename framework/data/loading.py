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
from framework.data.formats import ProblemList, Record, list_files, read_records
from framework.data.labels import LABELLERS
from framework.data.report import DataReport
from framework.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

logger = logging.getLogger(__name__)

CHUNK = 1024
"""Records that are tokenised together: enough to keep the tokenizer's threads busy, little to hold."""

CONTENT_KEYS = {"messages": ("messages",), "completion": ("prompt", "completion"), "text": ("text",)}
"""For each format the keys of a record that its sample is made from."""


def load_dataset(
    paths: str | Path | Sequence[str | Path],
    *,
    tokenizer: PreTrainedTokenizerBase,
    sequence_length: int,
    format: str = "auto",
    overlong: str = "drop",
    option: str = "data.train",
    cache: TokenCache | None = None,
) -> TokenizedDataset:
    """Read, validate, tokenise and label JSON lines files (see `framework.data.formats` for the formats).

    Args:
        paths: A file, a directory of `*.jsonl` files, or a list of them; the order of samples follows it.
        tokenizer: From `load_tokenizer`.
        sequence_length: The most tokens that a sample may have.
        format: `messages`, `completion`, `text`, or `auto`: decided for each file by its first record.
        overlong: What happens to longer samples: `drop`, or `truncate` (the end is cut off).
        option: The config key that `paths` comes from, for error messages.
        cache: Where the tokens are taken from, or written to for the next time; None: they are kept in memory.

    Raises:
        UserError: A file is missing, a record is broken (file, line, and what is wrong; up to ten together), there is
            no record, none fits into the sequence length, or no token anywhere carries a label.
    """
    files = list_files(paths, option=option)
    read = _Reading(files, tokenizer, sequence_length, format, overlong, option)
    name = ", ".join(map(str, files))
    if cache is None:
        return _in_memory(read, name)
    stamps = [_stamp(file) for file in files]
    key = cache.key(
        files=[[file.suffix, file_hash(file)] for file in files],
        format=format,
        sequence_length=sequence_length,
        overlong=overlong,
    )
    dataset = cache.load(key)
    if dataset is None:
        try:
            with cache.writer(key) as writer:
                report = DataReport()
                for ids, supervised, content in read.samples(report):
                    writer.add(ids, supervised, digest=sample_digest(ids, supervised), content=content)
                if stamps != [_stamp(file) for file in files]:
                    raise CacheError("a file was changed while it was read")
                report.formats = {str(files.index(Path(file))): each for file, each in report.formats.items()}
                dataset = writer.finish(report)
        except CacheError as error:
            logger.warning("token cache: %s cannot be written, going on without: %s", cache.directory, error)
            return _in_memory(read, name)
    # Files are known to the cache by their place in the list: their names may have changed.
    dataset.report.formats = {str(files[int(place)]): each for place, each in dataset.report.formats.items()}
    dataset.name = name
    return dataset


def _in_memory(read: _Reading, name: str) -> TokenizedDataset:
    report = DataReport()
    ids, supervised, contents = zip(*read.samples(report), strict=True)
    return TokenizedDataset(
        np.concatenate(ids),
        np.concatenate(supervised),
        np.array([len(each) for each in ids], np.int64),
        report,
        name=name,
        contents=np.array(contents, np.uint64),
    )


def _stamp(file: Path) -> tuple[int, int]:
    status = file.stat()
    return status.st_size, status.st_mtime_ns


def content_hash(format: str, record: Record) -> int:
    """A hash of what a sample is made from, of 64 bits: the same for records that differ in further keys only."""
    content = [format, *(record.content.get(key) for key in CONTENT_KEYS[format])]
    digest = hashlib.blake2b(json.dumps(content, sort_keys=True).encode(), digest_size=8)
    return int.from_bytes(digest.digest(), "little")


class _Reading(NamedTuple):
    """What `load_dataset` is to read, and how."""

    files: Sequence[Path]
    tokenizer: PreTrainedTokenizerBase
    sequence_length: int
    format: str
    overlong: str
    option: str

    def samples(self, report: DataReport) -> Iterator[tuple[np.ndarray, np.ndarray, int]]:
        """Tokens, labels and content hash of each sample that is kept; all records are counted in `report`.

        Raises:
            UserError: see `load_dataset`; at the end, when there may have been samples already.
        """
        problems = ProblemList(self.option)
        for file in self.files:
            records = read_records(file, format=self.format, problems=problems)
            for format, chunk in _chunks(records):
                report.formats[str(file)] = format
                report.records += len(chunk)
                if problems.problems:
                    continue  # only to find further broken lines
                labelled = LABELLERS[format](chunk, self.tokenizer)
                for record, (ids, supervised) in zip(chunk, labelled, strict=True):
                    if _admit(ids, supervised, self.sequence_length, self.overlong, report):
                        kept = slice(self.sequence_length)
                        yield ids[kept], supervised[kept], content_hash(format, record)
        problems.raise_if_any()
        if not report.samples:
            names = ", ".join(map(str, self.files))
            raise UserError(f"{self.option}: {_why_empty(report, self.sequence_length)} ({names})")


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
