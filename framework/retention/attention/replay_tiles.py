"""Steps that the Triton programs of the replay's attention share.

Scores are the product of query and key, or its tanh where scores are soft-capped; `factor` times that is the score in
units of log 2, so that the exponential is one `exp2` of one fused multiply-add. Rows have the width of a tile, the next
power of two, with zeros beyond the head's size.

Tiles that every query of a tile sees in full carry no mask. They lie between two stretches of tiles that do.
"""

from __future__ import annotations

import triton
import triton.language as tl

# Beyond every position, and no overflow when a tile's length is added.
NOWHERE = tl.constexpr(2**30)
LN_2 = tl.constexpr(0.6931471805599453)
LOG2_E = tl.constexpr(1.4426950408889634)


@triton.jit
def load_rows(matrix, start, row_stride, limit, ROWS: tl.constexpr, SIZE: tl.constexpr, CHECKED: tl.constexpr):
    """Rows from `start` on as `[ROWS, width]`, with zeros beyond `SIZE` and, if checked, from row `limit` on."""
    WIDTH: tl.constexpr = triton.next_power_of_2(SIZE)
    rows, columns = tl.arange(0, ROWS), tl.arange(0, WIDTH)
    # A matrix may have more elements than 32 bits count; a tile has not.
    pointers = matrix + tl.cast(start, tl.int64) * row_stride + rows[:, None] * row_stride + columns[None, :]
    if CHECKED:
        mask = (start + rows < limit)[:, None]
        if SIZE < WIDTH:
            mask = mask & (columns < SIZE)[None, :]
        tile = tl.load(pointers, mask=mask, other=0)
    elif SIZE < WIDTH:
        tile = tl.load(pointers, mask=(columns < SIZE)[None, :], other=0)
    else:
        tile = tl.load(pointers)
    return tile


@triton.jit
def load_keys(keys, start, tokens, dtype: tl.constexpr, ROWS: tl.constexpr, SIZE: tl.constexpr, CHECKED: tl.constexpr):
    """Like `load_rows`, in `dtype`; `keys` is the matrix, its scales `[tokens]` or None, and its row stride."""
    matrix, scales, row_stride = keys
    tile = load_rows(matrix, start, row_stride, tokens, ROWS, SIZE, CHECKED)
    if scales is not None:
        rows = start + tl.arange(0, ROWS)
        if CHECKED:
            scale = tl.load(scales + rows, mask=rows < tokens, other=0.0)
        else:
            scale = tl.load(scales + rows)
        tile = (tile.to(tl.float32) * scale[:, None]).to(dtype)
    return tile


@triton.jit
def store_rows(matrix, tile, start, row_stride, limit, SIZE: tl.constexpr):
    """Write `tile [rows, width]` into the rows from `start` to `limit`."""
    rows, columns = tl.arange(0, tile.shape[0]), tl.arange(0, tile.shape[1])
    pointers = matrix + tl.cast(start, tl.int64) * row_stride + rows[:, None] * row_stride + columns[None, :]
    mask = (start + rows < limit)[:, None] & (columns < SIZE)[None, :]
    tl.store(pointers, tile.to(matrix.dtype.element_ty), mask=mask)


@triton.jit
def scores_of(left, right, cap_slope):
    """`left · rightᵀ`, or `tanh(cap_slope * left · rightᵀ)`."""
    scores = tl.dot(left, tl.trans(right), input_precision="ieee")
    if cap_slope is not None:
        scores = 1 - 2 / (tl.exp2(scores * (cap_slope * 2 * LOG2_E)) + 1)
    return scores


@triton.jit
def load_intervals(first, last, start, slots, ROWS: tl.constexpr):
    """The first and the last key that each query of a tile sees; none (1, 0) beyond the last slot."""
    rows = start + tl.arange(0, ROWS)
    return tl.load(first + rows, mask=rows < slots, other=1), tl.load(last + rows, mask=rows < slots, other=0)


@triton.jit
def key_tiles(low, high, KEYS: tl.constexpr):
    """Tiles of keys that a tile of queries sees: from `begin` to `end`, in full from `full_begin` to `full_end`.

    `begin <= full_begin <= full_end <= end`. Queries that see no key do not count.
    """
    sees = low <= high
    end = tl.cdiv(tl.max(tl.where(sees, high, -1)) + 1, KEYS)
    full_begin = tl.cdiv(tl.max(tl.where(sees, low, 0)), KEYS)
    full_end = tl.minimum((tl.min(tl.where(sees, high, NOWHERE)) + 1) // KEYS, end)
    begin = tl.minimum(tl.min(tl.where(sees, low, NOWHERE)) // KEYS, full_begin)
    return begin, full_begin, tl.maximum(full_begin, full_end), end


@triton.jit
def masked_tile(index, begin, full_begin, full_end):
    """The tile with this index among those on both sides of the full ones."""
    before = full_begin - begin
    return tl.where(index < before, begin + index, full_end + index - before)
