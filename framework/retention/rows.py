"""Rows of a tensor with a token dimension, at the selected positions."""

from __future__ import annotations

from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from framework.retention.visibility import KeyRanges
from framework.selection import Selection

if TYPE_CHECKING:
    from framework.retention.formats import Retained


class SelectedRows:
    """Gathers and scatters the selected rows of one batch.

    Rows of all sequences stand one after the other, as one sequence `[1, rows, …]`: a block works row by row except in
    its attention, and where sequences have different numbers of selected tokens no row is spent on fillers. Attention
    alone wants its queries by sequence, `[batch, slots, …]` with `slots` the largest number of selected tokens.

    Args:
        selection: the selection; on the CPU it costs no synchronisation.
        tokens: length of the sequences.
        device: of the hidden states.
        correction: from 0, none, to 1, which makes gradients of independent draws unbiased.
        slots: the least number of slots of a sequence.

    Attributes:
        counts: selected tokens of each sequence.
        dense: whether all sequences have equally many.
        host_positions: int64 `[batch, slots]` on the CPU, the selected positions of each sequence, then -1.
        positions: the same, int32 on the device.
        correction: float32 `[batch, slots]`, by which the gradient is multiplied that a token's key and value get from
            the queries of others; None for one.
    """

    def __init__(
        self,
        selection: Selection,
        tokens: int,
        device: torch.device,
        *,
        correction: float = 0.0,
        slots: int = 1,
    ) -> None:
        positions, valid = selection.positions.cpu(), selection.valid.cpu()
        self.batch, self.tokens = positions.shape[0], tokens
        self.live = not selection.ragged or bool(valid.any())
        if not self.live:
            # One row goes through the blocks even if nothing is selected, since every rank calls every module.
            valid = torch.zeros_like(valid)
            valid[0, 0] = True
        self.counts: list[int] = valid.sum(1).tolist()
        self.slots = max(slots, *self.counts)
        self.dense = min(self.counts) == self.slots
        sequence, place = valid.nonzero(as_tuple=True)
        position = positions[sequence, place]
        slot = valid.cumsum(1)[sequence, place] - 1
        self.host_positions = torch.full((self.batch, self.slots), -1, dtype=torch.int64)
        self.host_positions[sequence, slot] = position
        self.sequence, self.position, self.slot, self.token = (
            index.to(device, non_blocking=True)
            for index in (sequence, position, sequence * self.slots + slot, sequence * tokens + position)
        )
        self.positions = self.host_positions.to(device, torch.int32, non_blocking=True)
        self.correction: Tensor | None = None
        if correction:
            factor = torch.ones(self.batch, self.slots)
            factor[sequence, slot] += correction * (1 / selection.probability.cpu()[sequence, place] - 1)
            self.correction = factor.to(device, non_blocking=True)
        self._ranges: dict[KeyRanges | str, tuple[Tensor, Tensor]] = {}

    def ranges(self, ranges: KeyRanges) -> tuple[Tensor, Tensor]:
        """The first and the last key that each selected query sees, int32 `[batch, slots]`; 0 and -1 where none is."""
        known: KeyRanges | str = "causal" if ranges.causal else ranges
        if known not in self._ranges:
            first = torch.zeros_like(self.positions)
            last = self.positions
            if not ranges.causal:
                place = self.positions.clamp(min=0).long()
                first = ranges.first.expand(self.batch, -1).gather(1, place)
                last = ranges.last.expand(self.batch, -1).gather(1, place).where(self.positions >= 0, -1)
            self._ranges[known] = first, last
        return self._ranges[known]

    def take(self, tensor: Tensor) -> Tensor:
        """`[batch, tokens, …]` to `[1, rows, …]`, a copy."""
        if tensor.is_contiguous():
            # A GPU copies whole rows here, and single elements where it is given two indices.
            flat = tensor.view(self.batch * self.tokens, -1)
            return flat.index_select(0, self.token).view(1, -1, *tensor.shape[2:])
        return tensor[self.sequence, self.position][None]

    def put(self, tensor: Tensor, rows: Tensor) -> None:
        """Write `rows [1, rows, …]` into `tensor [batch, tokens, …]` in place."""
        if tensor.is_contiguous():
            tensor.flatten(0, 1).index_copy_(0, self.token, rows[0].to(tensor.dtype))
        else:
            tensor[self.sequence, self.position] = rows[0]

    @cached_property
    def row_of_token(self) -> Tensor:
        """For each token the number of its row, or -1: int32 `[batch, tokens]`."""
        places = torch.full((self.batch, self.tokens), -1, dtype=torch.int32, device=self.positions.device)
        places[self.sequence, self.position] = torch.arange(
            len(self.sequence), dtype=torch.int32, device=self.positions.device
        )
        return places

    def take_gradient(self, tensor: Tensor) -> Tensor:
        """Like `take`; zero if nothing is selected."""
        return self.take(tensor) if self.live else torch.zeros_like(self.take(tensor))

    def cut(self, rows: Tensor) -> Tensor:
        """`rows [1, rows, …]` without a graph where a row gets no gradient."""
        return rows

    def put_gradient(self, tensor: Tensor, rows: Tensor) -> None:
        """Like `put`."""
        self.put(tensor, rows)

    def by_sequence(self, rows: Tensor) -> Tensor:
        """`[1, rows, …]` to `[batch, slots, …]`, zeros where a sequence has fewer rows; a view if none has."""
        if self.dense:
            return rows.view(self.batch, self.slots, *rows.shape[2:])
        padded = rows.new_zeros(self.batch * self.slots, *rows.shape[2:])
        return padded.index_copy(0, self.slot, rows[0]).view(self.batch, self.slots, *rows.shape[2:])

    def from_sequences(self, padded: Tensor) -> Tensor:
        """`[batch, slots, …]` to `[1, rows, …]`, the inverse of `by_sequence`."""
        if self.dense:
            return padded.reshape(1, -1, *padded.shape[2:])
        return padded.flatten(0, 1).index_select(0, self.slot)[None]

    def take_slots(self, tensor: Tensor) -> Tensor:
        """`[batch, tokens, …]` to `[batch, slots, …]`, with some row of the sequence where it has fewer."""
        sequence = torch.arange(self.batch, device=self.positions.device)[:, None]
        return tensor[sequence, self.positions.clamp(min=0)]

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
    """A retained tensor with recomputed rows in the place of its own; gradient flows to these rows."""

    @staticmethod
    def forward(ctx: Any, retained: Retained, selected: SelectedRows, rows: Tensor) -> Tensor:
        """`[batch, heads, tokens, size]`, with `rows [1, heads, rows, size]`."""
        ctx.selected = selected
        return retained.restore(rows, selected)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[None, None, Tensor]:
        """The gradient's rows at the selection."""
        return None, None, ctx.selected.take_gradient(grad.transpose(1, 2)).transpose(1, 2)


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
        ctx.selected.put(kept, ctx.selected.take_gradient(grad))
        return None, kept
