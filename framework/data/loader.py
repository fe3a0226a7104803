"""Batches for training, resumable at every step, and for evaluation."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np

from framework.data.batch import Batch, collate_packed, collate_padded
from framework.data.dataset import Dataset
from framework.data.mixture import mixture_order
from framework.data.order import epoch_order, pack
from framework.data.prefetch import ordered_map

Collate = Callable[[Dataset, Sequence], Batch]
Position = tuple[int, int]  # epoch, sequences of it that were drawn


class Loader:
    """Draws accumulation windows of `global_batch_size` sequences, without end.

    A sequence is a sample, or with packing a bin of samples. What is drawn is a pure function of the data set, the
    seed and the state, two numbers: the epoch, and the sequences of it that were drawn already. The split into
    micro-batches changes neither the samples of a window nor their draw indices. When an epoch ends inside a window,
    the window goes on with the next one; no sample is left out.

    An epoch draws every sample once. That of a mixture, a data set with shares, draws as many samples as there are,
    each source's share of them, see `framework.data.mixture`.

    Batches are made ahead of their use by threads, at least a whole window ahead; the state is of the windows that
    were taken, not of those made ahead.
    """

    def __init__(
        self,
        dataset: Dataset,
        *,
        sequence_length: int | None,
        packing: bool,
        global_batch_size: int,
        micro_batch_size: int,
        seed: int,
        pad_token_id: int | None,
        workers: int = 0,
        pin_memory: bool = False,
        collate: Collate | None = None,
        rank: int = 0,
        ranks: int = 1,
    ) -> None:
        """Start at the first sequence of epoch 0.

        Args:
            dataset: Samples of at most `sequence_length` tokens.
            sequence_length: Tokens of a row, at most (padding) or exactly (packing).
            packing: Whether samples share rows.
            global_batch_size: Sequences of a window; a multiple of `micro_batch_size`.
            micro_batch_size: Sequences of a batch.
            seed: Of the order.
            pad_token_id: What fills rows up.
            workers: Threads that make batches ahead; 0: each is made when it is asked for.
            pin_memory: Whether batches are page-locked, see `Batch.pinned`.
            collate: What makes a batch of the data set and draw indices; by default language modelling's, to which
                alone packing, `sequence_length` and `pad_token_id` matter.
            rank: Whose micro-batches are made.
            ranks: How many share a window: each gets every so manieth micro-batch of it, of similar lengths at a time.

        Raises:
            ValueError: `micro_batch_size` times `ranks` does not divide `global_batch_size`.
        """
        if global_batch_size % (micro_batch_size * ranks):
            raise ValueError(
                f"training.micro_batch_size = {micro_batch_size} on {ranks} ranks does not divide "
                f"training.global_batch_size = {global_batch_size}"
            )
        self.dataset = dataset
        self.sequence_length = sequence_length
        self.packing = packing
        self.global_batch_size = global_batch_size
        self.micro_batch_size = micro_batch_size
        self.seed = seed
        self.workers = workers
        self.rank, self.ranks = rank, ranks
        self._lengths = dataset.lengths
        collate = collate or language_collate(sequence_length, pad_token_id, packing=packing)
        self._collate = _collater(dataset, collate, pin_memory=pin_memory)
        self._sequences_of = (-1, [])  # an epoch and its sequences
        self._position: Position = (0, 0)
        self._batches: Generator[tuple[Batch, Position]] | None = None

    def sequences(self, epoch: int) -> Sequence[Any]:
        """The sequences of an epoch in the order of drawing: draw indices or, with packing, arrays of them."""
        known, sequences = self._sequences_of
        if known != epoch:
            sequences = self._draws(epoch)
            if self.packing:
                lengths = self._lengths[sequences % len(self.dataset)]
                sequences = pack(lengths, self.sequence_length, sequences)
            self._sequences_of = (epoch, sequences)
        return sequences

    @property
    def samples_per_sequence(self) -> float:
        """Samples that a sequence holds, on average over the current epoch."""
        return len(self.dataset) / len(self.sequences(self._position[0]))

    def _draws(self, epoch: int) -> np.ndarray:
        if self.dataset.shares is None:
            samples = len(self.dataset)
            return epoch * samples + epoch_order(samples, seed=self.seed, epoch=epoch)
        sizes = [len(part) for part in self.dataset.parts]
        return mixture_order(sizes, self.dataset.shares, seed=self.seed, epoch=epoch)

    def next_window(self) -> list[Batch]:
        """This rank's micro-batches of one optimiser step.

        Padded rows are sorted by length within the window, longest first: what a window holds stays the same, and
        less of it is padding.

        Raises:
            RunError: A sample cannot be read; the message names it.
        """
        count = self.global_batch_size // (self.micro_batch_size * self.ranks)
        if self._batches is None:
            ahead = max(count, 2 * self.workers)
            rows = self._micro_batches(*self._position)
            self._batches = ordered_map(self._make, rows, workers=self.workers, ahead=ahead)
        try:
            window = [next(self._batches) for _ in range(count)]
        except BaseException:
            self.close()  # so that another call tries the same window again
            raise
        self._position = window[-1][1]
        return [batch for batch, _ in window]

    def _micro_batches(self, epoch: int, index: int) -> Iterator[tuple[Sequence, Position]]:
        """The rows of each micro-batch of this rank from a position on, and the position behind its window."""
        while True:
            window: list = []
            while len(window) < self.global_batch_size:
                sequences = self.sequences(epoch)
                drawn = sequences[index : index + self.global_batch_size - len(window)]
                window.extend(drawn)
                index += len(drawn)
                if index == len(sequences):
                    epoch, index = epoch + 1, 0
            if not self.packing:
                window.sort(key=lambda draw: -self._lengths[draw % len(self.dataset)])
            for start in range(self.rank * self.micro_batch_size, len(window), self.micro_batch_size * self.ranks):
                yield window[start : start + self.micro_batch_size], (epoch, index)

    def _make(self, item: tuple[Sequence, Position]) -> tuple[Batch, Position]:
        rows, behind = item
        return self._collate(rows), behind

    def state_dict(self) -> dict[str, int]:
        """`epoch`, and `index`: the sequences of it that were taken already."""
        epoch, index = self._position
        return {"epoch": epoch, "index": index}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Go on where `state_dict` was taken; costs the ordering of one epoch, whatever the index.

        Raises:
            ValueError: The epoch has fewer sequences than `index`: the data set is another one.
        """
        epoch, index = state["epoch"], state["index"]
        sequences = self.sequences(epoch)
        if not 0 <= index < len(sequences):
            raise ValueError(
                f"data.train: the saved position is sequence {index} of epoch {epoch}, but an epoch "
                f"has {len(sequences)} sequences now: the data or data.* has changed since the checkpoint"
            )
        self.close()
        self._position = (epoch, index)

    def close(self) -> None:
        """Drop what was made ahead and end the threads; the next window starts them again."""
        if self._batches is not None:
            self._batches.close()
            self._batches = None


def evaluation_batches(
    dataset: Dataset,
    *,
    sequence_length: int | None,
    micro_batch_size: int,
    pad_token_id: int | None,
    packing: bool = False,
    max_samples: int | None = None,
    workers: int = 0,
    pin_memory: bool = False,
    collate: Collate | None = None,
    rank: int = 0,
    ranks: int = 1,
) -> Iterator[Batch]:
    """This rank's batches of the first `max_samples` samples, each once; the last batch of all may be smaller.

    Every rank gets as many; where one has none left, a stand-in that does not count (`Batch.counts`). Padded samples
    come sorted by length, longest first: little padding, and a lack of memory shows at once. Draw indices are sample
    indices.

    Args:
        dataset: Samples of at most `sequence_length` tokens.
        sequence_length: Tokens of a row, at most (padding) or exactly (packing).
        micro_batch_size: Sequences of a batch.
        pad_token_id: What fills rows up.
        packing: Whether samples share rows.
        max_samples: Samples to take; all by default.
        workers: Threads that make batches ahead; 0: each is made when it is asked for.
        pin_memory: Whether batches are page-locked, see `Batch.pinned`.
        collate: As for `Loader`.
        rank: Whose batches are made.
        ranks: How many share them, in turn.
    """
    lengths = dataset.lengths[:max_samples]
    sequences: Sequence = pack(lengths, sequence_length) if packing else np.argsort(-lengths, kind="stable")
    collate = collate or language_collate(sequence_length, pad_token_id, packing=packing)
    collated = _collater(dataset, collate, pin_memory=pin_memory)
    step = micro_batch_size * ranks

    def make(start: int) -> Batch:
        rows = sequences[start : start + micro_batch_size]
        return collated(rows) if len(rows) else replace(collated(sequences[:1]), counts=False)

    starts = (first + rank * micro_batch_size for first in range(0, len(sequences), step))
    return ordered_map(make, starts, workers=workers, ahead=2 * workers)


def language_collate(sequence_length: int, pad_token_id: int, *, packing: bool = False) -> Collate:
    """What makes a language model's batch of a data set and rows: draw indices or, with packing, sequences of them."""
    collate = collate_packed if packing else collate_padded
    return partial(collate, sequence_length=sequence_length, pad_token_id=pad_token_id)


def _collater(dataset: Dataset, collate: Collate, *, pin_memory: bool) -> Callable[[Sequence], Batch]:
    """The function that makes a batch of rows."""
    if pin_memory:
        return lambda rows: collate(dataset, rows).pinned()
    return partial(collate, dataset)
