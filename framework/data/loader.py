"""Batches for training, resumable at every step, and for evaluation."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from framework.data.batch import Batch, collate_packed, collate_padded
from framework.data.dataset import TokenizedDataset
from framework.data.order import epoch_order, pack


class Loader:
    """Draws accumulation windows of `global_batch_size` sequences, without end.

    A sequence is a sample, or with packing a bin of samples. What is drawn is a pure function of the data set, the
    seed and the state, two numbers: the epoch, and the sequences of it that were drawn already. The split into
    micro-batches changes neither the samples of a window nor their draw indices. When an epoch ends inside a window,
    the window goes on with the next one; no sample is left out.
    """

    def __init__(
        self,
        dataset: TokenizedDataset,
        *,
        sequence_length: int,
        packing: bool,
        global_batch_size: int,
        micro_batch_size: int,
        seed: int,
        pad_token_id: int,
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

        Raises:
            ValueError: `micro_batch_size` does not divide `global_batch_size`.
        """
        if global_batch_size % micro_batch_size:
            raise ValueError(
                f"training.micro_batch_size = {micro_batch_size} does not divide "
                f"training.global_batch_size = {global_batch_size}"
            )
        self.dataset = dataset
        self.sequence_length = sequence_length
        self.packing = packing
        self.global_batch_size = global_batch_size
        self.micro_batch_size = micro_batch_size
        self.seed = seed
        self.pad_token_id = pad_token_id
        self._lengths = dataset.lengths
        self._begin_epoch(0)
        self._index = 0

    def sequences(self, epoch: int) -> np.ndarray | list[np.ndarray]:
        """The sequences of an epoch in the order of drawing: draw indices or, with packing, arrays of them."""
        order = epoch_order(len(self.dataset), seed=self.seed, epoch=epoch)
        draws = epoch * len(self.dataset) + order
        if self.packing:
            return [draws[places] for places in pack(self._lengths[order], self.sequence_length)]
        return draws

    def _begin_epoch(self, epoch: int) -> None:
        self._epoch = epoch
        self._sequences = self.sequences(epoch)

    def next_window(self) -> list[Batch]:
        """The micro-batches of one optimiser step.

        Padded rows are sorted by length within the window, longest first: what a window holds stays the same, and
        less of it is padding.
        """
        window: list = []
        while len(window) < self.global_batch_size:
            drawn = self._sequences[self._index : self._index + self.global_batch_size - len(window)]
            window.extend(drawn)
            self._index += len(drawn)
            if self._index == len(self._sequences):
                self._begin_epoch(self._epoch + 1)
                self._index = 0
        if not self.packing:
            window.sort(key=lambda draw: -self._lengths[draw % len(self.dataset)])
        return list(self._collate(window))

    def _collate(self, window: Sequence) -> Iterator[Batch]:
        collate = collate_packed if self.packing else collate_padded
        for start in range(0, len(window), self.micro_batch_size):
            yield collate(
                self.dataset,
                window[start : start + self.micro_batch_size],
                sequence_length=self.sequence_length,
                pad_token_id=self.pad_token_id,
            )

    def state_dict(self) -> dict[str, int]:
        """`epoch`, and `index`: the sequences of it that were drawn already."""
        return {"epoch": self._epoch, "index": self._index}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Go on where `state_dict` was taken; costs the ordering of one epoch, whatever the index.

        Raises:
            ValueError: The epoch has fewer sequences than `index`: the data set is another one.
        """
        self._begin_epoch(state["epoch"])
        if not 0 <= state["index"] < len(self._sequences):
            raise ValueError(
                f"data.train: the saved position is sequence {state['index']} of epoch {state['epoch']}, but an epoch "
                f"has {len(self._sequences)} sequences now: the data or data.* has changed since the checkpoint"
            )
        self._index = state["index"]


def evaluation_batches(
    dataset: TokenizedDataset,
    *,
    sequence_length: int,
    micro_batch_size: int,
    pad_token_id: int,
    packing: bool = False,
    max_samples: int | None = None,
) -> Iterator[Batch]:
    """Batches of the first `max_samples` samples, each once; the last batch may be smaller.

    Padded samples come sorted by length, longest first: little padding, and a lack of memory shows at once. Draw
    indices are sample indices.

    Args:
        dataset: Samples of at most `sequence_length` tokens.
        sequence_length: Tokens of a row, at most (padding) or exactly (packing).
        micro_batch_size: Sequences of a batch.
        pad_token_id: What fills rows up.
        packing: Whether samples share rows.
        max_samples: Samples to take; all by default.
    """
    lengths = dataset.lengths[:max_samples]
    sequences: Sequence = pack(lengths, sequence_length) if packing else np.argsort(-lengths, kind="stable")
    collate = collate_packed if packing else collate_padded
    for start in range(0, len(sequences), micro_batch_size):
        rows = sequences[start : start + micro_batch_size]
        yield collate(dataset, rows, sequence_length=sequence_length, pad_token_id=pad_token_id)
