"""Triton programs for a tile of selected queries: their attention, and their gradient."""

from __future__ import annotations

import triton
import triton.language as tl

from framework.retention.attention.replay_tiles import (
    LN_2,
    key_tiles,
    load_intervals,
    load_keys,
    load_rows,
    masked_tile,
    scores_of,
    store_rows,
)


@triton.jit
def _sees(low, high, start, KEYS: tl.constexpr):
    """Which query sees which key of the tile, `[queries, keys]`."""
    positions = start + tl.arange(0, KEYS)
    return (low[:, None] <= positions[None, :]) & (positions[None, :] <= high[:, None])


@triton.jit
def _attend_tile(
    sums, peak, total, tile, query, keys, values, low, high, factor, cap_slope, tokens,
    SIZE: tl.constexpr, VALUE_SIZE: tl.constexpr, KEYS: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """One step of the online softmax: sums relative to the largest score so far, over one more tile of keys."""
    start = tile * KEYS
    key = load_keys(keys, start, tokens, query.dtype, KEYS, SIZE, MASKED)
    scores = scores_of(query, key, cap_slope)
    if MASKED:
        scores = tl.where(_sees(low, high, start, KEYS), scores, -float("inf"))
    new_peak = tl.maximum(peak, tl.max(scores, 1) * factor)
    shift = new_peak
    if MASKED:  # a query that has seen no key yet has weights 0, not NaN
        shift = tl.where(new_peak == -float("inf"), 0.0, new_peak)
    weights = tl.exp2(scores * factor - shift[:, None])
    decay = tl.exp2(peak - shift)
    value = load_keys(values, start, tokens, query.dtype, KEYS, VALUE_SIZE, MASKED)
    sums = tl.dot(weights.to(query.dtype), value, sums * decay[:, None], input_precision="ieee")
    return sums, new_peak, total * decay + tl.sum(weights, 1)


@triton.jit(do_not_specialize=["slots", "tokens"])
def attend_program(
    query, key, value, key_scale, value_scale, first, last, output, lse,
    query_strides, key_strides, value_strides, output_strides,
    slots, tokens, factor, cap_slope,
    HEADS: tl.constexpr, GROUP: tl.constexpr, SIZE: tl.constexpr, VALUE_SIZE: tl.constexpr,
    QUERIES: tl.constexpr, KEYS: tl.constexpr,
):  # fmt: skip
    """Output and log-sum-exp of one tile of queries of one head."""
    # Later queries mostly see more keys: the longest programs start first.
    start = (tl.num_programs(0) - 1 - tl.program_id(0)) * QUERIES
    batch_head = tl.program_id(1).to(tl.int64)
    batch, head = batch_head // HEADS, batch_head % HEADS
    kv_head = head // GROUP
    if key_scale is not None:
        key_scale += batch_head // GROUP * tokens
        value_scale += batch_head // GROUP * tokens
    keys = (key + batch * key_strides[0] + kv_head * key_strides[1], key_scale, key_strides[2])
    values = (value + batch * value_strides[0] + kv_head * value_strides[1], value_scale, value_strides[2])
    queries = query + batch * query_strides[0] + head * query_strides[1]
    queries = load_rows(queries, start, query_strides[2], slots, QUERIES, SIZE, True)
    low, high = load_intervals(first + batch * slots, last + batch * slots, start, slots, QUERIES)

    peak = tl.full([QUERIES], -float("inf"), tl.float32)
    total = tl.zeros([QUERIES], tl.float32)
    sums = tl.zeros([QUERIES, triton.next_power_of_2(VALUE_SIZE)], tl.float32)
    begin, full_begin, full_end, end = key_tiles(low, high, KEYS)
    for tile in range(full_begin, full_end):
        sums, peak, total = _attend_tile(
            sums, peak, total, tile, queries, keys, values, low, high, factor, cap_slope, tokens,
            SIZE, VALUE_SIZE, KEYS, False,
        )  # fmt: skip
    for index in range(0, full_begin - begin + end - full_end):
        tile = masked_tile(index, begin, full_begin, full_end)
        sums, peak, total = _attend_tile(
            sums, peak, total, tile, queries, keys, values, low, high, factor, cap_slope, tokens,
            SIZE, VALUE_SIZE, KEYS, True,
        )  # fmt: skip

    sees = low <= high
    total = tl.where(sees, total, 1.0)
    sums = tl.where(sees[:, None], sums / total[:, None], 0.0)
    output += batch * output_strides[0] + head * output_strides[1]
    store_rows(output, sums, start, output_strides[2], slots, VALUE_SIZE)
    rows = start + tl.arange(0, QUERIES)
    total = tl.where(sees, (peak + tl.log2(total)) * LN_2, -float("inf"))
    tl.store(lse + batch_head * slots + rows, total, mask=rows < slots)


@triton.jit
def _gradient_tile(
    sums, tile, query, grad, shift, delta, keys, values, low, high, factor, cap_slope, tokens,
    SIZE: tl.constexpr, VALUE_SIZE: tl.constexpr, KEYS: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    start = tile * KEYS
    key = load_keys(keys, start, tokens, query.dtype, KEYS, SIZE, MASKED)
    value = load_keys(values, start, tokens, query.dtype, KEYS, VALUE_SIZE, MASKED)
    scores = scores_of(query, key, cap_slope)
    weights = tl.exp2(scores * factor - shift[:, None])
    if MASKED:
        weights = tl.where(_sees(low, high, start, KEYS), weights, 0.0)
    grad_weights = tl.dot(grad, tl.trans(value), input_precision="ieee")
    grad_scores = weights * (grad_weights - delta[:, None])
    if cap_slope is not None:
        grad_scores *= 1 - scores * scores
    return tl.dot(grad_scores.to(query.dtype), key, sums, input_precision="ieee")


@triton.jit(do_not_specialize=["slots", "padded", "tokens"])
def query_gradient_program(
    grad, query, key, value, key_scale, value_scale, first, last, shift, delta, grad_query,
    grad_strides, query_strides, key_strides, value_strides, grad_query_strides,
    slots, padded, tokens, scale, factor, cap_slope,
    HEADS: tl.constexpr, GROUP: tl.constexpr, SIZE: tl.constexpr, VALUE_SIZE: tl.constexpr,
    QUERIES: tl.constexpr, KEYS: tl.constexpr,
):  # fmt: skip
    """Gradient of one tile of queries of one head: three products for each tile of keys.

    `shift`, `delta` `[batch, heads, padded]`: see `prepare_program`.
    """
    start = (tl.num_programs(0) - 1 - tl.program_id(0)) * QUERIES
    batch_head = tl.program_id(1).to(tl.int64)
    batch, head = batch_head // HEADS, batch_head % HEADS
    kv_head = head // GROUP
    if key_scale is not None:
        key_scale += batch_head // GROUP * tokens
        value_scale += batch_head // GROUP * tokens
    keys = (key + batch * key_strides[0] + kv_head * key_strides[1], key_scale, key_strides[2])
    values = (value + batch * value_strides[0] + kv_head * value_strides[1], value_scale, value_strides[2])
    queries = query + batch * query_strides[0] + head * query_strides[1]
    queries = load_rows(queries, start, query_strides[2], slots, QUERIES, SIZE, True)
    grads = grad + batch * grad_strides[0] + head * grad_strides[1]
    grads = load_rows(grads, start, grad_strides[2], slots, QUERIES, VALUE_SIZE, True)
    low, high = load_intervals(first + batch * slots, last + batch * slots, start, slots, QUERIES)
    rows = start + tl.arange(0, QUERIES)
    shifts = tl.load(shift + batch_head * padded + rows, mask=rows < slots, other=float("inf"))
    deltas = tl.load(delta + batch_head * padded + rows, mask=rows < slots, other=0.0)

    sums = tl.zeros([QUERIES, triton.next_power_of_2(SIZE)], tl.float32)
    begin, full_begin, full_end, end = key_tiles(low, high, KEYS)
    for tile in range(full_begin, full_end):
        sums = _gradient_tile(
            sums, tile, queries, grads, shifts, deltas, keys, values, low, high, factor, cap_slope, tokens,
            SIZE, VALUE_SIZE, KEYS, False,
        )  # fmt: skip
    for index in range(0, full_begin - begin + end - full_end):
        tile = masked_tile(index, begin, full_begin, full_end)
        sums = _gradient_tile(
            sums, tile, queries, grads, shifts, deltas, keys, values, low, high, factor, cap_slope, tokens,
            SIZE, VALUE_SIZE, KEYS, True,
        )  # fmt: skip

    grad_query += batch * grad_query_strides[0] + head * grad_query_strides[1]
    store_rows(grad_query, sums * scale, start, grad_query_strides[2], slots, SIZE)
