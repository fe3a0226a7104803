"""Formats in which keys and values are kept from the record pass to the replay."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor

from framework.retention.quantize import quantize, restore
from framework.retention.rows import SelectedRows


class Retained(Protocol):
    """A kept tensor that can be read once."""

    def restore(self, rows: Tensor | None = None, selected: SelectedRows | None = None) -> Tensor:
        """The tensor, `[batch, heads, tokens, size]`, free to be overwritten.

        Args:
            rows: `[1, heads, rows, size]`, what to put in the place of the selected rows; None for nothing.
            selected: where they belong; None without rows.
        """

    def operands(self, rows: Tensor, selected: SelectedRows) -> tuple[Tensor, Tensor | None]:
        """What attention reads: the tensor, or levels of 8 bits and the scale that they are multiplied by.

        Args:
            rows: see `restore`; they are put in where the tensor has to be made anyway.
            selected: see there.
        """

    def replace(self, change: Callable[[Tensor], Tensor]) -> None:
        """Put in the place of each tensor that it holds what `change` gives for it, always in the same order."""


class AsIs:
    """The tensor itself, copied only when it is a part of a larger storage (fused projections), which it would pin."""

    def __init__(self, tensor: Tensor) -> None:
        owned = tensor.untyped_storage().nbytes() == tensor.numel() * tensor.element_size()
        self.tensor = tensor if owned else tensor.clone(memory_format=torch.contiguous_format)

    def restore(self, rows: Tensor | None = None, selected: SelectedRows | None = None) -> Tensor:
        """The kept tensor, overwritten."""
        if rows is not None and selected is not None:
            selected.put(self.tensor.transpose(1, 2), rows.transpose(1, 2).to(self.tensor.dtype))
        return self.tensor

    def operands(self, rows: Tensor, selected: SelectedRows) -> tuple[Tensor, Tensor | None]:
        """The kept tensor."""
        return self.tensor, None

    def replace(self, change: Callable[[Tensor], Tensor]) -> None:
        """See `Retained`."""
        self.tensor = change(self.tensor)


class Quantized:
    """Few bits an element, scaled by the largest magnitude of each token and head (symmetric absmax quantisation).

    The rounding error of an element is at most half a scale. See `quantize` for the layout.

    Attributes:
        levels: `[batch, heads, tokens, columns]`.
        scale: `[batch, heads, tokens, 1]`.
    """

    bits: int

    def __init__(self, tensor: Tensor) -> None:
        self.dtype, self.size = tensor.dtype, tensor.shape[-1]
        self.levels, self.scale = quantize(tensor, self.bits)

    def restore(self, rows: Tensor | None = None, selected: SelectedRows | None = None) -> Tensor:
        """The kept tensor to within its rounding, in its first dtype."""
        places = None if rows is None or selected is None else selected.row_of_token
        return restore(self.levels, self.scale, self.bits, self.size, self.dtype, rows, places)

    def operands(self, rows: Tensor, selected: SelectedRows) -> tuple[Tensor, Tensor | None]:
        """The kept tensor, restored."""
        return self.restore(rows, selected), None

    def replace(self, change: Callable[[Tensor], Tensor]) -> None:
        """See `Retained`."""
        self.levels, self.scale = change(self.levels), change(self.scale)


class Int8(Quantized):
    """Bytes: one an element and four a token and head. The scale is a 127th of the largest magnitude."""

    bits = 8

    def operands(self, rows: Tensor, selected: SelectedRows) -> tuple[Tensor, Tensor | None]:
        """Levels and scales, which attention multiplies where it reads them."""
        return self.levels, self.scale


class Int4(Quantized):
    """Bytes: half an element and two a token and head, four in float32. The scale is a seventh of the largest one."""

    bits = 4


class Recomputed(AsIs):
    """Nothing: the block's input is kept instead, and the tensor is put in when it is known again."""

    def __init__(self, tensor: Tensor) -> None:
        del tensor

    def replace(self, change: Callable[[Tensor], Tensor]) -> None:
        """It holds none."""


KV_FORMATS: dict[str, Callable[[Tensor], Retained]] = {
    "model": AsIs,
    "int8": Int8,
    "int4": Int4,
    "recompute": Recomputed,
}
"""By the config's `retention.kv_format`."""
