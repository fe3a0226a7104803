"""The loss of a smoothed bigram model: what a language model must beat to have learnt more than neighbours."""

from __future__ import annotations

import numpy as np

from framework.data import TokenizedDataset


def bigram_loss(train: TokenizedDataset, evaluation: TokenizedDataset, vocab_size: int) -> float:
    """Mean loss of a bigram model on the supervised tokens of `evaluation`, in nats per token.

    Interpolated Kneser-Ney smoothing (Kneser and Ney 1995): from the count of every pair a discount is taken, and what
    that frees goes to tokens by how many different tokens they follow; from these numbers a discount is taken too, and
    goes to all tokens of the vocabulary alike. All tokens of `train` are counted, with a label or not; pairs do not
    cross documents.
    """
    pairs, counts = np.unique(_pairs(train, vocab_size, supervised_only=False), return_counts=True)
    first, second = np.divmod(pairs, vocab_size)
    followed = np.bincount(first, weights=counts, minlength=vocab_size)
    different_followers = np.bincount(first, minlength=vocab_size)
    different_precursors = np.bincount(second, minlength=vocab_size)

    kinds = (different_precursors > 0).sum()
    kept, freed = _discounted(different_precursors, len(pairs), kinds, discount_of(different_precursors))
    lower = kept + freed / vocab_size

    wanted = _pairs(evaluation, vocab_size, supervised_only=True)
    previous, token = np.divmod(wanted, vocab_size)
    place = np.minimum(np.searchsorted(pairs, wanted), len(pairs) - 1)
    seen = np.where(pairs[place] == wanted, counts[place], 0)
    kept, freed = _discounted(seen, followed[previous], different_followers[previous], discount_of(counts))
    return float(-np.log(kept + freed * lower[token]).mean())


def discount_of(counts: np.ndarray) -> float:
    """n1 / (n1 + 2 n2), n1 and n2 the numbers of counts 1 and 2 (Ney, Essen and Kneser 1994), within [0.1, 0.9]."""
    once, twice = (counts == 1).sum(), (counts == 2).sum()
    return float(np.clip(once / max(once + 2 * twice, 1), 0.1, 0.9))


def _discounted(
    counts: np.ndarray, totals: np.ndarray | int, kinds: np.ndarray, discount: float
) -> tuple[np.ndarray, np.ndarray]:
    """Shares of `counts` in `totals` after discounting, and the share that discounting all `kinds` of them freed.

    Where nothing was counted, everything is free.
    """
    nothing = np.equal(totals, 0)
    totals = np.where(nothing, 1, totals)
    return np.maximum(counts - discount, 0) / totals, np.where(nothing, 1.0, discount * kinds / totals)


def _pairs(dataset: TokenizedDataset, vocab_size: int, *, supervised_only: bool) -> np.ndarray:
    """For each token with one before it in its document: previous * vocab_size + token, int64 `[pairs]`."""
    tokens = dataset.input_ids.astype(np.int64)
    follows = dataset.supervised.copy() if supervised_only else np.ones(len(tokens), bool)
    follows[dataset.offsets[:-1]] = False
    places = np.flatnonzero(follows)
    return tokens[places - 1] * vocab_size + tokens[places]
