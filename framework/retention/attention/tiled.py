"""Attention of some queries to all keys in plain torch, tile by tile of those scores that a query can see.

The backward pass multiplies three matrices for all keys (scores, the probabilities' gradient, the queries' gradient)
and two for those keys alone that want a gradient. Those keys and the others are two sets of tiles: of either set a
query sees one interval, and no column of a tile is picked out.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

QUERIES, KEYS = 64, 512
"""Rows of a tile of scores, which a core's cache holds for a few heads."""


@dataclass(frozen=True)
class _Tile:
    """Queries `queries` of one sequence, and keys `keys` that some of them see."""

    queries: slice
    keys: slice
    mask: Tensor | None
    """bool `[queries, keys]`; None if all see all."""


def _tiles(first: Tensor, last: Tensor) -> Iterator[list[_Tile]]:
    """The tiles of one sequence, whose queries see the keys `first … last` `[slots]`, by queries.

    Queries that see no key are left out.
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
        for begin in range(low, high, KEYS):
            keys, mask = slice(begin, min(begin + KEYS, high)), None
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
    precise = torch.promote_types(query.dtype, torch.float32)
    lse = query.new_full((batch, heads, slots), -torch.inf, dtype=precise)
    for row in range(batch):
        keys, values = _read(key, key_scale, row, precise), _read(value, value_scale, row, precise)
        for tiles in _tiles(first[row], last[row]):
            queries = tiles[0].queries
            rows = _grouped(query[row, :, queries].to(precise), keys.shape[0])
            # Lowest, not infinite: queries between others may see no key, and infinities have no difference.
            top = rows.new_full((*rows.shape[:2], 1), torch.finfo(precise).min)
            total = torch.zeros_like(top)
            found = rows.new_zeros(*rows.shape[:2], values.shape[-1])
            for tile in tiles:
                scores, _ = _scores(total.new_zeros(()), rows, keys[:, tile.keys], tile.mask, scale, softcap)
                raised = torch.maximum(top, scores.amax(-1, keepdim=True))
                shares, shrunk = scores.sub_(raised).exp_(), (top - raised).exp_()
                total.mul_(shrunk).add_(shares.sum(-1, keepdim=True))
                found.mul_(shrunk).baddbmm_(shares, values[:, tile.keys])
                top = raised
            output[row, :, queries] = _ungrouped(found / total.where(total > 0, 1), heads).to(query.dtype)
            lse[row, :, queries] = _ungrouped(top + total.log(), heads)[..., 0]
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
    grad_query = query.new_zeros(query.shape, dtype=precise)
    grad_key = query.new_zeros(batch, groups, slots, key.shape[-1], dtype=precise)
    grad_value = query.new_zeros(batch, groups, slots, value.shape[-1], dtype=precise)
    first, last = first.long(), last.long()
    # Queries that see nothing have shares of zero.
    shift = lse.masked_fill(lse == -torch.inf, torch.inf).neg_()[..., None]
    delta = (grad.to(precise) * output.to(precise)).sum(-1, keepdim=True).neg_()
    for row in range(batch):
        keys, values = _read(key, key_scale, row, precise), _read(value, value_scale, row, precise)
        wanted = positions[row][positions[row] >= 0].long()
        constant = torch.ones(keys.shape[1], dtype=torch.bool).index_fill_(0, wanted, False).nonzero()[:, 0]
        for places in (wanted, constant):
            some_keys, some_values = keys[:, places], values[:, places]
            seen = torch.searchsorted(places, first[row]), torch.searchsorted(places, last[row], right=True) - 1
            for tiles in _tiles(*seen):
                queries = tiles[0].queries
                rows, grad_rows = (_grouped(tensor[row, :, queries].to(precise), groups) for tensor in (query, grad))
                less, through_output = (_grouped(tensor[row, :, queries], groups) for tensor in (shift, delta))
                found = torch.zeros_like(rows)
                for tile in tiles:
                    tile_keys, tile_values = some_keys[:, tile.keys], some_values[:, tile.keys]
                    scores, slope = _scores(less, rows, tile_keys, tile.mask, scale, softcap)
                    shares = scores.exp_()
                    through = torch.baddbmm(through_output, grad_rows, tile_values.mT).mul_(shares)
                    through = through if slope is None else through.mul_(slope)
                    found.baddbmm_(through, tile_keys, alpha=scale)
                    if places is wanted:
                        grad_key[row, :, tile.keys].baddbmm_(through.mT, rows, alpha=scale)
                        grad_value[row, :, tile.keys].baddbmm_(shares.mT, grad_rows)
                grad_query[row, :, queries] += _ungrouped(found, heads)
    return grad_query.to(query.dtype), grad_key.to(query.dtype), grad_value.to(query.dtype)


def _read(tensor: Tensor, scale: Tensor | None, row: int, dtype: torch.dtype) -> Tensor:
    """Keys or values of one sequence, `[kv_heads, tokens, size]`."""
    return tensor[row].to(dtype) if scale is None else (tensor[row] * scale[row]).to(dtype)


def _scores(
    bias: Tensor, query: Tensor, key: Tensor, mask: Tensor | None, scale: float, softcap: float | None
) -> tuple[Tensor, Tensor | None]:
    """Scores plus a bias, and with a soft cap its derivative.

    Args:
        bias: that broadcasts.
        query: of heads that share keys as one, see `_grouped`.
        key: `[groups, keys, size]`.
        mask: bool `[queries, keys]`, or None.
        scale: of the scores.
        softcap: see `attend`.

    Returns:
        `[groups, heads / groups * queries, keys]`, minus infinity where masked, and the same or None.
    """
    if softcap is None:
        scores, slope = torch.baddbmm(bias, query, key.mT, alpha=scale), None
    else:
        capped = (query @ key.mT).mul_(scale / softcap).tanh_()
        slope = 1 - capped.square()
        scores = capped.mul_(softcap).add_(bias)
    if mask is not None:
        # Heads of a group follow one another.
        scores.unflatten(1, (-1, mask.shape[0])).masked_fill_(~mask, -torch.inf)
    return scores, slope


def _grouped(tensor: Tensor, groups: int) -> Tensor:
    """`[heads, queries, size]` to `[groups, heads / groups * queries, size]`: heads that share keys as one."""
    return tensor.reshape(groups, -1, tensor.shape[-1])


def _ungrouped(tensor: Tensor, heads: int) -> Tensor:
    """The inverse of `_grouped`."""
    return tensor.view(heads, -1, tensor.shape[-1])
