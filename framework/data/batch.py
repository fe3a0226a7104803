"""Micro-batches: samples put into tensors, padded or packed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from framework.data.dataset import IGNORED, Dataset, Sample
from framework.errors import RunError
from framework.selection import supervised_positions

PAD_MULTIPLE = 8
"""Padded lengths are multiples of it: matrix kernels are slow on odd sizes, and fewer shapes occur."""

NO_DOCUMENT = -1
"""What `Batch.documents` holds for padding."""


@dataclass(frozen=True)
class Batch:
    """One micro-batch, tensors on the CPU."""

    inputs: dict[str, Tensor]
    """What `model(**inputs)` takes. Language models, int64 `[batch, sequence]` each: `input_ids`, `labels` (unshifted,
    -100 is ignored, in a causal model's the first token of every document is), and `attention_mask` (padding) or
    `position_ids` (packing: they restart at 0 with each document, from which Hugging Face builds the block mask when
    there is no attention mask). Classifiers: `labels` int64 `[batch]`; images come as `pixel_values` float32
    `[batch, channels, height, width]`."""
    documents: Tensor
    """int64 `[batch, sequence]`: draw index of each token's document, epoch * samples + sample index, the epoch
    being the source's own in a mixture; no draw of a run has another's. -1 is padding. An image is a
    document of as many tokens as the model's blocks see."""
    supervised: Tensor
    """bool `[batch, sequence]`: positions that the loss is read from, after the causal shift; a classifier's are the
    tokens that its head reads."""
    supervised_tokens: int
    """Labels that count: tokens to predict, or samples with a class."""
    pooled: Tensor | None = None
    """bool `[batch, sequence]`, classifiers only: the token of each sample that is selected whatever the strategy."""
    counts: bool = True
    """False for a stand-in where a rank has no batch left of an evaluation: it keeps ranks in step, and its result is
    left out."""

    @property
    def tokens(self) -> int:
        """Tokens without padding."""
        return int((self.documents != NO_DOCUMENT).sum())

    def pinned(self) -> Batch:
        """The same with inputs in page-locked memory, from which copies to a CUDA device need not be waited for."""
        return replace(self, inputs={name: tensor.pin_memory() for name, tensor in self.inputs.items()})


def padded_length(longest: int, sequence_length: int) -> int:
    """Tokens of a padded row: the longest sample's, rounded up to `PAD_MULTIPLE` within `sequence_length`."""
    return min(-(-longest // PAD_MULTIPLE) * PAD_MULTIPLE, sequence_length)


def collate_padded(dataset: Dataset, draws: Sequence[int], *, sequence_length: int, pad_token_id: int) -> Batch:
    """One sample a row, padded on the right to the longest, rounded up to a multiple of 8 within `sequence_length`.

    Args:
        dataset: Where the samples are.
        draws: Draw index of each row.
        sequence_length: The most tokens that a row may have.
        pad_token_id: What fills up.
    """
    samples = [drawn(dataset, draw) for draw in draws]
    length = padded_length(max(len(sample.input_ids) for sample in samples), sequence_length)
    rows = _Rows(len(samples), length, pad_token_id)
    attention_mask = np.zeros((len(samples), length), np.int64)
    for row, (sample, draw) in enumerate(zip(samples, draws, strict=True)):
        rows.put(row, 0, sample.input_ids, sample.labels, draw)
        attention_mask[row, : len(sample.input_ids)] = 1
    return rows.batch(attention_mask=attention_mask)


def collate_packed(
    dataset: Dataset, bins: Sequence[Sequence[int]], *, sequence_length: int, pad_token_id: int
) -> Batch:
    """One bin of samples a row, of `sequence_length` tokens; the unfilled tail is one more document, of padding.

    Args:
        dataset: Where the samples are.
        bins: For each row the draw indices of its samples, which fit into `sequence_length` together.
        sequence_length: Tokens of a row.
        pad_token_id: What fills up.
    """
    rows = _Rows(len(bins), sequence_length, pad_token_id)
    position_ids = np.zeros((len(bins), sequence_length), np.int64)
    for row, draws in enumerate(bins):
        start = 0
        for draw in draws:
            sample = drawn(dataset, draw)
            end = start + len(sample.input_ids)
            rows.put(row, start, sample.input_ids, sample.labels, draw)
            position_ids[row, start:end] = np.arange(end - start)
            start = end
        position_ids[row, start:] = np.arange(sequence_length - start)
    return rows.batch(position_ids=position_ids)


def drawn(dataset: Dataset, draw: int) -> Sample:
    """The sample of a draw.

    Raises:
        RunError: It cannot be had; the message names it.
    """
    index = int(draw % len(dataset))
    try:
        return dataset[index]
    except Exception as error:
        name, number = dataset.locate(index)
        reason = str(error) or type(error).__name__
        raise RunError(f"sample {number} (counted from 0) of {name} cannot be read: {reason}") from error


class _Rows:
    """Arrays of a batch in the making, all padding at first."""

    def __init__(self, count: int, length: int, pad_token_id: int) -> None:
        self.input_ids = np.full((count, length), pad_token_id, np.int64)
        self.labels = np.full((count, length), IGNORED, np.int64)
        self.documents = np.full((count, length), NO_DOCUMENT, np.int64)

    def put(self, row: int, start: int, input_ids: np.ndarray, labels: np.ndarray, draw: int) -> None:
        reach = slice(start, start + len(input_ids))
        self.input_ids[row, reach] = input_ids
        self.labels[row, reach] = labels
        self.documents[row, reach] = draw

    def batch(self, **further: np.ndarray) -> Batch:
        arrays = {"input_ids": self.input_ids, "labels": self.labels, **further}
        inputs = {name: torch.from_numpy(array) for name, array in arrays.items()}
        supervised = supervised_positions(inputs["labels"], causal=True)
        return Batch(
            inputs=inputs,
            documents=torch.from_numpy(self.documents),
            supervised=supervised,
            supervised_tokens=int(supervised.sum()),
        )
