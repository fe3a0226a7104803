"""Class labels: numbers or names in the data, and the names of a model's classes."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import numpy as np

from framework.errors import UserError

LISTED_NAMES = 8


class ClassLabels:
    """The labels of a run's data as they are read: each a class number, or each a class name.

    One object is shared by all sources of a data set, so that their classes are numbered together; while they are read,
    labels have provisional codes, and `settle` gives each code its class number.

    Attributes:
        known: names of the classes if they are given beforehand, in the order of their numbers.
        count: number of the classes if that is all that is known of them.
    """

    def __init__(self, known: Sequence[str] | None = None, count: int | None = None) -> None:
        self.known = None if known is None else tuple(known)
        self.count = count
        self._codes: dict[int | str, int] = {}
        self._numbers: np.ndarray | None = None

    def problem(self, label: int | str) -> str | None:
        """What is wrong with a label, or None."""
        first = next(iter(self._codes), label)
        if type(label) is not type(first):
            kind = "numbers" if isinstance(first, int) else "names"
            return f"label {label!r}: the labels before it are {kind}; keep to one"
        if isinstance(label, int):
            if label < 0:
                return f"label {label}: classes are counted from 0"
            if self.known is not None and label >= len(self.known):
                return f"label {label}: there are {len(self.known)} classes, 0 to {len(self.known) - 1}"
        elif self.known is not None and label not in self.known:
            return f"unknown label {label!r}; the classes are {listed(self.known)}"
        return None

    def code(self, label: int | str) -> int:
        """The provisional code of a label in which `problem` found nothing."""
        return self._codes.setdefault(label, len(self._codes))

    def settle(self, option: str) -> list[str]:
        """Number the classes when all data is read, and return their names in the order of the numbers.

        Those that are known, else those found: names sorted, numbers as they are.

        Args:
            option: the config key that the data comes from, for error messages.

        Raises:
            UserError: fewer than two classes, another count than the known one, or numbers with gaps.
        """
        names = self._names(option)
        position = {name: number for number, name in enumerate(names)}
        numbers = [label if isinstance(label, int) else position[label] for label in self._codes]
        self._numbers = np.array(numbers, np.int64)
        return names

    def numbers(self, codes: np.ndarray) -> np.ndarray:
        """Class numbers of provisional codes, int64 `[samples]`, once the classes are settled."""
        assert self._numbers is not None, "the classes are not settled"
        return self._numbers[codes]

    def _names(self, option: str) -> list[str]:
        if self.known is not None:
            return list(self.known)
        found = sorted(self._codes)
        by_number = isinstance(found[0], int)
        if by_number and self.count is not None and found[-1] < self.count:
            return generic_names(self.count)
        if len(found) < 2:
            raise UserError(
                f"{option}: all labels are {found[0]!r}: there is nothing to tell apart; with data.label_names a data "
                "set may lack some classes"
            )
        if self.count is not None and len(found) != self.count:
            raise UserError(
                f"{option}: has {len(found)} classes ({listed(found)}), but the model's config says {self.count}: "
                "leave num_labels and id2label out of model.from_config, take a model.path without a classifier, or "
                f"give data.label_names, {self.count} of them, if the data lacks some"
            )
        if not by_number:
            return found
        if found != list(range(len(found))):
            raise UserError(
                f"{option}: the labels are {listed(found)}; classes are numbered from 0 without gaps: number them "
                "anew, or give data.label_names if the data lacks some"
            )
        return generic_names(len(found))


def generic_names(count: int) -> list[str]:
    """The names that transformers gives to classes without a name."""
    return [f"LABEL_{number}" for number in range(count)]


def listed(names: Sequence[object]) -> str:
    """The first names of a list, for a message."""
    shown = ", ".join(map(str, names[:LISTED_NAMES]))
    return f"{shown} and {len(names) - LISTED_NAMES} more" if len(names) > LISTED_NAMES else shown


def counted(classes: np.ndarray, names: Sequence[str]) -> str:
    """Samples of each class on one line, such as `no: 3, yes: 5`, from the class numbers, int64 `[samples]`."""
    samples = np.bincount(classes, minlength=len(names))
    return listed([f"{name}: {count}" for name, count in zip(names, samples, strict=True)])


def digest(*pieces: bytes) -> int:
    """A hash of a sample, of 64 bits."""
    hashed = hashlib.blake2b(digest_size=8)
    for piece in pieces:
        hashed.update(len(piece).to_bytes(8, "little") + piece)
    return int.from_bytes(hashed.digest(), "little")
