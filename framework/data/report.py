"""What became of the records of a data set."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field


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
    held_out: int = 0
    """On the other side of the split into training and evaluation data."""
    truncated: int = 0
    """Kept, but cut to the sequence length, with `overlong: "truncate"`."""
    longest: int = 0
    """Tokens of the longest record, before anything was dropped or cut."""
    tokens: int = 0
    """Tokens in the data set."""
    supervised_tokens: int = 0
    """Tokens in the data set that carry a label."""
    one_class_each: bool = False
    """Whether a label is the class of a whole sample rather than a token's."""

    @classmethod
    def total(cls, reports: Sequence[DataReport]) -> DataReport:
        """The report of several data sets as one."""
        whole = cls(one_class_each=all(report.one_class_each for report in reports))
        for report in reports:
            whole.formats |= report.formats
            whole.longest = max(whole.longest, report.longest)
            for name in cls.__dataclass_fields__.keys() - {"formats", "longest", "one_class_each"}:
                setattr(whole, name, getattr(whole, name) + getattr(report, name))
        return whole

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
        labelled = "one class each" if self.one_class_each else f"{self.labelled_share:.1%} with a label"
        measured = f", {self.tokens} tokens" if self.tokens else ""
        longest = f", longest record {self.longest}" if self.longest else ""
        return (
            f"{self.samples} samples of {self.records} records{measured}, {labelled}{longest}"
            + (f"; dropped: {dropped}" if dropped else "")
            + (f"; truncated: {self.truncated}" if self.truncated else "")
            + (f"; on the other side of the split: {self.held_out}" if self.held_out else "")
        )
