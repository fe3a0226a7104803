"""Formats in which keys and values are kept from the record pass to the replay."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor


class Retained(Protocol):
    """A kept tensor that can be read once."""

    def restore(self) -> Tensor:
        """The tensor, `[batch, heads, tokens, size]`, free to be overwritten."""

    def operands(self) -> tuple[Tensor, Tensor | None]:
        """The same as levels and the float32 scale `[batch, heads, tokens, 1]` that they are multiplied by, if any."""


class AsIs:
    """The tensor itself, copied only when it is a part of a larger storage (fused projections), which it would pin."""

    def __init__(self, tensor: Tensor) -> None:
        owned = tensor.untyped_storage().nbytes() == tensor.numel() * tensor.element_size()
        self.tensor = tensor if owned else tensor.clone(memory_format=torch.contiguous_format)

    def restore(self) -> Tensor:
        """The kept tensor."""
        return self.tensor

    def operands(self) -> tuple[Tensor, None]:
        """The kept tensor, which needs no scale."""
        return self.tensor, None


class Int8:
    """Eight bits an element, scaled by the largest magnitude of each token and head (symmetric absmax quantisation).

    Bytes: one per element and four per token and head. The rounding error of an element is at most 1/254 of the
    largest magnitude in its row.
    """

    def __init__(self, tensor: Tensor) -> None:
        self.dtype = tensor.dtype
        largest = tensor.abs().amax(-1, keepdim=True).to(torch.float32)
        self.scale = largest.clamp_(min=torch.finfo(torch.float32).tiny).div_(127)
        self.levels = (tensor / self.scale).round_().clamp_(-127, 127).to(torch.int8)

    def restore(self) -> Tensor:
        """The kept tensor to within its rounding, in its first dtype."""
        return (self.levels * self.scale).to(self.dtype)

    def operands(self) -> tuple[Tensor, Tensor]:
        """What is kept."""
        return self.levels, self.scale


KV_FORMATS: dict[str, type[AsIs] | type[Int8]] = {"model": AsIs, "int8": Int8}
