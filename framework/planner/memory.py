"""The memory ledger of a job: for every choice what its worst rank holds, and when."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from math import ceil

from framework.planner.choice import Choice
from framework.planner.law import PHASE_OF_PART, Moment, StepLaw
from framework.planner.ledger import Ledger, Term, everywhere

LawOf = Callable[[Choice], StepLaw]


class MemoryModel:
    """Gives the ledger of a choice.

    Args:
        law_of: the law of a choice's step; choices that differ in ratio, batch or ranks have the same.
        symbols: sizes of the model, from `model_symbols`.
        blocks: its depth.
        sequence_length: tokens of a row; every row is taken to be full.
        labelled_share: labelled tokens / all tokens.
        adapter_rank: None without an adapter that has one.
    """

    def __init__(
        self,
        law_of: LawOf,
        symbols: Mapping[str, float],
        *,
        blocks: int,
        sequence_length: int,
        labelled_share: float,
        adapter_rank: int | None = None,
    ) -> None:
        self._law_of, self._symbols, self._blocks = law_of, dict(symbols), blocks
        self._length, self._labelled = sequence_length, labelled_share
        if adapter_rank is not None:
            self._symbols["rank"] = adapter_rank

    def sizes(self, choice: Choice) -> dict[str, float]:
        """The sizes of all symbols."""
        rows = choice.micro_batch_size
        tokens = rows * self._length
        selected = max(choice.ratio, self._labelled) if choice.strategy == "supervised" else choice.ratio
        per_row = min(self._length, ceil(selected * self._length))
        labels = self._labelled if choice.strategy in ("none", "supervised") else self._labelled * choice.ratio
        batch = {
            "batch": rows,
            "tokens": self._length,
            "real": tokens,
            "labels": rows * ceil(labels * self._length),
            "rows": rows * per_row,
            "slots": rows * per_row,
            "share": 1 / choice.shard_ranks,
        }
        return self._symbols | batch

    def moments(self, choice: Choice) -> list[Moment]:
        """The step's parts in order, with all that the worst rank holds."""
        law, sizes = self._law_of(choice), self.sizes(choice)
        held = law.start.value(sizes)
        parts = law.moments(sizes, blocks=self._blocks, accumulation=choice.accumulation)
        return [Moment(part.part, held + part.start, held + part.peak) for part in parts]

    def __call__(self, choice: Choice) -> Ledger:
        """What the worst rank holds."""
        law, sizes = self._law_of(choice), self.sizes(choice)
        start = law.start.value(sizes)
        peaks = highest(law, sizes, self._blocks, choice.accumulation)
        terms = [everywhere("weights and optimizer state", start)]
        for phase, moment in peaks.items():
            terms.append(Term(_KEPT, round(moment.start), frozenset({phase})))
            terms.append(Term(phase, round(moment.peak - moment.start), frozenset({phase})))
        return Ledger(tuple(terms))


_KEPT = "kept for the backward pass, and gradients"


def highest(law: StepLaw, sizes: Mapping[str, float], blocks: int, accumulation: int) -> dict[str, Moment]:
    """The moment of each phase with the highest peak."""
    found: dict[str, Moment] = {}
    for moment in law.moments(sizes, blocks=blocks, accumulation=accumulation):
        phase = PHASE_OF_PART[moment.part]
        if phase not in found or found[phase].peak < moment.peak:
            found[phase] = moment
    return found
