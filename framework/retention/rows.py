"""Rows of a tensor with a token dimension, at the selected positions."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from framework.selection import Selection


class SelectedRows:
    """Gathers and scatters the selected rows of one batch.

    Args:
        selection: the selection, on the device of the hidden states.
        tokens: length of the sequences.
    """

    def __init__(self, selection: Selection, tokens: int) -> None:
        positions = selection.positions
        self.positions = positions
        self.valid = selection.valid if selection.ragged else None
        self.batch, self.selected = positions.shape
        self.tokens = tokens
        self._batch_index = torch.arange(self.batch, device=positions.device)[:, None]

    def take(self, tensor: Tensor) -> Tensor:
        """`[batch, tokens, …]` to `[batch, selected, …]`, a copy."""
        return tensor[self._batch_index, self.positions]

    def put(self, tensor: Tensor, rows: Tensor) -> None:
        """Write `rows [batch, selected, …]` into `tensor [batch, tokens, …]` in place."""
        tensor[self._batch_index, self.positions] = rows

    def take_valid(self, tensor: Tensor) -> Tensor:
        """Like `take`, with zeros in the rows of fillers."""
        rows = self.take(tensor)
        if self.valid is not None:
            rows.masked_fill_(~self.valid.view(*self.valid.shape, *[1] * (rows.dim() - 2)), 0)
        return rows

    def take_argument(self, value: Any) -> Any:
        """Reduce a block's argument to the selected rows, if it has a token dimension.

        What has one: `[batch or 1, tokens]` and `[batch or 1, tokens, …]` (position ids, rotary embeddings as a pair,
        per-layer inputs). Attention masks `[batch or 1, heads or 1, queries, keys]` are the attention function's
        business and pass unchanged, as does everything else.
        """
        if isinstance(value, tuple | list):
            return type(value)(self.take_argument(v) for v in value)
        if not torch.is_tensor(value) or value.dim() < 2:
            return value
        is_mask = value.dim() == 4 and value.shape[-1] == self.tokens
        if is_mask or value.shape[1] != self.tokens or value.shape[0] not in (1, self.batch):
            return value
        return self.take(value.expand(self.batch, *value.shape[1:]))


class PutRows(torch.autograd.Function):
    """Write recomputed rows into a retained tensor; gradient flows to the rows of valid selections only.

    The retained tensor `[batch, heads, tokens, size]` is overwritten in place and returned: it has no other user.
    """

    @staticmethod
    def forward(ctx: Any, retained: list[Tensor], selected: SelectedRows, rows: Tensor) -> Tensor:
        """`rows [batch, heads, selected, size]` into the only element of `retained`."""
        ctx.selected = selected
        (tensor,) = retained
        selected.put(tensor.transpose(1, 2), rows.transpose(1, 2).to(tensor.dtype))
        return tensor

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[None, None, Tensor]:
        """The gradient's rows at the selection."""
        return None, None, ctx.selected.take_valid(grad.transpose(1, 2)).transpose(1, 2)


class KeepGradientRows(torch.autograd.Function):
    """Identity whose backward zeroes the gradient of unselected rows: the detached rows of a block that falls back."""

    @staticmethod
    def forward(ctx: Any, selected: SelectedRows, tensor: Tensor) -> Tensor:
        """`tensor [batch, tokens, width]`, unchanged."""
        ctx.selected = selected
        return tensor.view_as(tensor)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[None, Tensor]:
        """The gradient with zeros outside the selection."""
        kept = torch.zeros_like(grad)
        ctx.selected.put(kept, ctx.selected.take_valid(grad))
        return None, kept
