"""Attention of some queries to all keys in plain torch, tile by tile of those scores that a query can see.

The backward pass multiplies three matrices for all keys (scores, the probabilities' gradient, the queries' gradient)
and two for those keys alone that want a gradient.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

QUERIES, KEYS = 128, 512
"""Rows of a tile of scores, which a core's cache holds for a few heads."""


@dataclass(frozen=True)
class _Tile:
    """Queries `queries` of one sequence, and keys `keys` that some of them see."""

    queries: slice
    keys: slice
    mask: Tensor | None
    """bool `[queries, keys]`; None if all see all."""


def _tiles(first: Tensor, last: Tensor, most_keys: int) -> Iterator[list[_Tile]]:
    """The tiles of one sequence, whose queries see the keys `first … last` `[slots]`, by tile of queries.

    Queries that see no key are left out; tiles have at most `most_keys` keys.
    """
    firsts, lasts = first.tolist(), last.tolist()
    for start in range(0, len(firsts), QUERIES):
        seeing = [slot for slot in range(start, min(start + QUERIES, len(firsts))) if firsts[slot] <= lasts[slot]]
        if not seeing:
            continue
        queries = slice(seeing[0], seeing[-1] + 1)
        low, high = min(firsts[slot] for slot in seeing), max(lasts[slot] for slot in seeing) + 1
        seen_by_all = max(firsts[queries]), min(lasts[queries]) + 1
        tiles = []
        for begin in range(low, high, most_keys):
            keys, mask = slice(begin, min(begin + most_keys, high)), None
            if keys.start < seen_by_all[0] or keys.stop > seen_by_all[1]:
                key = torch.arange(keys.start, keys.stop, device=first.device)
                mask = (key >= first[queries, None]) & (key <= last[queries, None])
            tiles.append(_Tile(queries, keys, mask))
        yield tiles


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    key_scale: Tensor | None,
    value_scale: Tensor | None,
    first: Tensor,
    last: Tensor,
    scale: float,
    softcap: float | None,
) -> tuple[Tensor, Tensor]:
    """Attention of queries that see the keys `first … last`.

    Args:
        query: `[batch, heads, slots, size]`.
        key: `[batch, kv_heads, tokens, size]`; `kv_heads` divides `heads`.
        value: `[batch, kv_heads, tokens, value_size]`.
        key_scale: float32 `[batch, kv_heads, tokens, 1]`, which integer keys are multiplied by; None for others.
        value_scale: the same for the values.
        first: int32 `[batch, slots]`.
        last: the same; less than `first` where a query sees nothing: its output is zero.
        scale: of the scores.
        softcap: `softcap * tanh(score / softcap)` in place of the scores, if given.

    Returns:
        The output `[batch, heads, slots, value_size]`, stored as `[batch, slots, heads, …]`, and the log-sum-exp of the
        scores, float32 or better, `[batch, heads, slots]`, minus infinity where nothing is seen.
    """
    batch, heads, slots, _ = query.shape
    output = query.new_zeros(batch, slots, heads, value.shape[-1]).transpose(1, 2)
    keys_of, values_of = _reader(key, key_scale, query.dtype), _reader(value, value_scale, query.dtype)
    precise = torch.promote_types(query.dtype, torch.float32)
    lse = query.new_full((batch, heads, slots), -torch.inf, dtype=precise)
    for row in range(batch):
        for (tile,) in _tiles(first[row], last[row], key.shape[2]):
            rows = query[row, :, tile.queries]
            scores, _ = _scores(rows, keys_of(row, tile.keys), tile.mask, scale, softcap)
            total = scores.logsumexp(-1, keepdim=True)
            # Queries between others may see no key; their scores are all minus infinity.
            shares = scores.sub_(total).exp_().nan_to_num_(0.0).to(query.dtype)
            found = _grouped(shares, value.shape[1]) @ values_of(row, tile.keys)
            output[row, :, tile.queries] = _ungrouped(found, heads)
            lse[row, :, tile.queries] = total[..., 0]
    return output, lse


def attend_backward(
    grad: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    key_scale: Tensor | None,
    value_scale: Tensor | None,
    output: Tensor,
    lse: Tensor,
    first: Tensor,
    last: Tensor,
    positions: Tensor,
    scale: float,
    softcap: float | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of the queries, and of the keys and values at `positions`; other keys and values are constants.

    Args:
        grad: of the output, `[batch, heads, slots, value_size]`.
        query: as for `attend`, as are the arguments that are not described here.
        key: see there.
        value: see there.
        key_scale: see there.
        value_scale: see there.
        output: that `attend` gave.
        lse: that it gave.
        first: see there.
        last: see there.
        positions: int32 `[batch, slots]`, of keys that want a gradient, increasing, then -1.
        scale: see there.
        softcap: see there.

    Returns:
        `[batch, heads, slots, size]`, `[batch, kv_heads, slots, size]`, `[batch, kv_heads, slots, value_size]`.
    """
    batch, heads, slots, _ = query.shape
    groups = key.shape[1]
    precise = lse.dtype
    grad_query = query.new_zeros(query.shape)
    grad_key = query.new_zeros(batch, groups, slots, key.shape[-1], dtype=precise)
    grad_value = query.new_zeros(batch, groups, slots, value.shape[-1], dtype=precise)
    keys_of, values_of = _reader(key, key_scale, query.dtype), _reader(value, value_scale, query.dtype)
    # Of queries that see nothing, whose shares are then zero.
    shift = lse.masked_fill(lse == -torch.inf, torch.inf)
    delta = (grad.to(precise) * output.to(precise)).sum(-1, keepdim=True)
    for row in range(batch):
        places = positions[row][positions[row] >= 0]
        for tile in itertools.chain.from_iterable(_tiles(first[row], last[row], KEYS)):
            queries, keys = tile.queries, tile.keys
            seen = keys_of(row, keys)
            scores, slope = _scores(query[row, :, queries], seen, tile.mask, scale, softcap)
            shares = scores.sub_(shift[row, :, queries, None]).exp_()
            grad_rows = _grouped(grad[row, :, queries], groups)
            through = _ungrouped(grad_rows @ values_of(row, keys).transpose(-1, -2), heads).to(precise)
            through = through.sub_(delta[row, :, queries]).mul_(shares)
            through = (through if slope is None else through.mul_(slope)).mul_(scale).to(query.dtype)
            grad_query[row, :, queries] += _ungrouped(_grouped(through, groups) @ seen, heads)
            begin, end = torch.searchsorted(places, torch.tensor([keys.start, keys.stop], dtype=places.dtype)).tolist()
            if begin == end:
                continue
            columns = places[begin:end] - keys.start
            dense = end - begin == int(columns[-1] - columns[0]) + 1
            which: slice | Tensor = slice(int(columns[0]), int(columns[-1]) + 1) if dense else columns
            wanted = _grouped(through[..., which], groups), _grouped(shares[..., which].to(grad.dtype), groups)
            grad_key[row, :, begin:end] += wanted[0].transpose(-1, -2) @ _grouped(query[row, :, queries], groups)
            grad_value[row, :, begin:end] += wanted[1].transpose(-1, -2) @ grad_rows
    return grad_query, grad_key.to(query.dtype), grad_value.to(query.dtype)


def _reader(tensor: Tensor, scale: Tensor | None, dtype: torch.dtype) -> Callable[[int, slice], Tensor]:
    """Reads keys or values of one sequence, `[kv_heads, keys, size]`."""
    if scale is None:
        return lambda row, keys: tensor[row, :, keys]
    return lambda row, keys: (tensor[row, :, keys] * scale[row, :, keys]).to(dtype)


def _scores(
    query: Tensor, key: Tensor, mask: Tensor | None, scale: float, softcap: float | None
) -> tuple[Tensor, Tensor | None]:
    """Scores `[heads, queries, keys]` in float32 or better, and with a soft cap its derivative."""
    scores = _ungrouped(_grouped(query, key.shape[0]) @ key.transpose(-1, -2), query.shape[0])
    scores = scores.to(torch.promote_types(query.dtype, torch.float32)).mul_(scale)
    slope = None
    if softcap is not None:
        capped = scores.div_(softcap).tanh_()
        slope = 1 - capped.square()
        scores = capped.mul_(softcap)
    if mask is not None:
        scores.masked_fill_(~mask, -torch.inf)
    return scores, slope


def _grouped(tensor: Tensor, groups: int) -> Tensor:
    """`[heads, queries, size]` to `[groups, heads / groups * queries, size]`: heads that share keys as one."""
    return tensor.reshape(groups, -1, tensor.shape[-1])


def _ungrouped(tensor: Tensor, heads: int) -> Tensor:
    """The inverse of `_grouped`."""
    return tensor.view(heads, -1, tensor.shape[-1])
