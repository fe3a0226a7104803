"""What one block keeps from its record pass to its replay, and which pass is running."""

from __future__ import annotations

import contextlib
from collections import defaultdict, deque
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from dataclasses import dataclass, field
from enum import Enum
from typing import Any

from torch import Tensor, nn

from framework.retention.formats import Retained
from framework.retention.rows import SelectedRows
from framework.retention.visibility import KeyRanges


class AllKeysFound(Exception):  # not an error: it ends a record pass that has what it was for
    """Keys and values of all attention calls are known."""


class Phase(Enum):
    """The pass that a block is in."""

    RECORD = "record"
    REPLAY = "replay"


@dataclass
class RetainedAttention:
    """One attention call.

    Attributes:
        keys: of all tokens.
        values: of all tokens.
        mask: what the kernel was given, where it is replayed by itself (shared by blocks, not a copy).
        ranges: the keys that each query sees, where these are an interval (shared, too).
        known: of the selected queries, the output `[1, rows, heads, size]` and the log-sum-exp `[1, rows, heads]`.
    """

    keys: Retained
    values: Retained
    mask: Any = None
    ranges: KeyRanges | None = None
    known: tuple[Tensor, Tensor] | None = None

    def replace(self, change: Callable[[Tensor], Tensor]) -> None:
        """See `BlockPass.replace`."""
        self.keys.replace(change)
        self.values.replace(change)
        if self.known is not None:
            output, lse = self.known
            self.known = change(output), change(lse)


@dataclass
class RetainedExperts:
    """One call of experts.

    Attributes:
        experts: `[rows, experts of a token]`, those that a selected token was sent to.
        outputs: of each of their products in turn `[rows, experts of a token, out]`; None for one that is not kept.
    """

    experts: Tensor
    outputs: list[Tensor | None] = field(default_factory=list)

    def replace(self, change: Callable[[Tensor], Tensor]) -> None:
        """See `BlockPass.replace`."""
        self.experts = change(self.experts)
        self.outputs = [None if output is None else change(output) for output in self.outputs]


@dataclass
class BlockPass:
    """One block's way from its record pass to its replay. Calls are matched in order, per module for linears.

    `wanted` is the number of attention calls after which a record pass for their keys and values alone ends, and
    `precision` the coarsest rounding (machine epsilon) of an attention's inputs.
    """

    rows: SelectedRows
    kv_format: str = "model"
    retain_linears: bool = False
    phase: Phase = Phase.RECORD
    attention: deque[RetainedAttention] = field(default_factory=deque)
    linears: defaultdict[nn.Module, deque[Tensor | None]] = field(default_factory=lambda: defaultdict(deque))
    experts: defaultdict[nn.Module, deque[RetainedExperts | None]] = field(default_factory=lambda: defaultdict(deque))
    random: deque[Tensor] = field(default_factory=deque)
    wanted: int | None = None
    precision: float = 0.0
    states: defaultdict[nn.Module, deque[Any]] = field(default_factory=lambda: defaultdict(deque))
    in_mixer: bool = False

    def keep(self, attention: RetainedAttention) -> None:
        """Add an attention call of the record pass, before its output is computed.

        Raises:
            AllKeysFound: it was the last one that is wanted.
        """
        self.attention.append(attention)
        if len(self.attention) == self.wanted:
            raise AllKeysFound

    def replace(self, change: Callable[[Tensor], Tensor]) -> None:
        """Put in the place of each tensor that is kept for this block alone what `change` gives for it.

        They come in the same order every time.
        """
        for calls in (self.attention, *self.experts.values(), *self.states.values()):
            for call in calls:
                if call is not None:
                    call.replace(change)
        for outputs in self.linears.values():
            for place, output in enumerate(outputs):
                if output is not None:
                    outputs[place] = change(output)
        for place, drawn in enumerate(self.random):
            self.random[place] = change(drawn)

    def as_seen(self, kept: Tensor) -> Tensor:
        """Kept rows `[1, rows, …]` as modules in the replay see them: `[batch, slots, …]` in a recurrent mixer."""
        is_rows = kept.dim() > 1 and kept.shape[:2] == (1, len(self.rows.position))
        return self.rows.by_sequence(kept) if self.in_mixer and is_rows else kept

    @contextlib.contextmanager
    def by_sequence(self) -> Iterator[None]:
        """Within this context modules see rows by sequence."""
        self.in_mixer = True
        try:
            yield
        finally:
            self.in_mixer = False

    @contextlib.contextmanager
    def running(self, phase: Phase) -> Iterator[None]:
        """Make this the current pass of the calling thread."""
        self.phase = phase
        token = _CURRENT.set(self)
        try:
            yield
        finally:
            _CURRENT.reset(token)


_CURRENT: ContextVar[BlockPass | None] = ContextVar("current_block_pass", default=None)


@contextlib.contextmanager
def outside_of_passes() -> Iterator[None]:
    """Within this context the calling thread is in no pass: modules do what they ordinarily do."""
    token = _CURRENT.set(None)
    try:
        yield
    finally:
        _CURRENT.reset(token)


def current_pass() -> BlockPass | None:
    """The pass that the calling thread is in, or None outside of record passes and replays."""
    return _CURRENT.get()
