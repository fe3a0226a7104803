"""Strategies against closed forms and enumeration."""

import itertools

import numpy as np
import pytest
import torch

from framework.selection import Selection, documents_of, pooled_positions, select, supervised_positions


def draw(strategy, ratio, documents, supervised=None, seed=0, **options):
    documents = torch.as_tensor(documents)
    supervised = torch.zeros_like(documents, dtype=torch.bool) if supervised is None else torch.as_tensor(supervised)
    return select(strategy=strategy, ratio=ratio, supervised=supervised, documents=documents, seed=seed, **options)


def test_supervised_positions_shift_for_causal_models_only():
    labels = torch.tensor([[-100, -100, 7, 8], [-100, 5, -100, -100]])
    assert supervised_positions(labels, causal=True).tolist() == [
        [False, True, True, False],
        [True, False, False, False],
    ]
    assert supervised_positions(labels, causal=False).tolist() == (labels != -100).tolist()


def test_documents_of_padding_and_packing():
    tokens = torch.zeros(2, 4)
    padded = documents_of(tokens, torch.tensor([[1, 1, 1, 0], [0, 1, 1, 1]]), None, 10)
    assert padded.tolist() == [[10, 10, 10, -1], [-1, 11, 11, 11]]
    packed = documents_of(tokens, None, torch.tensor([[0, 1, 0, 0], [0, 1, 2, 0]]), 0)
    assert packed.tolist() == [[0, 0, 1, 2], [3, 3, 3, 4]]


def test_pooled_positions_are_where_classifiers_read():
    ids = torch.tensor([[5, 6, 7, 0], [8, 0, 9, 0], [0, 0, 0, 0]])
    assert pooled_positions("first", (2, 3)).nonzero().tolist() == [[0, 0], [1, 0]]
    assert pooled_positions("mean", (2, 3)).nonzero().tolist() == [[0, 0], [1, 0]]
    assert pooled_positions("last", (3, 4), ids, 0).nonzero().tolist() == [[0, 2], [1, 2], [2, 0]]
    assert pooled_positions("last", (3, 4), ids).nonzero().tolist() == [[0, 3], [1, 3], [2, 3]]
    assert pooled_positions("last", (2, 4)).nonzero().tolist() == [[0, 3], [1, 3]]


def test_a_selection_can_be_made_to_include_positions():
    chosen = draw("uniform", 0.5, [[0] * 4, [1] * 4, [2, 2, -1, -1]], seed=1)
    mask = torch.tensor([[True, False, False, False]] * 2 + [[False, True, False, False]])
    more = chosen.including(mask)
    assert more.mask(4).equal(chosen.mask(4) | mask)
    probability = torch.zeros(3, 4).scatter(1, more.positions, more.probability.where(more.valid, 0.0))
    assert probability.equal(more.mask(4) * torch.where(mask, 1.0, 0.5))


def test_supervised_labelled_selects_exactly_the_labelled_and_fills_ragged_rows():
    supervised = torch.tensor([[False, True, True, True, False], [False, False, False, True, False]])
    chosen = draw("supervised", "labelled", [[0] * 5, [1] * 5], supervised)
    assert chosen.mask(5).equal(supervised)
    assert chosen.positions.shape == (2, 3) and chosen.selected_tokens == 4
    assert (chosen.positions.diff(dim=1) > 0).all()
    assert chosen.probability.eq(1).all()


def test_supervised_ratio_adds_context_up_to_the_total():
    supervised = torch.zeros(1, 20, dtype=torch.bool)
    supervised[0, 15:] = True
    chosen = draw("supervised", 0.5, [[0] * 20], supervised)
    mask = chosen.mask(20)
    assert mask.sum() == 10 and mask[0, 15:].all()
    in_context = chosen.positions[0] < 15
    torch.testing.assert_close(chosen.probability[0, in_context], torch.full((5,), 5 / 15))
    below = draw("supervised", 0.1, [[0] * 20], supervised)
    assert below.mask(20).equal(supervised)


def test_uniform_counts_per_document_and_never_selects_padding():
    chosen = draw("uniform", 0.5, [[0] * 4 + [1] * 8 + [-1] * 4, [2] * 16])
    mask = chosen.mask(16)
    assert mask[0, :4].sum() == 2 and mask[0, 4:12].sum() == 4 and mask[0, 12:].sum() == 0 and mask[1].sum() == 8
    assert chosen.probability[chosen.valid].eq(0.5).all()


def test_uniform_inclusion_frequencies_match_the_stated_probability():
    draws = torch.stack([draw("uniform", 0.3, [[index] * 10]).mask(10)[0] for index in range(3000)]).double()
    assert draws.sum(1).eq(3).all()
    assert (draws.mean(0) - 0.3).abs().max() < 4 * np.sqrt(0.3 * 0.7 / 3000)


def test_bernoulli_frequencies_are_independent():
    draws = torch.stack([draw("bernoulli", 0.3, [[index] * 6]).mask(6)[0] for index in range(4000)]).double()
    assert (draws.mean(0) - 0.3).abs().max() < 4 * np.sqrt(0.3 * 0.7 / 4000)
    pairs = [(draws[:, i] * draws[:, j]).mean() for i, j in itertools.combinations(range(6), 2)]
    assert max(abs(p - 0.09) for p in pairs) < 4 * np.sqrt(0.09 / 4000)


def test_tokentune_forces_the_ends_within_the_count():
    chosen = draw("uniform", 0.3, [[0] * 20, [1] * 20], tokentune=True)
    mask = chosen.mask(20)
    assert mask[:, 0].all() and mask[:, -1].all() and mask.sum(1).eq(6).all()
    inner = (chosen.positions > 0) & (chosen.positions < 19)
    torch.testing.assert_close(chosen.probability[inner], torch.full((8,), 4 / 18))
    assert chosen.probability[~inner].eq(1).all()


def test_a_suffix_is_the_end_of_every_document_before_its_padding():
    chosen = draw("suffix", 0.3, [[0] * 10 + [-1] * 2, [1] * 5 + [2] * 7])
    assert chosen.mask(12).nonzero().tolist() == [[0, 7], [0, 8], [0, 9], [1, 3], [1, 4], [1, 10], [1, 11]]
    assert chosen.probability.eq(1).all()
    assert draw("suffix", 0.3, [[0] * 10 + [-1] * 2, [1] * 5 + [2] * 7], seed=1).mask(12).equal(chosen.mask(12))


def test_a_suffix_has_one_token_at_least_and_all_at_ratio_one():
    assert draw("suffix", 0.01, [[0, 0, 0], [1, -1, -1]]).positions.tolist() == [[2], [0]]
    assert draw("suffix", 1.0, [[0, 0, -1]]).positions.tolist() == [[0, 1]]


def test_the_draw_depends_on_seed_and_document_alone():
    rows = torch.tensor([[4] * 12, [9] * 12, [5] * 12])
    whole = draw("uniform", 0.25, rows, seed=3).mask(12)
    for row in range(3):
        assert draw("uniform", 0.25, rows[row : row + 1], seed=3).mask(12)[0].equal(whole[row])
    packed = draw("uniform", 0.25, rows.flatten()[None], seed=3).mask(36)
    assert packed.view(3, 12).equal(whole)
    assert not draw("uniform", 0.25, rows, seed=4).mask(12).equal(whole)


def test_nothing_selected_gives_one_filler():
    chosen = draw("supervised", "labelled", [[0] * 5])
    assert chosen.positions.shape == (1, 1) and not chosen.valid.any() and chosen.selected_tokens == 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"strategy": "unifrom", "ratio": 0.5}, "selection.strategy: 'unifrom'"),
        ({"strategy": "uniform", "ratio": "labelled"}, "selection.ratio: 'labelled'"),
        ({"strategy": "uniform", "ratio": 0.0}, "selection.ratio: 0.0"),
        ({"strategy": "bernoulli", "ratio": 1.5}, "selection.ratio: 1.5"),
        ({"strategy": "suffix", "ratio": "labelled"}, "selection.ratio: 'labelled'"),
        ({"strategy": "supervised", "ratio": 0.5, "tokentune": True}, "selection.tokentune"),
    ],
)
def test_meaningless_options_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        draw(options.pop("strategy"), options.pop("ratio"), [[0] * 4], **options)


def test_of_positions_refuses_unsorted_and_repeated():
    with pytest.raises(ValueError, match="sorted and distinct"):
        Selection.of_positions(torch.tensor([[1, 1]]))
    with pytest.raises(ValueError, match="sorted and distinct"):
        Selection.of_positions(torch.tensor([[2, 1]]))
