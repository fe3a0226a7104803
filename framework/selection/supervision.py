"""Which positions carry a label, and which document a token belongs to."""

from __future__ import annotations

import torch
from torch import Tensor

IGNORED = -100  # torch.nn.functional.cross_entropy's default ignore_index, Hugging Face's convention


def supervised_positions(labels: Tensor, causal: bool) -> Tensor:
    """Positions whose prediction enters the loss.

    Args:
        labels: int64 `[batch, sequence]`, `-100` where there is none, unshifted (Hugging Face's convention).
        causal: position i predicts label i + 1; otherwise its own.

    Returns:
        bool `[batch, sequence]`.
    """
    labelled = labels != IGNORED
    if not causal:
        return labelled
    return torch.nn.functional.pad(labelled[:, 1:], (0, 1), value=False)


def pooled_positions(
    pooling: str, shape: tuple[int, int], input_ids: Tensor | None = None, pad_token_id: int | None = None
) -> Tensor:
    """The token of each sequence that a classifier pools, and that is selected whatever the strategy.

    The last token is found as transformers' `GenericForSequenceClassification` does, by its id: a text's own last token
    is passed over if it equals the padding token, in training as in evaluation.

    Args:
        pooling: `last`, or `first` and `mean`, for which it is the first.
        shape: Sequences, and tokens of each.
        input_ids: int64 `[batch, sequence]`; None where a model has no tokens.
        pad_token_id: The model's; without it the last token is the last position's.

    Returns:
        bool `[batch, sequence]` on the device of `input_ids`.
    """
    batch, sequence = shape
    device = None if input_ids is None else input_ids.device
    place = torch.zeros(batch, dtype=torch.int64, device=device)
    if pooling == "last":
        place += sequence - 1
        if input_ids is not None and pad_token_id is not None:
            place = (torch.arange(sequence, device=device) * (input_ids != pad_token_id)).argmax(-1)
    return torch.nn.functional.one_hot(place, sequence).bool()


def documents_of(
    tokens: Tensor, attention_mask: Tensor | None, position_ids: Tensor | None, first_index: int
) -> Tensor:
    """Number the documents of a batch that comes without sample indices.

    A document starts at every row, and within a row wherever the position ids do not continue (packing).

    Args:
        tokens: any tensor `[batch, sequence, …]`, for the shape and the device.
        attention_mask: `[batch, sequence]`, 0 at padding, or None.
        position_ids: int64 `[batch or 1, sequence]`, or None.
        first_index: number of the first document.

    Returns:
        int64 `[batch, sequence]`, -1 at padding.
    """
    batch, sequence = tokens.shape[:2]
    starts = torch.zeros(batch, sequence, dtype=torch.int64, device=tokens.device)
    starts[:, 0] = 1
    if position_ids is not None and attention_mask is None:
        starts[:, 1:] = (position_ids.diff(dim=1) != 1).expand(batch, -1)
    documents = first_index - 1 + starts.flatten().cumsum(0).view(batch, sequence)
    if attention_mask is not None:
        documents = documents.masked_fill(attention_mask == 0, -1)
    return documents
