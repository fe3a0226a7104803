"""The memory ledger of a job: for every choice what its worst rank holds, and when."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from math import ceil

from framework.planner.choice import Choice, labels_in_loss
from framework.planner.course import Course, EngineCourse, Span
from framework.planner.cuda import pinned_bytes
from framework.planner.held import Weights
from framework.planner.holders import Holders
from framework.planner.law import StepLaw, trace_of
from framework.planner.ledger import Ledger, Term, everywhere
from framework.planner.options import option_sizes

LawOf = Callable[[Choice], StepLaw]

KEPT = "kept for the backward pass"

WORKING = {
    "forward": "a block's forward pass",
    "loss": "head, logits and loss",
    "block backward": "a block's backward pass",
    "optimizer step": "update",
}
"""What a part of a step allocates for itself, by the phase that it is of."""


class MemoryModel:
    """Gives the ledger of a choice.

    Args:
        law_of: the law of a choice's step; choices that differ in ratio, batch or number of ranks have the same, but
            for FSDP2's on one.
        symbols: sizes of the model, from `model_symbols`.
        weights: of the model.
        holders: of the run.
        blocks: depth of the model.
        sequence_length: tokens of a row; every row is taken to be full.
        labelled_share: labelled tokens / all tokens.
        adapter_rank: None without an adapter that has one.
    """

    def __init__(
        self,
        law_of: LawOf,
        symbols: Mapping[str, float],
        weights: Weights,
        holders: Holders,
        *,
        blocks: int,
        sequence_length: int,
        labelled_share: float,
        adapter_rank: int | None = None,
    ) -> None:
        self._law_of, self._symbols, self._blocks = law_of, dict(symbols), blocks
        self._weights, self._holders = weights, holders
        self._length, self._labelled = sequence_length, labelled_share
        self._engines: dict[tuple[object, ...], tuple[EngineCourse, dict[str, int], int]] = {}
        self._courses: dict[tuple[object, ...], tuple[Course, dict[str, int], int]] = {}
        self._known_options: dict[tuple[object, ...], dict[str, float]] = {}
        if adapter_rank is not None:
            self._symbols["rank"] = adapter_rank

    def sizes(self, choice: Choice) -> dict[str, float]:
        """The sizes of all symbols."""
        rows = choice.micro_batch_size
        tokens = rows * self._length
        selected = max(choice.ratio, self._labelled) if choice.strategy == "supervised" else choice.ratio
        per_row = min(self._length, ceil(selected * self._length))
        labels = labels_in_loss(choice, self._labelled)
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

    def spans(self, choice: Choice) -> list[Span]:
        """The step's parts in order, with all that the worst rank holds."""
        course, held, _ = self._course(choice)
        sizes = self.sizes(choice) | self._options(choice)
        between = sum(held.values())
        return [Span(span.part, between + span.start, between + span.peak) for span in course.spans(sizes)]

    def __call__(self, choice: Choice) -> Ledger:
        """What the worst rank holds."""
        return self.at(choice, self.sizes(choice))

    def at(self, choice: Choice, sizes: Mapping[str, float]) -> Ledger:
        """The same for a batch of given sizes.

        Args:
            choice: of which the batch does not count.
            sizes: of all symbols.
        """
        course, held, host = self._course(choice)
        sizes = {**sizes, **self._options(choice)}
        terms = [everywhere(name, size) for name, size in held.items()]
        engine = _engine_words(choice)
        for phase, moment in course.highest(sizes).items():
            kept = KEPT if engine else f"{KEPT}, and gradients"
            for name, size in ((kept, moment.kept), (engine, moment.engine), (WORKING[phase], moment.working)):
                if size:
                    terms.append(Term(name, round(size), frozenset({phase})))
        host += sum(count * pinned_bytes(round(size)) for size, count in self._sent(choice, sizes))
        return Ledger(tuple(terms), host)

    def sent(self, choice: Choice) -> float:
        """Bytes that a micro-batch's retention sends to the host and fetches back."""
        return sum(count * size for size, count in self._sent(choice, self.sizes(choice) | self._options(choice)))

    def _sent(self, choice: Choice, sizes: Mapping[str, float]) -> list[tuple[float, int]]:
        """The tensors: bytes of each, and in how many blocks there is one."""
        law = self._law_of(choice)
        return law.sent(sizes, self._blocks) if law.sends else []

    def _options(self, choice: Choice) -> dict[str, float]:
        """Symbols of a choice's law that stand for what it keeps."""
        law = self._law_of(choice)
        key = id(law), choice.retain_linears, choice.kv_format
        if key not in self._known_options:
            self._known_options[key] = option_sizes(choice, law.symbols)
        return self._known_options[key]

    def _course(self, choice: Choice) -> tuple[Course, dict[str, int], int]:
        law = self._law_of(choice)
        key = (id(law), _engine_key(choice))
        if key not in self._courses:
            engine, held, host = self._engine(law, choice)
            course = Course(law, blocks=self._blocks, engine=engine)
            self._courses[key] = course, held, host
        return self._courses[key]

    def _engine(self, law: StepLaw, choice: Choice) -> tuple[EngineCourse, dict[str, int], int]:
        """What an engine holds in the course of a step, between steps, and on the host."""
        key = (law.marks, _engine_key(choice))
        if key not in self._engines:
            holder = self._holders.of(choice, trace_of(law, self._blocks))
            held, host = self._holders.sharded(choice) if holder is None else (holder.held(), holder.on_host())
            course = EngineCourse.of(
                law,
                blocks=self._blocks,
                passes=choice.accumulation,
                weights=self._weights,
                holder=holder,
                update=0 if choice.offload_optimizer else self._holders.largest_update(choice.shard_ranks),
            )
            self._engines[key] = course, held, host
        return self._engines[key]


def _engine_key(choice: Choice) -> tuple[object, ...]:
    """What the course of a step depends on beside its law."""
    offload = choice.offload_optimizer, choice.offload_parameters
    return choice.engine, choice.zero_stage, choice.shard_ranks, min(choice.accumulation, 2), offload


def _engine_words(choice: Choice) -> str:
    """What an engine holds in the course of a step; empty where the law does not tell it apart."""
    if choice.engine == "fsdp":
        return ""
    return {1: "gradients and their bucket", 2: "gradients and their buckets", 3: "gathered weights"}.get(
        choice.zero_stage or 0, "gradients"
    )
