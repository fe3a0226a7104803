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
