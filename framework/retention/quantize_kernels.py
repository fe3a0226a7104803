"""Triton kernels of `framework.retention.quantize`: every element is read once and written once.

A program has some rows, each a token's and head's, whole. Nothing that depends on the number of tokens is specialised
on, so that batches of other lengths run what was compiled for the first one.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from framework.retention.quantize import LARGEST_LEVEL

_PROGRAM_ELEMENTS = 4096

_ROUNDING = tl.constexpr(1.5 * 2**23)
"""Added to a small float32 and taken off again it leaves the nearest whole number, and of two the even one."""


@triton.jit
def _levels(elements, scale, LARGEST: tl.constexpr):
    exact = tl.div_rn(elements, tl.broadcast_to(scale.to(tl.float32)[:, None], elements.shape))
    rounded = (exact + _ROUNDING) - _ROUNDING
    return tl.minimum(tl.maximum(rounded, -LARGEST), LARGEST)


@triton.jit(do_not_specialize=["count", "tokens", "batch_stride", "head_stride", "token_stride"])
def _quantize(
    tensor,
    levels,
    scales,
    count,
    heads,
    tokens,
    batch_stride,
    head_stride,
    token_stride,
    SIZE: tl.constexpr,
    COLUMNS: tl.constexpr,
    PACKED: tl.constexpr,
    LARGEST: tl.constexpr,
    TINY: tl.constexpr,
    UNIT: tl.constexpr,
    ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """Rows of `tensor`; packed, a byte takes an element of the first half and one of the second."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, WIDTH)[None, :]
    exists = row < count
    start = row // (heads * tokens) * batch_stride + row // tokens % heads * head_stride + row % tokens * token_stride
    start = (tensor + start * UNIT)[:, None]
    within = exists[:, None] & (column < COLUMNS)
    first = tl.load(start + column, mask=within, other=0.0).to(tl.float32)
    largest = tl.max(tl.abs(first), 1)
    if PACKED:
        paired = exists[:, None] & (column < SIZE - COLUMNS)
        second = tl.load(start + COLUMNS + column, mask=paired, other=0.0).to(tl.float32)
        largest = tl.maximum(largest, tl.max(tl.abs(second), 1))
    scale = tl.div_rn(largest, tl.full(largest.shape, LARGEST, tl.float32))
    scale = tl.maximum(scale, TINY).to(scales.dtype.element_ty)
    tl.store(scales + row, scale, mask=exists)
    level = _levels(first, scale, LARGEST)
    into = levels + row[:, None] * COLUMNS + column
    if PACKED:
        high = _levels(second, scale, LARGEST)
        tl.store(into, ((level + 8).to(tl.uint8) | ((high + 8).to(tl.uint8) << 4)), mask=within)
    else:
        tl.store(into, level.to(tl.int8), mask=within)


@triton.jit(do_not_specialize=["count", "tokens", "head_stride", "row_stride"])
def _restore(
    restored,
    levels,
    scales,
    rows,
    row_of_token,
    count,
    heads,
    tokens,
    head_stride,
    row_stride,
    SIZE: tl.constexpr,
    COLUMNS: tl.constexpr,
    PACKED: tl.constexpr,
    REPLACES: tl.constexpr,
    UNIT: tl.constexpr,
    ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """The inverse, with rows of `rows` in the place of those that `row_of_token` names."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, WIDTH)[None, :]
    exists = row < count
    within = exists[:, None] & (column < COLUMNS)
    paired = exists[:, None] & (column < SIZE - COLUMNS)
    kept, replaced, start = exists, exists, row
    if REPLACES:
        other = tl.load(row_of_token + row // (heads * tokens) * tokens + row % tokens, mask=exists, other=-1)
        replaced = other >= 0
        kept = exists & (other < 0)
        start = (row // tokens % heads * head_stride + other.to(tl.int64) * row_stride) * UNIT
    level = tl.load(levels + row[:, None] * COLUMNS + column, mask=within & kept[:, None], other=0)
    scale = tl.load(scales + row, mask=kept, other=0.0).to(tl.float32)[:, None]
    into = restored + row[:, None] * SIZE + column
    if PACKED:
        low = ((level & 15).to(tl.int8) - 8).to(tl.float32) * scale
        high = ((level >> 4).to(tl.int8) - 8).to(tl.float32) * scale
        if REPLACES:
            source = (rows + start)[:, None] + column
            given = tl.load(source + COLUMNS, mask=paired & replaced[:, None], other=0.0)
            high = tl.where(replaced[:, None], given.to(tl.float32), high)
        tl.store(into + COLUMNS, high.to(restored.dtype.element_ty), mask=paired)
    else:
        low = level.to(tl.float32) * scale
    if REPLACES:
        given = tl.load((rows + start)[:, None] + column, mask=within & replaced[:, None], other=0.0)
        low = tl.where(replaced[:, None], given.to(tl.float32), low)
    tl.store(into, low.to(restored.dtype.element_ty), mask=within)


def quantize_into(levels: Tensor, scales: Tensor, tensor: Tensor, bits: int) -> None:
    """Write `levels` and `scales` of `tensor [batch, heads, tokens, size]`; see `framework.retention.quantize`."""
    if tensor.stride(-1) != 1:
        tensor = tensor.contiguous()
    _, heads, tokens, size = tensor.shape
    unit, strides = _units(*tensor.stride()[:3])
    launch = _Launch(levels)
    _quantize[launch.grid](
        tensor,
        levels,
        scales,
        launch.count,
        heads,
        tokens,
        *strides,
        SIZE=size,
        LARGEST=LARGEST_LEVEL[bits],
        TINY=torch.finfo(scales.dtype).tiny,
        UNIT=unit,
        **launch.constants,
    )


def restore_into(
    restored: Tensor, levels: Tensor, scales: Tensor, rows: Tensor | None, row_of_token: Tensor | None
) -> None:
    """Write `restored [batch, heads, tokens, size]`, which is contiguous; see `framework.retention.quantize`."""
    _, heads, tokens, size = restored.shape
    replaces = rows is not None and row_of_token is not None
    if replaces and rows.stride(-1) != 1:
        rows = rows.contiguous()
    unit, strides = _units(*(rows.stride()[1:3] if replaces else (0, 0)))
    launch = _Launch(levels)
    _restore[launch.grid](
        restored,
        levels,
        scales,
        rows if replaces else restored,
        row_of_token if replaces else restored,
        launch.count,
        heads,
        tokens,
        *strides,
        SIZE=size,
        REPLACES=replaces,
        UNIT=unit,
        **launch.constants,
    )


class _Launch:
    """How many programs go over rows of levels, and what they are compiled for."""

    def __init__(self, levels: Tensor) -> None:
        columns = levels.shape[-1]
        width = triton.next_power_of_2(columns)
        rows = max(1, _PROGRAM_ELEMENTS // width)
        self.count = levels.shape[:-1].numel()
        self.grid = (triton.cdiv(self.count, rows),)
        self.constants = {"COLUMNS": columns, "PACKED": levels.dtype is torch.uint8, "ROWS": rows, "WIDTH": width}


def _units(*strides: int) -> tuple[int, tuple[int, ...]]:
    """A unit, and strides as multiples of it: a kernel that knows the unit loads several elements at once.

    Batches of all lengths have the same one, since the stride that a length is a factor of has another stride, too.
    """
    unit = 16 if all(stride % 16 == 0 for stride in strides) else 1
    return unit, tuple(stride // unit for stride in strides)
