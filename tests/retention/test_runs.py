"""Rows of one run per sequence, and what comes before it."""

import torch

from framework.retention.rows import SelectedRows
from framework.retention.runs import RunRows
from framework.selection import Selection

TOKENS = 24


def selection_of(*positions):
    mask = torch.zeros(len(positions), TOKENS, dtype=torch.bool)
    for row, chosen in zip(mask, positions, strict=True):
        row[list(chosen)] = True
    return Selection.of_mask(mask, torch.ones(mask.shape))


def test_rows_of_runs():
    rows = RunRows(SelectedRows(selection_of([3, 5], [22, 23]), TOKENS, torch.device("cpu")))
    assert rows.positions.tolist() == [[3, 4, 5], [22, 23, -1]]
    assert rows.sequence.tolist() == [0, 0, 0, 1, 1] and rows.position.tolist() == [3, 4, 5, 22, 23]
    assert not rows.contiguous and rows.slots == 3
    tokens = torch.arange(2.0 * TOKENS).view(2, TOKENS)
    assert rows.by_sequence(rows.take(tokens)).tolist() == [[3, 4, 5], [46, 47, 0]]
    assert rows.from_sequences(rows.by_sequence(rows.take(tokens))).equal(rows.take(tokens))
    assert rows.take_gradient(tokens).tolist() == [[3, 0, 5, 46, 47]]
    put = torch.zeros(2, TOKENS)
    rows.put_gradient(put, torch.ones(1, 5))
    assert put.nonzero().tolist() == [[0, 3], [0, 5], [1, 22], [1, 23]]
    before = rows.before.take(tokens)
    assert before.shape == (2, 22) and before[0].tolist() == [0.0] * 19 + [0, 1, 2]
    assert before[1].tolist() == tokens[1, :22].tolist()
    assert rows.before.real.sum(1).tolist() == [3, 22]


def test_equal_runs_are_not_padded():
    rows = RunRows(SelectedRows(selection_of(range(4, 9), range(4, 9)), TOKENS, torch.device("cpu")))
    assert rows.contiguous and not rows.before.padded and rows.slots == 5
    tokens = torch.arange(2.0 * TOKENS).view(2, TOKENS)
    assert rows.before.take(tokens).equal(tokens[:, :4])
