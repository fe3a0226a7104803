"""Data sets: tokenised samples of one source, of a part of it, or of several."""

from __future__ import annotations

import hashlib
from abc import abstractmethod
from collections.abc import Iterable, Sequence
from dataclasses import replace
from functools import cached_property
from typing import NamedTuple

import numpy as np

from framework.data.report import DataReport

IGNORED = -100
"""The label of a token that is not to be learnt (Hugging Face's convention)."""


class Sample(NamedTuple):
    """One tokenised document."""

    input_ids: np.ndarray
    """int32 `[sequence]`."""
    labels: np.ndarray
    """int32 `[sequence]`, unshifted: a token's own id where it is to be learnt, else -100; the first is always -100."""


def sample_digest(input_ids: np.ndarray, supervised: np.ndarray) -> int:
    """A hash of the tokens and labels of a sample, of 64 bits."""
    digest = hashlib.blake2b(np.ascontiguousarray(input_ids).tobytes(), digest_size=8)
    digest.update(np.ascontiguousarray(supervised).tobytes())
    return int.from_bytes(digest.digest(), "little")


class Dataset(Sequence[Sample]):
    """Samples that a loader draws from: of one source, a part of one, or several together."""

    report: DataReport
    """What became of the records."""
    name: str
    """What messages call the data set, such as its path."""

    @property
    @abstractmethod
    def lengths(self) -> np.ndarray:
        """Tokens of each sample, int64 `[samples]`."""

    @property
    @abstractmethod
    def digests(self) -> np.ndarray:
        """A hash of the tokens and labels of each sample, uint64 `[samples]`."""

    @property
    def contents(self) -> np.ndarray:
        """A hash of what each sample was made from, uint64 `[samples]`: equal for equal records."""
        return self.digests

    @property
    def supervised_lengths(self) -> np.ndarray:
        """Tokens with a label of each sample, int64 `[samples]`."""
        return np.array([(sample.labels != IGNORED).sum() for sample in self], np.int64)

    @property
    def classes(self) -> np.ndarray:
        """Class number of each sample, int64 `[samples]`; of classified samples only."""
        return np.array([sample.label for sample in self], np.int64)

    @property
    def parts(self) -> Sequence[Dataset]:
        """The data sets of its sources, whose samples follow each other."""
        return [self]

    @property
    def shares(self) -> np.ndarray | None:
        """Shares in which the parts are drawn, float64 `[parts]`; None if every sample is drawn once an epoch."""
        return None

    @cached_property
    def fingerprint(self) -> str:
        """A hash of the samples in their order and of the shares, whatever the files are called."""
        digest = hashlib.sha256(self.digests.tobytes())
        if self.shares is not None:
            digest.update(np.array([len(part) for part in self.parts]).tobytes() + self.shares.tobytes())
        return digest.hexdigest()

    def locate(self, index: int) -> tuple[str, int]:
        """Name of the source that the sample at `index` is of, and its number there, counted from 0."""
        return self.name, index

    def named(self, indices: Iterable[int], *, limit: int = 16) -> str:
        """Samples as a message names them: "2, 5 of a.jsonl; 0 of b.jsonl", up to `limit` of them."""
        listed: dict[str, list[str]] = {}
        every = sorted(set(map(int, indices)))
        for index in every[:limit]:
            name, number = self.locate(index)
            listed.setdefault(name, []).append(str(number))
        text = "; ".join(f"{', '.join(numbers)} of {name}" for name, numbers in listed.items())
        return text + ("; …" if len(every) > limit else "")


class TokenizedDataset(Dataset):
    """Tokenised samples, compact: five bytes a token in memory or, mapped from a token cache, on disk."""

    def __init__(
        self,
        input_ids: np.ndarray,
        supervised: np.ndarray,
        lengths: np.ndarray,
        report: DataReport,
        *,
        name: str = "the data set",
        digests: np.ndarray | None = None,
        contents: np.ndarray | None = None,
    ) -> None:
        """Take the tokens of all samples, one after the other.

        Args:
            input_ids: int32 `[tokens]`.
            supervised: bool `[tokens]`, tokens with a label; the first of each sample is never one.
            lengths: Tokens of each sample, `[samples]`.
            report: What was read, dropped and truncated.
            name: What messages call the data set.
            digests: `sample_digest` of each sample, uint64 `[samples]`; computed when they are needed by default.
            contents: A hash of the text that each sample was made from, uint64 `[samples]`; the digests by default.
        """
        self.input_ids = input_ids
        self.supervised = supervised
        self.offsets = np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)])
        self.report = report
        self.name = name
        self._digests = digests
        self._contents = contents

    @property
    def lengths(self) -> np.ndarray:
        """Tokens of each sample, int64 `[samples]`."""
        return np.diff(self.offsets)

    @property
    def digests(self) -> np.ndarray:
        """`sample_digest` of each sample, uint64 `[samples]`."""
        if self._digests is None:
            reaches = map(slice, self.offsets[:-1], self.offsets[1:])
            digests = (sample_digest(self.input_ids[reach], self.supervised[reach]) for reach in reaches)
            self._digests = np.fromiter(digests, np.uint64, len(self))
        return self._digests

    @property
    def supervised_lengths(self) -> np.ndarray:
        """Tokens with a label of each sample, int64 `[samples]`."""
        return np.add.reduceat(self.supervised, self.offsets[:-1], dtype=np.int64)

    @property
    def contents(self) -> np.ndarray:
        """A hash of what each sample was made from, uint64 `[samples]`: equal for equal records."""
        return self.digests if self._contents is None else self._contents

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


class JoinedDataset(Dataset):
    """Data sets of several sources, one after the other; with shares a mixture of them."""

    def __init__(self, parts: Sequence[Dataset], *, shares: np.ndarray | None = None) -> None:
        """Join `parts`; `shares`, float64 `[parts]`, say how often each is drawn from, see `Dataset.shares`."""
        self._parts = parts
        self._shares = shares
        self._firsts = np.cumsum([0, *map(len, parts)])
        self.report = DataReport.total([part.report for part in parts])
        self.name = ", ".join(part.name for part in parts)

    @property
    def parts(self) -> Sequence[Dataset]:
        """The data sets that were joined."""
        return self._parts

    @property
    def shares(self) -> np.ndarray | None:
        """Shares in which the parts are drawn, float64 `[parts]`; None if every sample is drawn once an epoch."""
        return self._shares

    @cached_property
    def lengths(self) -> np.ndarray:
        """Tokens of each sample, int64 `[samples]`."""
        return np.concatenate([part.lengths for part in self._parts])

    @property
    def digests(self) -> np.ndarray:
        """A hash of the tokens and labels of each sample, uint64 `[samples]`."""
        return np.concatenate([part.digests for part in self._parts])

    @property
    def classes(self) -> np.ndarray:
        """Class number of each sample, int64 `[samples]`; of classified samples only."""
        return np.concatenate([part.classes for part in self._parts])

    def __len__(self) -> int:
        """Samples of all parts."""
        return int(self._firsts[-1])

    def __getitem__(self, index: int) -> Sample:
        """The sample at `index`, counted from 0 over all parts."""
        part, own = self._part_of(index)
        return part[own]

    def locate(self, index: int) -> tuple[str, int]:
        """Name of the source that the sample at `index` is of, and its number there, counted from 0."""
        part, own = self._part_of(index)
        return part.locate(own)

    def _part_of(self, index: int) -> tuple[Dataset, int]:
        if not 0 <= index < len(self):
            raise IndexError(index)
        number = int(np.searchsorted(self._firsts, index, side="right")) - 1
        return self._parts[number], index - int(self._firsts[number])


class Subset(Dataset):
    """Some samples of a data set, in its order."""

    def __init__(self, whole: Dataset, indices: np.ndarray) -> None:
        """Take the samples of `whole` at `indices`, int64 `[samples]`, ascending.

        What the report says of dropped and truncated records is of the whole.
        """
        self._whole = whole
        self._indices = indices
        self.name = whole.name
        self.report = replace(
            whole.report,
            samples=len(indices),
            held_out=len(whole) - len(indices),
            tokens=int(whole.lengths[indices].sum()),
            supervised_tokens=int(whole.supervised_lengths[indices].sum()),
        )

    @property
    def lengths(self) -> np.ndarray:
        """Tokens of each sample, int64 `[samples]`."""
        return self._whole.lengths[self._indices]

    @property
    def digests(self) -> np.ndarray:
        """A hash of the tokens and labels of each sample, uint64 `[samples]`."""
        return self._whole.digests[self._indices]

    @property
    def classes(self) -> np.ndarray:
        """Class number of each sample, int64 `[samples]`; of classified samples only."""
        return self._whole.classes[self._indices]

    def __len__(self) -> int:
        """Samples."""
        return len(self._indices)

    def __getitem__(self, index: int) -> Sample:
        """The sample at `index`, counted from 0 in the subset."""
        if not 0 <= index < len(self):
            raise IndexError(index)
        return self._whole[self._indices[index]]

    def locate(self, index: int) -> tuple[str, int]:
        """Name of the source that the sample at `index` is of, and its number there, held out ones counted too."""
        return self._whole.locate(int(self._indices[index]))
