"""Attention of some queries to all keys in plain torch, chunk by chunk of queries, each with the keys it can see.

The forward pass of a chunk is torch's own kernel. The backward pass multiplies three matrices for all keys (scores,
the probabilities' gradient, the queries' gradient) and two for those keys alone that want a gradient.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

SCORES = 2**22
"""Elements of the scores of one chunk. Measured with `tools/bench_step.py`: fewer start more kernels than they save."""

SMALLEST_CHUNK = 32
"""Queries of a chunk, even if their scores are more."""


@dataclass(frozen=True)
class _Chunk:
    """Queries `queries` of one sequence, and the keys `keys` that some of them see."""

    queries: slice
    keys: slice
    mask: Tensor | None
    """bool `[queries, keys]`; None if all see all."""


def _chunks(first: Tensor, last: Tensor, heads: int) -> Iterator[_Chunk]:
    """Cut the queries of one sequence, whose keys are `first … last` `[slots]`; those that see none are left out."""
    firsts, lasts = first.tolist(), last.tolist()
    start, slots = 0, len(firsts)
    while start < slots:
        if firsts[start] > lasts[start]:
            start += 1
            continue
        low, high, stop = firsts[start], lasts[start] + 1, start
        while stop < slots and firsts[stop] <= lasts[stop]:
            wider = min(low, firsts[stop]), max(high, lasts[stop] + 1)
            size = (stop + 1 - start) * (wider[1] - wider[0])
            if stop - start >= SMALLEST_CHUNK and heads * size > SCORES:
                break
            (low, high), stop = wider, stop + 1
        queries = slice(start, stop)
        mask = None
        if min(lasts[queries]) + 1 < high or max(firsts[queries]) > low:
            key = torch.arange(low, high, device=first.device)
            mask = (key >= first[queries, None]) & (key <= last[queries, None])
        yield _Chunk(queries, slice(low, high), mask)
        start = stop


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
        The output `[batch, heads, slots, value_size]`, and the log-sum-exp of the scores, float32 or better, `[batch,
        heads, slots]`, minus infinity where nothing is seen.
    """
    batch, heads, slots, _ = query.shape
    output = query.new_zeros(batch, heads, slots, value.shape[-1])
    keys_of, values_of = _reader(key, key_scale, query.dtype), _reader(value, value_scale, query.dtype)
    precise = torch.promote_types(query.dtype, torch.float32)
    lse = query.new_full((batch, heads, slots), -torch.inf, dtype=precise)
    for row in range(batch):
        for chunk in _chunks(first[row], last[row], heads):
            scores, _ = _scores(query[row, :, chunk.queries], keys_of(row, chunk.keys), chunk.mask, scale, softcap)
            total = scores.logsumexp(-1, keepdim=True)
            shares = scores.sub_(total).exp_().to(query.dtype)
            found = _grouped(shares, value.shape[1]) @ values_of(row, chunk.keys)
            output[row, :, chunk.queries] = _ungrouped(found, heads)
            lse[row, :, chunk.queries] = total[..., 0]
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
    grad_query = torch.zeros_like(query)
    grad_key = query.new_zeros(batch, groups, slots, key.shape[-1], dtype=precise)
    grad_value = query.new_zeros(batch, groups, slots, value.shape[-1], dtype=precise)
    keys_of, values_of = _reader(key, key_scale, query.dtype), _reader(value, value_scale, query.dtype)
    delta = (grad.to(precise) * output.to(precise)).sum(-1, keepdim=True)
    for row in range(batch):
        places = positions[row][positions[row] >= 0]
        for chunk in _chunks(first[row], last[row], heads):
            queries, keys = chunk.queries, chunk.keys
            seen = keys_of(row, keys)
            scores, slope = _scores(query[row, :, queries], seen, chunk.mask, scale, softcap)
            shares = scores.sub_(lse[row, :, queries, None]).exp_()
            grad_rows = _grouped(grad[row, :, queries], groups)
            through = _ungrouped(grad_rows @ values_of(row, keys).transpose(-1, -2), heads).to(precise)
            through = through.sub_(delta[row, :, queries]).mul_(shares)
            through = (through if slope is None else through.mul_(slope)).mul_(scale).to(query.dtype)
            grad_query[row, :, queries] = _ungrouped(_grouped(through, groups) @ seen, heads)
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
