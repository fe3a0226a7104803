"""Rows of one run per sequence, from its first selected token to its last, for blocks that hand a state on."""

from __future__ import annotations

import torch
from torch import Tensor

from framework.retention.rows import SelectedRows
from framework.selection import Selection


class RunRows(SelectedRows):
    """The selected rows of a batch, and those between them.

    What a block with recurrent state computes for a token goes by all tokens before it, so its replay has to be of
    neighbours. Tokens before a run are constants like any that is not selected, the state that they hand over included.
    An unselected token inside a run is detached at the block's input and output and as a key and value; what the state
    takes from it is not. Where every selection is contiguous there is none.

    Whatever is selected, a sequence has one run: how often a module is called does not depend on a batch.

    Args:
        selected: the selection's own rows.
        slack: rows of padding beyond what the runs and what comes before them need, to try what padding does.

    Attributes:
        contiguous: the runs have no unselected token.
        before: what comes before the runs.
    """

    def __init__(self, selected: SelectedRows, slack: int = 0) -> None:
        chosen, tokens = selected.host_positions, selected.tokens
        first = chosen.where(chosen >= 0, tokens).amin(1)
        last = chosen.amax(1)
        place = torch.arange(tokens)
        run = (first[:, None] <= place) & (place <= last[:, None])
        # Mixers take a sequence of one token for a step of generation, which writes into the state that it is given.
        slots = max(2, int(run.sum(1).max())) + slack
        whole = Selection.of_mask(run, torch.ones(run.shape))
        super().__init__(whole, tokens, selected.sequence.device, slots=slots)
        self.live = selected.live
        self.contiguous = self.counts == selected.counts
        self.before = TokensBefore(first.where(last >= 0, 0).to(selected.sequence.device), tokens, slack)
        is_chosen = torch.zeros(run.shape, dtype=torch.bool, device=selected.sequence.device)
        is_chosen[selected.sequence, selected.position] = True
        self._chosen = self.take(is_chosen)

    def take_gradient(self, tensor: Tensor) -> Tensor:
        """Zero where nothing is selected."""
        return self._cut(super().take_gradient(tensor))

    def cut(self, rows: Tensor) -> Tensor:
        """Rows between selected ones are constants."""
        if self.contiguous:
            return rows
        return torch.where(self._chosen.view(1, -1, *[1] * (rows.dim() - 2)), rows, rows.detach())

    def put_gradient(self, tensor: Tensor, rows: Tensor) -> None:
        """Zero where nothing is selected."""
        super().put_gradient(tensor, self._cut(rows))

    def _cut(self, rows: Tensor) -> Tensor:
        """`rows [1, rows, …]`, zero between selected ones."""
        if self.contiguous:
            return rows
        return rows.masked_fill(~self._chosen.view(1, -1, *[1] * (rows.dim() - 2)), 0)


class TokensBefore:
    """The tokens of every sequence before its run, with their ends in one column.

    Where runs begin at different positions, padding stands in front; there is one column at least.

    Args:
        first: int64 `[batch]`, where the runs begin.
        tokens: length of the sequences.
        slack: further columns of padding.
    """

    def __init__(self, first: Tensor, tokens: int, slack: int) -> None:
        self.batch, self.tokens = len(first), tokens
        self.columns = max(1, int(first.max())) + slack
        self._position = torch.arange(self.columns, device=first.device) - (self.columns - first)[:, None]
        self.padded = bool((self._position < 0).any())

    @property
    def real(self) -> Tensor:
        """Bool `[batch, columns]`, false in the padding."""
        return self._position >= 0

    def take(self, tensor: Tensor) -> Tensor:
        """`[batch or 1, tokens, …]` to `[batch, columns, …]`, zero in the padding."""
        tensor = tensor.expand(self.batch, *tensor.shape[1:])
        if not self.padded:
            return tensor[:, : self.columns]
        rows = torch.arange(self.batch, device=tensor.device)[:, None]
        taken = tensor[rows, self._position.clamp(min=0)]
        return taken.masked_fill_(~self.real.view(self.batch, self.columns, *[1] * (tensor.dim() - 2)), 0)

    def has_tokens(self, value: object) -> bool:
        """Whether `value` is a tensor `[batch or 1, tokens]` or `[batch or 1, tokens, …]`."""
        if not isinstance(value, Tensor) or value.dim() < 2:
            return False
        return value.shape[0] in (1, self.batch) and value.shape[1] == self.tokens
