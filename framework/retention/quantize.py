"""Symmetric absmax quantisation of keys and values: one scale per token and head.

Both directions are operators of their own. They allocate what they return and nothing of its size besides, on every
device, so that whatever follows a step's allocations sees the same ones: a fused kernel on CUDA, parts that fit into a
cache elsewhere.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

LARGEST_LEVEL = {8: 127, 4: 7}
"""By bits of a level; the smallest one is its negative."""

_PART = 2**18
"""Elements that are worked on at once where there is no fused kernel."""


def scale_dtype(tensor_dtype: torch.dtype, bits: int) -> torch.dtype:
    """Levels of 4 bits are as coarse as scales of 16, which then count; attention kernels read others as float32."""
    return tensor_dtype if bits == 4 and tensor_dtype.itemsize == 2 else torch.float32


def level_columns(size: int, bits: int) -> int:
    """Elements that hold a row's levels: two in each byte with 4 bits."""
    return -(-size // 2) if bits == 4 else size


@torch.library.custom_op("selectrain::quantize", mutates_args=())
def quantize(tensor: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """Levels and scales of `tensor [batch, heads, tokens, size]`, so that it is nearly levels times scales.

    Args:
        tensor: floats, in any layout.
        bits: 8 or 4.

    Returns:
        Levels `[batch, heads, tokens, columns]`: int8, or with 4 bits uint8, where byte i has in its low half the level
        of element i, and in its high one that of element columns + i, each plus 8. Scales `[batch, heads, tokens, 1]`,
        see `scale_dtype`.
    """
    levels, scales = _empty(tensor, bits)
    if tensor.is_cuda:
        # Triton comes with torch's builds for GPUs only.
        from framework.retention.quantize_kernels import quantize_into

        quantize_into(levels, scales, tensor, bits)
        return levels, scales
    for part, its_levels, its_scales in _parts(tensor, levels, scales):
        its_scales.copy_(scales_of(part, bits, scales.dtype))
        exact = part.to(torch.float32) / its_scales.to(torch.float32)
        rounded = exact.round_().clamp_(-LARGEST_LEVEL[bits], LARGEST_LEVEL[bits])
        its_levels.copy_(rounded if bits == 8 else _packed(rounded))
    return levels, scales


def scales_of(tensor: Tensor, bits: int, dtype: torch.dtype) -> Tensor:
    """The scale of each token and head, `[..., 1]`, never zero."""
    largest = tensor.abs().amax(-1, keepdim=True).to(torch.float32)
    return largest.div_(LARGEST_LEVEL[bits]).clamp_(min=torch.finfo(dtype).tiny).to(dtype)


@quantize.register_fake
def _(tensor: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    return _empty(tensor, bits)


@torch.library.custom_op("selectrain::restore", mutates_args=())
def restore(
    levels: Tensor,
    scales: Tensor,
    bits: int,
    size: int,
    dtype: torch.dtype,
    rows: Tensor | None = None,
    row_of_token: Tensor | None = None,
) -> Tensor:
    """The tensor that `quantize` was given, to within its rounding, with some of its rows replaced.

    Args:
        levels: from `quantize`.
        scales: from `quantize`.
        bits: 8 or 4.
        size: of a row.
        dtype: of the result.
        rows: `[1, heads, rows, size]`, or None.
        row_of_token: int32 `[batch, tokens]`, the row that stands in a token's place, or -1; None without rows.
    """
    restored = levels.new_empty(*levels.shape[:-1], size, dtype=dtype)
    if levels.is_cuda:
        from framework.retention.quantize_kernels import restore_into

        restore_into(restored, levels, scales, rows, row_of_token)
        return restored
    for part, its_levels, its_scales in _parts(restored, levels, scales):
        part.copy_((its_levels if bits == 8 else _unpacked(its_levels, size)) * its_scales.to(torch.float32))
    if rows is not None and row_of_token is not None:
        sequence, position = (row_of_token >= 0).nonzero(as_tuple=True)
        taken = rows[0].transpose(0, 1)[row_of_token[sequence, position]]
        restored.transpose(1, 2)[sequence, position] = taken.to(dtype)
    return restored


@restore.register_fake
def _(levels: Tensor, scales: Tensor, bits: int, size: int, dtype: torch.dtype, *_: Any) -> Tensor:
    return levels.new_empty(*levels.shape[:-1], size, dtype=dtype)


def _empty(tensor: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    *outer, size = tensor.shape
    levels = tensor.new_empty(*outer, level_columns(size, bits), dtype=torch.int8 if bits == 8 else torch.uint8)
    return levels, tensor.new_empty(*outer, 1, dtype=scale_dtype(tensor.dtype, bits))


def _parts(*tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Tensors `[batch, heads, tokens, ...]` by runs of tokens, of about `_PART` elements of the first one each."""
    batch, heads, _, size = tensors[0].shape
    tokens = max(1, _PART // max(1, batch * heads * size))
    return zip(*(tensor.split(tokens, dim=2) for tensor in tensors), strict=True)


def _packed(levels: Tensor) -> Tensor:
    """Whole numbers from -7 to 7, two in a byte."""
    columns = level_columns(levels.shape[-1], 4)
    halves = (levels + 8).to(torch.uint8)
    if halves.shape[-1] % 2:
        halves = torch.nn.functional.pad(halves, (0, 1), value=8)
    return halves[..., :columns] | halves[..., columns:] << 4


def _unpacked(packed: Tensor, size: int) -> Tensor:
    """The numbers that `_packed` was given, as int8."""
    halves = torch.cat((packed & 15, packed >> 4), dim=-1)
    return halves[..., :size].to(torch.int8) - 8
