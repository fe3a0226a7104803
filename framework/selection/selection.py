"""The set of token positions of a batch that receive gradient."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Selection:
    """Selected positions of a batch, ragged rows filled up with positions that count for nothing.

    Every row of `positions` is sorted and free of duplicates, fillers included, so that scattering rows back is
    well defined. A filler (`valid` false) neither receives nor sends gradient.

    Attributes:
        positions: int64 `[batch, k]`, token positions.
        valid: bool `[batch, k]`, false for fillers.
        probability: float32 `[batch, k]`, the probability with which the strategy includes the position; 1 for
            fillers.
        ragged: whether there may be fillers; known without asking the device.
    """

    positions: Tensor
    valid: Tensor
    probability: Tensor
    ragged: bool = True

    def __post_init__(self) -> None:
        """Check shapes and dtypes, which everything downstream relies on."""
        if self.positions.dtype != torch.int64 or self.positions.dim() != 2:
            raise ValueError(
                f"positions must be int64 [batch, k], not {self.positions.dtype} {[*self.positions.shape]}"
            )
        for name in ("valid", "probability"):
            if getattr(self, name).shape != self.positions.shape:
                raise ValueError(f"{name} must have the shape of positions, {[*self.positions.shape]}")

    @classmethod
    def of_positions(cls, positions: Tensor) -> Selection:
        """The selection of exactly these positions, int64 `[batch, k]`, sorted and distinct, each with probability 1.

        Raises:
            ValueError: a row is not strictly increasing.
        """
        if positions.dim() != 2 or positions.shape[1] == 0 or bool((positions < 0).any()):
            raise ValueError(f"positions must be non-negative [batch, k] with k >= 1, not {[*positions.shape]}")
        if bool((positions[:, 1:] <= positions[:, :-1]).any()):
            raise ValueError("positions must be sorted and distinct in every row")
        certain = torch.ones(positions.shape, device=positions.device)
        return cls(positions, torch.ones_like(positions, dtype=torch.bool), certain, ragged=False)

    @classmethod
    def of_mask(cls, mask: Tensor, probability: Tensor) -> Selection:
        """The selection of the true positions of a mask.

        Args:
            mask: bool `[batch, sequence]`.
            probability: float `[batch, sequence]`, inclusion probability of every position.
        """
        count = max(1, int(mask.sum(1).max()))
        # A stable sort of "not selected" puts the selected positions first, then the fillers, both in order.
        positions = torch.argsort(~mask, dim=1, stable=True)[:, :count].sort(1).values
        valid = mask.gather(1, positions)
        kept = probability.gather(1, positions).masked_fill(~valid, 1.0)
        return cls(positions, valid, kept.to(torch.float32), ragged=not bool(valid.all()))

    def including(self, mask: Tensor) -> Selection:
        """This selection and the true positions of `mask`, bool `[batch, sequence]`, which are then certain."""
        probability = torch.ones(mask.shape, device=mask.device)
        probability.scatter_(1, self.positions, self.probability)
        return Selection.of_mask(self.mask(mask.shape[1]) | mask, probability.masked_fill(mask, 1.0))

    def check_fits(self, batch: int, sequence: int) -> None:
        """Refuse another batch's selection. Positions are compared where that needs no device synchronisation.

        Raises:
            ValueError: another number of sequences, or a position beyond the sequence.
        """
        if self.positions.shape[0] != batch:
            raise ValueError(f"the selection is over {self.positions.shape[0]} sequences, the batch has {batch}")
        on_cpu = self.positions.device.type == "cpu"
        if self.positions.shape[1] > sequence or (on_cpu and int(self.positions.max()) >= sequence):
            raise ValueError(f"the selection has positions beyond the sequence of {sequence} tokens")

    @property
    def selected_tokens(self) -> int:
        """Number of selected tokens of the batch, fillers not counted."""
        return int(self.valid.sum())

    def to(self, device: torch.device | str) -> Selection:
        """The same selection on another device."""
        positions, valid, probability = (
            tensor.to(device, non_blocking=True) for tensor in (self.positions, self.valid, self.probability)
        )
        return Selection(positions, valid, probability, self.ragged)

    def mask(self, sequence: int) -> Tensor:
        """Bool `[batch, sequence]`, true at selected positions."""
        empty = torch.zeros(self.positions.shape[0], sequence, dtype=torch.bool, device=self.positions.device)
        return empty.scatter(1, self.positions, self.valid)
