"""Attention of selected queries against all keys, and its gradients at the selection, in Triton.

Each query sees the keys of an interval: causal attention, a sliding window, packed documents and padding are all of
this kind. The method is FlashAttention-2's (arXiv 2307.08691, algorithms 1 and 2), with the backward pass in two
kernels, which makes it deterministic. What differs: only selected queries have rows, gradients of keys and values are
computed at selected positions only, and the forward pass may have been another kernel's.

Nothing here waits for the device, and no kernel is compiled again for another number of slots or tokens.
"""

from __future__ import annotations

import contextlib
import math
from dataclasses import dataclass
from typing import Any

import torch
import triton
from torch import Tensor

from framework.retention.attention.replay_key_programs import key_gradient_program, prepare_program
from framework.retention.attention.replay_query_programs import attend_program, query_gradient_program

LARGEST_SIZE = 256
# Rows of other sizes are not aligned, so that loads of them are slow.
SIZE_STEP = 16


@dataclass(frozen=True)
class Tile:
    """How a kernel divides its work.

    Attributes:
        queries: rows of queries of a step.
        keys: rows of keys of a step.
        warps: of one program.
        stages: of the pipeline that loads the next steps' rows.
    """

    queries: int
    keys: int
    warps: int
    stages: int


# By kernel and width of a head (the next power of two), for 16-bit types on Hopper.
TILES: dict[tuple[str, int], Tile] = {
    ("attend", 64): Tile(128, 64, 4, 3),
    ("attend", 128): Tile(128, 64, 8, 3),
    ("attend", 256): Tile(128, 64, 8, 2),
    ("query_gradient", 64): Tile(128, 64, 8, 3),
    ("query_gradient", 128): Tile(128, 64, 8, 3),
    ("query_gradient", 256): Tile(64, 64, 4, 2),
    ("key_gradients", 64): Tile(64, 128, 8, 3),
    ("key_gradients", 128): Tile(64, 128, 8, 2),
    ("key_gradients", 256): Tile(32, 64, 8, 2),
}
# Products in float32 do not run on tensor cores: larger tiles spill, and take minutes to compile.
FLOAT32_TILE = Tile(16, 16, 4, 1)


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    first: Tensor,
    last: Tensor,
    *,
    scale: float,
    softcap: float | None = None,
    key_scale: Tensor | None = None,
    value_scale: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Attention of selected queries, each over the keys `first … last`, both included.

    Head `h` reads the keys of head `h // (heads / kv_heads)`. Strides are free, but the last dimension is contiguous.

    Args:
        query: `[batch, heads, slots, size]`, bfloat16, float16 or float32; see `takes_heads`.
            What a slot without keys holds must be finite.
        key: `[batch, kv_heads, tokens, size]` in the query's type, or int8 with a scale.
        value: `[batch, kv_heads, tokens, value_size]`, likewise.
        first: int32 `[batch, slots]`, from 0; greater than `last` where a slot sees no key.
        last: int32 `[batch, slots]`, below `tokens`.
        scale: positive factor of the scores.
        softcap: scores become `softcap * tanh(scale * score / softcap)`.
        key_scale: float32 `[batch, kv_heads, tokens, 1]`; keys are `key * key_scale`, rounded to the query's type.
        value_scale: likewise for values; both or none.

    Returns:
        The output `[batch, heads, slots, value_size]` in the query's type, stored as `[batch, slots, heads, …]`, and
        the natural log-sum-exp of the scores, float32 `[batch, heads, slots]`. A slot without keys has 0 and -inf.

    Raises:
        ValueError: `takes_heads` says no.
    """
    batch, heads, slots, size = query.shape
    value_size = value.shape[-1]
    output = query.new_empty(batch, slots, heads, value_size).transpose(1, 2)
    lse = query.new_empty(batch, heads, slots, dtype=torch.float32)
    tile = tile_of("attend", query, value)
    factor, cap_slope = _score_factors(scale, softcap)
    query, key, value = _rows(query), _rows(key), _rows(value)
    key_scale, value_scale = _scales(key_scale, key), _scales(value_scale, value)
    with _device_of(query):
        attend_program[triton.cdiv(slots, tile.queries), batch * heads](
            query, key, value, key_scale, value_scale, first.contiguous(), last.contiguous(), output, lse,
            *map(_strides, (query, key, value, output)),
            slots, key.shape[2], factor, cap_slope,
            HEADS=heads, GROUP=heads // key.shape[1], SIZE=size, VALUE_SIZE=value_size, **_options(tile),
        )  # fmt: skip
    return output, lse


def attend_backward(
    grad: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    output: Tensor,
    lse: Tensor,
    first: Tensor,
    last: Tensor,
    selected_key: Tensor,
    selected_value: Tensor,
    selected_position: Tensor,
    *,
    scale: float,
    softcap: float | None = None,
    key_scale: Tensor | None = None,
    value_scale: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of `attend`: of the queries, and of keys and values at the selected positions.

    Arguments that `attend` has as well are the same; a gradient need not be contiguous.

    Args:
        grad: gradient of the output, `[batch, heads, slots, value_size]` in the query's type.
        query: as in `attend`.
        key: as in `attend`.
        value: as in `attend`.
        output: of `attend` or of another kernel, `[batch, heads, slots, value_size]`.
        lse: likewise, float32 `[batch, heads, slots]`.
        first: as in `attend`.
        last: as in `attend`.
        selected_key: `[batch, kv_heads, slots, size]` in the query's type: the keys at the selected positions.
        selected_value: `[batch, kv_heads, slots, value_size]`, likewise.
        selected_position: int32 `[batch, slots]`, where these keys stand; -1 in a filler, whose gradients are 0.
        scale: as in `attend`.
        softcap: as in `attend`.
        key_scale: as in `attend`.
        value_scale: as in `attend`.

    Returns:
        Gradients of `query`, `selected_key` and `selected_value`, in their shapes, types and layouts.

    Raises:
        ValueError: `takes_heads` says no.
    """
    factors: dict[str, Any] = {"scale": scale, "softcap": softcap}
    grad = _rows(grad)
    prepared = prepare(grad, output, lse, first, last, tile_of("key_gradients", query, value).queries)
    grad_query = query_gradient(
        grad, query, key, value, first, last, prepared, key_scale=key_scale, value_scale=value_scale, **factors
    )
    grad_key, grad_value = key_gradients(
        grad, query, selected_key, selected_value, selected_position, first, last, prepared, **factors
    )
    return grad_query, grad_key, grad_value


@dataclass(frozen=True)
class Prepared:
    """What both gradient kernels read.

    Attributes:
        shift: log-sum-exp over log 2, infinite where a slot sees no key, float32 `[batch, heads, padded]` with the
            slots of whole tiles.
        delta: sum of gradient times output, likewise.
        bounds: int32 `[batch, 4, tiles]`, what tiles of queries see; see `prepare_program`.
    """

    shift: Tensor
    delta: Tensor
    bounds: Tensor


def prepare(grad: Tensor, output: Tensor, lse: Tensor, first: Tensor, last: Tensor, queries: int) -> Prepared:
    """The first step of `attend_backward`, with tiles of so many queries."""
    batch, heads, slots, value_size = grad.shape
    tiles = triton.cdiv(slots, queries)
    shift, delta = lse.new_empty(2, batch, heads, tiles * queries)
    bounds = first.new_empty(batch, 4, tiles)
    output = _rows(output)
    with _device_of(grad):
        prepare_program[tiles, batch * heads](
            grad, output, lse.contiguous(), first.contiguous(), last.contiguous(), shift, delta, bounds,
            _strides(grad), _strides(output), slots, HEADS=heads, VALUE_SIZE=value_size, QUERIES=queries,
        )  # fmt: skip
    return Prepared(shift, delta, bounds)


def query_gradient(
    grad: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    first: Tensor,
    last: Tensor,
    prepared: Prepared,
    *,
    scale: float,
    softcap: float | None = None,
    key_scale: Tensor | None = None,
    value_scale: Tensor | None = None,
) -> Tensor:
    """The part of `attend_backward` that reads all keys."""
    batch, heads, slots, size = query.shape
    grad_query = torch.empty_like(query)
    tile = tile_of("query_gradient", query, value)
    factor, cap_slope = _score_factors(scale, softcap)
    query, key, value, target = _rows(query), _rows(key), _rows(value), _rows(grad_query)
    key_scale, value_scale = _scales(key_scale, key), _scales(value_scale, value)
    with _device_of(query):
        query_gradient_program[triton.cdiv(slots, tile.queries), batch * heads](
            grad, query, key, value, key_scale, value_scale, first.contiguous(), last.contiguous(),
            prepared.shift, prepared.delta, target, *map(_strides, (grad, query, key, value, target)),
            slots, prepared.shift.shape[-1], key.shape[2], scale, factor, cap_slope,
            HEADS=heads, GROUP=heads // key.shape[1], SIZE=size, VALUE_SIZE=value.shape[-1], **_options(tile),
        )  # fmt: skip
    return target


def key_gradients(
    grad: Tensor,
    query: Tensor,
    selected_key: Tensor,
    selected_value: Tensor,
    selected_position: Tensor,
    first: Tensor,
    last: Tensor,
    prepared: Prepared,
    *,
    scale: float,
    softcap: float | None = None,
) -> tuple[Tensor, Tensor]:
    """The part of `attend_backward` that reads selected keys only; `prepared` with tiles of this kernel's queries."""
    batch, kv_heads, slots, size = selected_key.shape
    tile = tile_of("key_gradients", query, selected_value)
    assert prepared.shift.shape[-1] == triton.cdiv(slots, tile.queries) * tile.queries
    factor, cap_slope = _score_factors(scale, softcap)
    query, selected_key, selected_value = _rows(query), _rows(selected_key), _rows(selected_value)
    grad_key, grad_value = torch.empty_like(selected_key), torch.empty_like(selected_value)
    with _device_of(query):
        key_gradient_program[triton.cdiv(slots, tile.keys), batch * kv_heads](
            grad, query, selected_key, selected_value, selected_position.contiguous(),
            first.contiguous(), last.contiguous(), prepared.shift, prepared.delta, prepared.bounds,
            grad_key, grad_value,
            *map(_strides, (grad, query, selected_key, selected_value, grad_key, grad_value)),
            slots, scale, factor, cap_slope,
            KV_HEADS=kv_heads, GROUP=query.shape[1] // kv_heads, SIZE=size, VALUE_SIZE=selected_value.shape[-1],
            **_options(tile),
        )  # fmt: skip
    return grad_key, grad_value


def takes_heads(*sizes: int) -> bool:
    """Whether the kernels take heads whose queries and values have these sizes."""
    return all(size % SIZE_STEP == 0 and size <= LARGEST_SIZE for size in sizes)


def tile_of(kernel: str, query: Tensor, value: Tensor) -> Tile:
    """The kernel's tile for these heads.

    Raises:
        ValueError: the kernels do not take their size.
    """
    sizes = query.shape[-1], value.shape[-1]
    if not takes_heads(*sizes):
        raise ValueError(
            f"the replay's attention kernels take heads of multiples of {SIZE_STEP} up to {LARGEST_SIZE}, "
            f"not of {' and '.join(map(str, sizes))}"
        )
    return FLOAT32_TILE if query.dtype == torch.float32 else TILES[kernel, max(64, triton.next_power_of_2(max(sizes)))]


def _options(tile: Tile) -> dict[str, int]:
    return {"QUERIES": tile.queries, "KEYS": tile.keys, "num_warps": tile.warps, "num_stages": tile.stages}


def _score_factors(scale: float, softcap: float | None) -> tuple[float, float | None]:
    """The factor of the kernels' scores, in units of log 2, and what a product is multiplied by before its tanh."""
    return (scale * math.log2(math.e), None) if softcap is None else (softcap * math.log2(math.e), scale / softcap)


def _rows(tensor: Tensor) -> Tensor:
    """The tensor with contiguous rows, which a gradient may lack (that of a sum is expanded)."""
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()


def _scales(scales: Tensor | None, levels: Tensor) -> Tensor | None:
    assert (scales is None) == (levels.dtype != torch.int8)
    return None if scales is None else scales.contiguous()


def _strides(tensor: Tensor) -> tuple[int, ...]:
    return tensor.stride()[:3]


def _device_of(tensor: Tensor) -> contextlib.AbstractContextManager[Any]:
    """Triton launches on the current device."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else contextlib.nullcontext()
