"""Triton programs for a tile of selected keys: the gradients of keys and values, and what they look up first."""

from __future__ import annotations

import triton
import triton.language as tl

from framework.retention.attention.replay_tiles import (
    LOG2_E,
    NOWHERE,
    load_intervals,
    load_rows,
    masked_tile,
    scores_of,
    store_rows,
)

# Tiles of queries whose bounds are looked at together.
_SCAN = tl.constexpr(128)


@triton.jit(do_not_specialize=["slots"])
def prepare_program(
    grad, output, lse, first, last, shift, delta, bounds, grad_strides, output_strides, slots,
    HEADS: tl.constexpr, VALUE_SIZE: tl.constexpr, QUERIES: tl.constexpr,
):  # fmt: skip
    """What the gradient programs read of one tile of queries of one head.

    `shift`: the log-sum-exp in units of log 2, infinite for queries that see nothing, whose weights are then 0.
    `delta`: the sum of `grad * output` over a row. Both `[batch, heads, tiles * QUERIES]`: with whole tiles, loads of
    them are aligned and need no mask. `bounds [batch, 4, tiles]`: the least first and the greatest last key of a tile
    of queries, then the greatest first and the least last key.
    """
    tile = tl.program_id(0)
    batch_head = tl.program_id(1).to(tl.int64)
    batch, head = batch_head // HEADS, batch_head % HEADS
    start = tile * QUERIES
    rows = start + tl.arange(0, QUERIES)
    low, high = load_intervals(first + batch * slots, last + batch * slots, start, slots, QUERIES)
    sees = low <= high
    offsets = batch_head * tl.num_programs(0) * QUERIES + rows
    sum_log = tl.load(lse + batch_head * slots + rows, mask=sees, other=0.0)
    tl.store(shift + offsets, tl.where(sees, sum_log * LOG2_E, float("inf")))

    grad += batch * grad_strides[0] + head * grad_strides[1]
    output += batch * output_strides[0] + head * output_strides[1]
    grads = load_rows(grad, start, grad_strides[2], slots, QUERIES, VALUE_SIZE, True).to(tl.float32)
    outputs = load_rows(output, start, output_strides[2], slots, QUERIES, VALUE_SIZE, True).to(tl.float32)
    tl.store(delta + offsets, tl.where(sees, tl.sum(grads * outputs, 1), 0.0))

    if head == 0:
        tiles = tl.num_programs(0)
        bounds += batch * 4 * tiles + tile
        tl.store(bounds, tl.min(tl.where(sees, low, NOWHERE)))
        tl.store(bounds + tiles, tl.max(tl.where(sees, high, -1)))
        # A tile that ends beyond the last slot is never full: its rows want checking.
        whole = start + QUERIES <= slots
        tl.store(bounds + 2 * tiles, tl.where(whole, tl.max(tl.where(sees, low, -1)), NOWHERE))
        tl.store(bounds + 3 * tiles, tl.min(tl.where(sees, high, NOWHERE)))


@triton.jit
def _query_tiles(bounds, tiles, lowest, highest):
    """Tiles of queries that see keys between two positions: all of them lie from `begin` to `end`.

    From `full_begin` to `full_end` each query sees all of these keys. Where such tiles do not lie side by side none is
    named, and all carry a mask: that is slower, not wrong. With intervals in the order of the queries they do.
    """
    begin = tl.full([], NOWHERE, tl.int32)
    end = tl.full([], 0, tl.int32)
    full_begin, full_end, full = begin, end, end
    for chunk in range(0, tiles, _SCAN):
        index = chunk + tl.arange(0, _SCAN)
        inside = index < tiles
        least_first = tl.load(bounds + index, mask=inside, other=NOWHERE)
        greatest_last = tl.load(bounds + tiles + index, mask=inside, other=-1)
        greatest_first = tl.load(bounds + 2 * tiles + index, mask=inside, other=NOWHERE)
        least_last = tl.load(bounds + 3 * tiles + index, mask=inside, other=-1)
        seen = (least_first <= highest) & (lowest <= greatest_last)
        begin = tl.minimum(begin, tl.min(tl.where(seen, index, NOWHERE)))
        end = tl.maximum(end, tl.max(tl.where(seen, index + 1, 0)))
        seen_in_full = seen & (greatest_first <= lowest) & (highest <= least_last)
        full_begin = tl.minimum(full_begin, tl.min(tl.where(seen_in_full, index, NOWHERE)))
        full_end = tl.maximum(full_end, tl.max(tl.where(seen_in_full, index + 1, 0)))
        full += tl.sum(seen_in_full.to(tl.int32))
    begin = tl.minimum(begin, end)
    side_by_side = (full > 0) & (full_end - full_begin == full)
    return begin, tl.where(side_by_side, full_begin, begin), tl.where(side_by_side, full_end, begin), end


@triton.jit
def _gradient_tile(
    key_sums, value_sums, tile, key, value, position, queries, grads, shift, delta, first, last,
    factor, cap_slope, slots,
    SIZE: tl.constexpr, VALUE_SIZE: tl.constexpr, QUERIES: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """Add what one tile of queries of one head sends to keys and values; `queries`, `grads` with their row strides."""
    start = tile * QUERIES
    rows = start + tl.arange(0, QUERIES)
    query = load_rows(queries[0], start, queries[1], slots, QUERIES, SIZE, MASKED)
    grad = load_rows(grads[0], start, grads[1], slots, QUERIES, VALUE_SIZE, MASKED)
    shifts = tl.load(shift + rows)
    deltas = tl.load(delta + rows)
    scores = scores_of(key, query, cap_slope)
    weights = tl.exp2(scores * factor - shifts[None, :])
    if MASKED:
        low, high = load_intervals(first, last, start, slots, QUERIES)
        seen = (low[None, :] <= position[:, None]) & (position[:, None] <= high[None, :])
        weights = tl.where(seen, weights, 0.0)
    value_sums = tl.dot(weights.to(key.dtype), grad, value_sums, input_precision="ieee")
    grad_weights = tl.dot(value, tl.trans(grad), input_precision="ieee")
    grad_scores = weights * (grad_weights - deltas[None, :])
    if cap_slope is not None:
        grad_scores *= 1 - scores * scores
    key_sums = tl.dot(grad_scores.to(key.dtype), query, key_sums, input_precision="ieee")
    return key_sums, value_sums


@triton.jit(do_not_specialize=["slots"])
def key_gradient_program(
    grad, query, key, value, position, first, last, shift, delta, bounds, grad_key, grad_value,
    grad_strides, query_strides, key_strides, value_strides, grad_key_strides, grad_value_strides,
    slots, scale, factor, cap_slope,
    KV_HEADS: tl.constexpr, GROUP: tl.constexpr, SIZE: tl.constexpr, VALUE_SIZE: tl.constexpr,
    QUERIES: tl.constexpr, KEYS: tl.constexpr,
):  # fmt: skip
    """Gradients of one tile of selected keys and values of one head: four products for each tile of queries.

    The heads that share it are taken in turn at each tile of queries.
    """
    start = tl.program_id(0) * KEYS
    batch_head = tl.program_id(1).to(tl.int64)
    batch, kv_head = batch_head // KV_HEADS, batch_head % KV_HEADS
    key += batch * key_strides[0] + kv_head * key_strides[1]
    value += batch * value_strides[0] + kv_head * value_strides[1]
    keys = load_rows(key, start, key_strides[2], slots, KEYS, SIZE, True)
    values = load_rows(value, start, value_strides[2], slots, KEYS, VALUE_SIZE, True)
    rows = start + tl.arange(0, KEYS)
    first += batch * slots
    last += batch * slots
    positions = tl.load(position + batch * slots + rows, mask=rows < slots, other=-1)
    grad += batch * grad_strides[0] + kv_head * GROUP * grad_strides[1]
    query += batch * query_strides[0] + kv_head * GROUP * query_strides[1]
    tiles = tl.cdiv(slots, QUERIES)
    padded = tiles * QUERIES
    shift += batch_head * GROUP * padded
    delta += batch_head * GROUP * padded

    key_sums = tl.zeros([KEYS, triton.next_power_of_2(SIZE)], tl.float32)
    value_sums = tl.zeros([KEYS, triton.next_power_of_2(VALUE_SIZE)], tl.float32)
    lowest = tl.min(tl.where(positions >= 0, positions, NOWHERE))
    begin, full_begin, full_end, end = _query_tiles(bounds + batch * 4 * tiles, tiles, lowest, tl.max(positions))
    for index in range(0, (full_end - full_begin) * GROUP):
        tile, head = full_begin + index // GROUP, tl.cast(index % GROUP, tl.int64)
        queries = (query + head * query_strides[1], query_strides[2])
        grads = (grad + head * grad_strides[1], grad_strides[2])
        key_sums, value_sums = _gradient_tile(
            key_sums, value_sums, tile, keys, values, positions, queries, grads,
            shift + head * padded, delta + head * padded, first, last,
            factor, cap_slope, slots, SIZE, VALUE_SIZE, QUERIES, False,
        )  # fmt: skip
    for index in range(0, (full_begin - begin + end - full_end) * GROUP):
        tile = masked_tile(index // GROUP, begin, full_begin, full_end)
        head = tl.cast(index % GROUP, tl.int64)
        queries = (query + head * query_strides[1], query_strides[2])
        grads = (grad + head * grad_strides[1], grad_strides[2])
        key_sums, value_sums = _gradient_tile(
            key_sums, value_sums, tile, keys, values, positions, queries, grads,
            shift + head * padded, delta + head * padded, first, last,
            factor, cap_slope, slots, SIZE, VALUE_SIZE, QUERIES, True,
        )  # fmt: skip

    # A filler's row of the tile holds what it would have got without a mask.
    chosen = (positions >= 0)[:, None]
    grad_key += batch * grad_key_strides[0] + kv_head * grad_key_strides[1]
    store_rows(grad_key, tl.where(chosen, key_sums * scale, 0.0), start, grad_key_strides[2], slots, SIZE)
    grad_value += batch * grad_value_strides[0] + kv_head * grad_value_strides[1]
    store_rows(grad_value, tl.where(chosen, value_sums, 0.0), start, grad_value_strides[2], slots, VALUE_SIZE)
