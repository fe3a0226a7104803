"""What ranks hold, in words that every engine shares: contiguous ranges of whole tensors.

A checkpoint is made of these and knows nothing of engines, so any engine with any number of ranks can read what another
one wrote: it asks for the ranges that it holds.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from math import prod
from typing import Protocol

import torch
from torch import Tensor


@dataclass(frozen=True)
class Fragment:
    """Elements `start … start + len(values)` of a tensor in row-major order.

    Attributes:
        name: of the tensor: a weight's name in the model; of an optimiser's tensor `STATE.WEIGHT`, such as
            `exp_avg.model.norm.weight`.
        shape: of the whole tensor; `()` for a scalar.
        start: index of the first element.
        values: `[elements]`, any dtype and device: a view of what the rank holds, so that writing to it changes that.
    """

    name: str
    shape: tuple[int, ...]
    start: int
    values: Tensor

    @property
    def is_whole(self) -> bool:
        """Whether it is all of the tensor."""
        return self.values.numel() == prod(self.shape)


class StoredTensors(Protocol):
    """Named tensors on the disk, of which any range can be read."""

    def names(self) -> Iterator[str]:
        """Of the tensors."""
        ...

    def shape(self, name: str) -> tuple[int, ...]:
        """Of the whole tensor."""
        ...

    def dtype(self, name: str) -> torch.dtype:
        """In which it is stored."""
        ...

    def read(self, name: str, start: int = 0, count: int | None = None) -> Tensor:
        """A range of its elements in row-major order, `[count]` on the CPU, all by default; may be mapped, not read.

        Raises:
            KeyError: there is no such tensor.
        """
        ...


def whole(name: str, tensor: Tensor) -> Fragment:
    """A tensor that one rank holds entirely; of one that is not contiguous the values are a copy."""
    return Fragment(name, tuple(tensor.shape), 0, tensor.detach().reshape(-1))
