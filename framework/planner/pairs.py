"""Query-key pairs of attention over a full sequence, in closed form. Must not import torch."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from framework.models.products import Reach


class Pairs(NamedTuple):
    """Pairs of a sequence whose documents are full, but for the last one, and have their labelled tokens last.

    Attributes:
        executed: what the kernel computes for all queries.
        seen: what the mask leaves.
        labelled: those of them whose query is a labelled token.
        among_labelled: those whose key is one as well.
    """

    executed: int
    seen: float
    labelled: float
    among_labelled: float

    @classmethod
    def of(
        cls,
        reach: Reach,
        *,
        kernel: str,
        tokens: int,
        document_tokens: int | None,
        labelled_share: float,
        masked: bool = False,
    ) -> Pairs:
        """Count them; agrees with `FlopTally` and `seen_pairs` of `framework.training.flops`.

        Args:
            reach: what the mask lets a query see. Chunks are those of causal attention.
            kernel: the config's `model.attention`.
            tokens: of the sequence.
            document_tokens: of each of its documents; None for one that is not packed.
            labelled_share: labelled tokens / all tokens, in every document.
            masked: the kernel is given a mask.
        """
        length = document_tokens or tokens
        documents = [(start, min(start + length, tokens)) for start in range(0, tokens, length)]
        seen = sum(_seen(start, stop, stop - start, reach) for start, stop in documents)
        labelled = sum(_seen(start, stop, (stop - start) * labelled_share, reach) for start, stop in documents)
        ends = [(stop - (stop - start) * labelled_share, stop) for start, stop in documents]
        among = sum(_seen(start, stop, stop - start, reach) for start, stop in ends)
        executed = round(seen)
        if kernel in ("eager", "sdpa"):
            limit = min(reach.window or tokens, reach.chunk or tokens)
            triangle = kernel == "sdpa" and not masked and document_tokens is None and reach.causal and limit >= tokens
            executed = tokens * (tokens + 1) // 2 if triangle else tokens**2
        return cls(executed, seen, labelled, among)


def _seen(start: float, stop: int, queries: float, reach: Reach) -> float:
    """Keys that the last `queries` tokens of a document see, which begins at `start` of its sequence."""
    if reach.causal:
        return _causal(start, stop, reach) - _causal(start, stop - queries, reach)
    tokens = stop - start
    limit = None if reach.window is None else reach.window + 1
    # Behind a query and itself, and before it.
    behind = _triangle(tokens, limit) - _triangle(tokens - queries, limit)
    if limit is not None:
        return behind + _triangle(queries, limit) - queries
    return behind + queries * (queries - 1) / 2


def _causal(start: float, stop: float, reach: Reach) -> float:
    """Pairs of a causal document, cut at the borders of chunks."""
    tokens, chunk = stop - start, reach.chunk
    if chunk is None or (first := chunk - start % chunk) >= tokens:
        return _triangle(tokens, reach.window)
    whole, rest = divmod(tokens - first, chunk)
    parts = _triangle(first, reach.window), whole * _triangle(chunk, reach.window), _triangle(rest, reach.window)
    return sum(parts)


def _triangle(tokens: float, window: int | None) -> float:
    """Σ over i < tokens of min(i + 1, window)."""
    if window is None or tokens <= window:
        return tokens * (tokens + 1) / 2
    return window * (window + 1) / 2 + (tokens - window) * window
