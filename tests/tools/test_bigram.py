from __future__ import annotations

import math

import numpy as np
import pytest
from bigram import bigram_loss, discount_of

from framework.data import DataReport, TokenizedDataset


def dataset(*documents: list[int], unlabelled: int = 1) -> TokenizedDataset:
    """Documents of which all but the first `unlabelled` tokens carry labels."""
    lengths = np.array([len(document) for document in documents])
    supervised = np.concatenate([np.arange(length) >= unlabelled for length in lengths])
    return TokenizedDataset(np.concatenate(documents).astype(np.int32), supervised, lengths, DataReport())


def test_a_case_computed_by_hand() -> None:
    """Pairs: 0-1 three times, 1-0 twice, 1-2 once; 2 to 0 across documents is none.

    Discount of the pairs: one of count 1, one of count 2: 1 / (1 + 2) = 1/3. Precursors: 0 has one kind (1), 1 one (0),
    2 one (1), 3 none; three kinds of pairs; discount: three of count 1, none of count 2: 1, cut to 0.9.
    """
    train = dataset([0, 1, 0, 1, 2], [0, 1], [1, 0], unlabelled=5)
    lower = [(1 - 0.9) / 3 + 0.9 * 3 / 3 / 4] * 3 + [0.9 / 4]
    after_0 = {1: (3 - 1 / 3) / 3 + (1 / 3) / 3 * lower[1], 3: (1 / 3) / 3 * lower[3]}
    after_1 = {2: (1 - 1 / 3) / 3 + (1 / 3) * 2 / 3 * lower[2]}
    after_3 = {0: lower[0]}  # was never followed by anything
    expected = -sum(map(math.log, [after_0[1], after_1[2], after_0[3], after_3[0]])) / 4
    assert bigram_loss(train, dataset([0, 1, 2], [0, 3, 0]), 4) == pytest.approx(expected, rel=1e-12)


def test_only_supervised_tokens_of_the_evaluation_count() -> None:
    train = dataset([0, 1, 0, 1, 2], [0, 1], [1, 0])
    both, second = dataset([0, 1, 2]), dataset([0, 1, 2], unlabelled=2)
    first = dataset([0, 1])
    losses = [bigram_loss(train, each, 4) for each in (both, first, second)]
    assert losses[0] == pytest.approx((losses[1] + losses[2]) / 2, rel=1e-12)


def test_probabilities_sum_to_one() -> None:
    tokens = np.random.default_rng(0).integers(0, 9, 60).tolist()
    train = dataset(tokens[:30], tokens[30:])
    for previous in range(10):
        total = sum(math.exp(-bigram_loss(train, dataset([previous, token]), 10)) for token in range(10))
        assert total == pytest.approx(1, rel=1e-12)


def test_the_discount_stays_inside_its_bounds() -> None:
    assert discount_of(np.array([1, 1, 2, 5])) == 0.5
    assert discount_of(np.array([1, 1, 5])) == 0.9
    assert discount_of(np.array([2, 5])) == 0.1
