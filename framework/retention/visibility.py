"""Which keys a query sees, where these are an interval: causal, sliding windows, packed documents, padding.

Transformers describes a mask by a function of positions and, for most kernels, fills a tensor `[batch, 1, queries,
keys]` with it. While a token-selective forward runs, models get a `Visibility` in place of that tensor, which makes of
the function what attention needs: two integers a query.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from torch._dynamo._trace_wrapped_higher_order_op import TransformGetItemToIndex
from transformers.masking_utils import (
    ALL_MASK_ATTENTION_FUNCTIONS,
    _vmap_expansion_sdpa,
    causal_mask_function,
    prepare_padding_mask,
)

ELEMENTS = 2**23
"""Elements of a mask that are looked at in one go."""

_DESCRIBING: ContextVar[bool] = ContextVar("masks_are_described", default=False)


@dataclass(frozen=True, eq=False)
class KeyRanges:
    """The keys `first … last` that each query sees, both int32 `[batch or 1, tokens]`.

    Attributes:
        first: the first key.
        last: the last one; less than `first` where a query sees none.
        causal: whether `first` is 0 and `last` the query itself, except where queries are padding.
        everything: whether all queries see all keys.
    """

    first: Tensor
    last: Tensor
    causal: bool = False
    everything: bool = False

    @classmethod
    @functools.lru_cache(maxsize=16)
    def all_keys(cls, tokens: int, device: torch.device, *, causal: bool) -> KeyRanges:
        """Every key, or with `causal` those up to the query."""
        place = torch.arange(tokens, dtype=torch.int32, device=device)[None]
        return cls(torch.zeros_like(place), place if causal else torch.full_like(place, tokens - 1), causal, not causal)


class Visibility:
    """What a mask function says, for one forward pass.

    Args:
        kernel: the attention implementation that the mask is for.
        arguments: those that transformers calls its mask function with.
    """

    def __init__(self, kernel: str, arguments: dict[str, Any]) -> None:
        self.kernel, self._arguments = kernel, arguments

    @cached_property
    def native(self) -> Any:
        """The mask that the kernel itself takes."""
        return ALL_MASK_ATTENTION_FUNCTIONS[self.kernel](**self._arguments)

    @cached_property
    def ranges(self) -> KeyRanges | None:
        """The keys of each query, or None if they are no interval."""
        asked = self._arguments
        batch, queries, keys, device = asked["batch_size"], asked["q_length"], asked["kv_length"], asked["device"]
        padding = prepare_padding_mask(asked.get("attention_mask"), keys, asked.get("kv_offset", 0))
        if padding is not None and bool(padding.all()):
            padding = None
        function = asked["mask_function"]
        if function is causal_mask_function and padding is None:
            return KeyRanges.all_keys(keys, device, causal=True)
        found = []
        key = torch.arange(keys, dtype=torch.int32, device=device)
        for part in torch.arange(queries, device=device).split(max(1, ELEMENTS // (batch * keys))):
            seen = _mask_of(function, batch, part, key, use_vmap=asked.get("use_vmap", False))
            if padding is not None:
                seen = seen & padding[:, None]
            first = torch.where(seen, key, keys).amin(-1)
            last = torch.where(seen, key, -1).amax(-1)
            found.append((first, last, seen.sum(-1) == (last - first + 1).clamp(min=0)))
        first, last, solid = (torch.cat(parts, 1) for parts in zip(*found, strict=True))
        place = key if queries == keys else key[:queries]
        plain = (first == 0) & (last == place)
        if padding is not None:
            plain |= ~padding[:, :queries]
        everything = (first == 0) & (last == keys - 1)
        is_solid, causal, whole = torch.stack([solid.all(), plain.all(), everything.all()]).tolist()
        return KeyRanges(first.int(), last.int(), causal, whole and not causal) if is_solid else None


def _mask_of(function: Callable[..., Any], batch: int, queries: Tensor, keys: Tensor, *, use_vmap: bool) -> Tensor:
    """A mask function's answers for some queries, bool `[batch, queries, keys]`."""
    rows, heads = torch.arange(batch, device=keys.device), torch.zeros(1, dtype=torch.int64, device=keys.device)
    if use_vmap:
        with TransformGetItemToIndex():
            found: Tensor = _vmap_expansion_sdpa(function)(rows, heads, queries, keys.long())
    else:
        found = function(rows[:, None, None, None], heads[:, None, None], queries[:, None], keys.long())
    return found.expand(batch, 1, len(queries), len(keys))[:, 0]


@contextlib.contextmanager
def described_masks() -> Iterator[None]:
    """Within this context the selective kernels' mask functions give a `Visibility`."""
    token = _DESCRIBING.set(True)
    try:
        yield
    finally:
        _DESCRIBING.reset(token)


def describing_mask(kernel: str) -> Callable[..., Any]:
    """The mask function for the selective attention around a kernel."""

    def mask(**arguments: Any) -> Any:
        if _DESCRIBING.get():
            return Visibility(kernel, arguments)
        return ALL_MASK_ATTENTION_FUNCTIONS[kernel](**arguments)

    return mask
