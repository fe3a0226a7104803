from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
import torch
from torch import Tensor

from framework.data import Batch, DataReport, JoinedDataset, Loader, TokenizedDataset, evaluation_batches
from framework.data.mixture import mixture_order
from framework.data.order import epoch_order, pack
from framework.errors import RunError

SEQUENCE = 12
PAD = 0


def make_dataset(lengths: list[int]) -> TokenizedDataset:
    """Sample s has the ids 100 s, 100 s + 1, …; the second half of each carries labels."""
    ids = np.concatenate([100 * sample + np.arange(length) for sample, length in enumerate(lengths)])
    supervised = np.concatenate([np.arange(length) >= max(1, length // 2) for length in lengths])
    return TokenizedDataset(ids.astype(np.int32), supervised, np.array(lengths), DataReport())


LENGTHS = [3, 12, 5, 2, 7, 4, 9, 3, 6, 2, 11]


SHARES = [0.5, 0.3, 0.2]


def make_mixture() -> JoinedDataset:
    """Three sources of 4, 5 and 2 samples, which have the lengths of `LENGTHS` in their order."""
    parts = [make_dataset(LENGTHS[start:end]) for start, end in ((0, 4), (4, 9), (9, 11))]
    return JoinedDataset(parts, shares=np.array(SHARES))


def make_loader(
    packing: bool = False,
    micro: int = 2,
    window: int = 4,
    seed: int = 5,
    lengths=LENGTHS,
    mixture: bool = False,
    workers: int = 0,
) -> Loader:
    return Loader(
        make_mixture() if mixture else make_dataset(lengths),
        sequence_length=SEQUENCE,
        packing=packing,
        global_batch_size=window,
        micro_batch_size=micro,
        seed=seed,
        pad_token_id=PAD,
        workers=workers,
    )


def draws(batches: list[Batch]) -> list[int]:
    """Draw indices of the documents, in order."""
    found = []
    for batch in batches:
        for row in batch.documents:
            found.extend(torch.unique_consecutive(row[row >= 0]).tolist())
    return found


def rows(batches: list[Batch]) -> list[dict[str, list]]:
    """All rows without their padding."""
    found = []
    for batch in batches:
        for row, documents in enumerate(batch.documents):
            real = documents >= 0
            found.append({name: tensor[row][real].tolist() for name, tensor in batch.inputs.items()})
            found[-1]["documents"] = documents[real].tolist()
    return found


def test_a_padded_batch_exactly() -> None:
    dataset = make_dataset([3, 9])
    first, *rest = evaluation_batches(dataset, sequence_length=10, micro_batch_size=2, pad_token_id=7)
    assert rest == []
    assert {tensor.dtype for tensor in [first.documents, *first.inputs.values()]} == {torch.int64}
    # The longest has 9 tokens; rounded up to a multiple of 8 it would be 16, over the sequence length.
    assert set(first.inputs) == {"input_ids", "labels", "attention_mask"}
    ignored = -100
    assert first.inputs["input_ids"].tolist() == [
        [100, 101, 102, 103, 104, 105, 106, 107, 108, 7],
        [0, 1, 2, 7, 7, 7, 7, 7, 7, 7],
    ]
    assert first.inputs["labels"].tolist() == [
        [ignored] * 4 + [104, 105, 106, 107, 108, ignored],
        [ignored, 1, 2] + [ignored] * 7,
    ]
    assert first.inputs["attention_mask"].tolist() == [[1] * 9 + [0], [1] * 3 + [0] * 7]
    assert first.documents.tolist() == [[1] * 9 + [-1], [0] * 3 + [-1] * 7]
    assert first.supervised_tokens == 7
    assert first.tokens == 12


def test_padding_goes_to_a_multiple_of_eight() -> None:
    batches = evaluation_batches(make_dataset([9, 3]), sequence_length=64, micro_batch_size=1, pad_token_id=PAD)
    assert [batch.documents.shape for batch in batches] == [(1, 16), (1, 8)]


def test_a_packed_batch_exactly() -> None:
    dataset = make_dataset([3, 4, 2, 5])
    (batch,) = evaluation_batches(dataset, sequence_length=9, micro_batch_size=2, pad_token_id=7, packing=True)
    assert set(batch.inputs) == {"input_ids", "labels", "position_ids"}
    ignored = -100
    assert batch.inputs["input_ids"].tolist() == [
        [0, 1, 2, 100, 101, 102, 103, 200, 201],
        [300, 301, 302, 303, 304, 7, 7, 7, 7],
    ]
    assert batch.inputs["labels"].tolist() == [
        [ignored, 1, 2, ignored, ignored, 102, 103, ignored, 201],
        [ignored, ignored, 302, 303, 304] + [ignored] * 4,
    ]
    assert batch.inputs["position_ids"].tolist() == [[0, 1, 2, 0, 1, 2, 3, 0, 1], [0, 1, 2, 3, 4, 0, 1, 2, 3]]
    assert batch.documents.tolist() == [[0] * 3 + [1] * 4 + [2] * 2, [3] * 5 + [-1] * 4]
    assert batch.supervised_tokens == 8


def test_a_padding_token_that_is_the_end_of_sequence_hides_no_end() -> None:
    dataset = TokenizedDataset(
        np.array([5, 6, 2, 5, 2], np.int32),
        np.array([False, True, True, False, True]),
        np.array([3, 2]),
        DataReport(),
    )
    (batch,) = evaluation_batches(dataset, sequence_length=8, micro_batch_size=2, pad_token_id=2)
    assert batch.inputs["labels"][:, :4].tolist() == [[-100, 6, 2, -100], [-100, 2, -100, -100]]
    assert batch.inputs["attention_mask"][:, :4].tolist() == [[1, 1, 1, 0], [1, 1, 0, 0]]


def test_pack_is_greedy_and_fits() -> None:
    def bins(*arguments) -> list[list[int]]:
        return [each.tolist() for each in pack(*arguments)]

    assert bins([5, 4, 3, 8, 1, 2], 9) == [[0, 1], [2, 5], [3, 4]]
    assert bins([9, 9, 9], 9) == [[0], [1], [2]]
    assert bins([5, 4, 8, 1], 9, np.array([7, 3, 5, 1])) == [[7, 3], [5, 1]]
    assert [each.tolist() for each in pack([5, 4, 8, 7], 9)[1:9]] == [[2], [3]]
    lengths = np.random.default_rng(0).integers(1, 41, 500)
    bins = pack(lengths, 100)
    assert sorted(place for each in bins for place in each) == list(range(500))
    assert all(lengths[each].sum() <= 100 for each in bins)
    assert lengths.sum() / (100 * len(bins)) > 0.98


def test_the_order_is_a_permutation_that_depends_on_seed_and_epoch() -> None:
    # Written down: the order may not change between versions, or a resumed run would see other samples.
    assert epoch_order(8, seed=0, epoch=0).tolist() == [0, 3, 7, 5, 1, 2, 6, 4]
    orders = {tuple(epoch_order(50, seed=seed, epoch=epoch)) for seed in (0, 1) for epoch in (0, 1)}
    assert len(orders) == 4
    assert all(sorted(order) == list(range(50)) for order in orders)


@pytest.mark.parametrize("packing", [False, True])
def test_every_epoch_draws_each_sample_once_with_its_draw_index(packing: bool) -> None:
    loader = make_loader(packing, window=1, micro=1)
    seen: Counter[int] = Counter()
    while loader.state_dict()["epoch"] < 3:
        seen.update(draws(loader.next_window()))
    assert seen == Counter(range(3 * len(LENGTHS)))


@pytest.mark.parametrize("mixture", [False, True])
@pytest.mark.parametrize("packing", [False, True])
def test_epochs_roll_over_inside_a_window(packing: bool, mixture: bool) -> None:
    """Windows of four do not divide an epoch of eleven samples; what they hold is the stream of single sequences."""
    single = make_loader(packing, window=1, micro=1, mixture=mixture)
    windows = make_loader(packing, window=4, mixture=mixture)
    for _ in range(9):
        one_by_one = [row for _ in range(4) for row in rows(single.next_window())]
        together = rows(windows.next_window())
        assert sorted(map(repr, together)) == sorted(map(repr, one_by_one))
        assert windows.state_dict() == single.state_dict()
    assert windows.state_dict()["epoch"] > 1


@pytest.mark.parametrize("mixture", [False, True])
@pytest.mark.parametrize("packing", [False, True])
def test_the_split_into_micro_batches_changes_nothing(packing: bool, mixture: bool) -> None:
    loaders = [make_loader(packing, micro=micro, mixture=mixture) for micro in (1, 2, 4)]
    for _ in range(8):
        windows = [loader.next_window() for loader in loaders]
        assert [len(window) for window in windows] == [4, 2, 1]
        assert rows(windows[0]) == rows(windows[1]) == rows(windows[2])
        assert len({sum(batch.supervised_tokens for batch in window) for window in windows}) == 1


def equal(first: list[Batch], second: list[Batch]) -> bool:
    def tensors(batches: list[Batch]) -> list[Tensor]:
        return [tensor for batch in batches for tensor in [batch.documents, *batch.inputs.values()]]

    return len(first) == len(second) and all(map(torch.equal, tensors(first), tensors(second)))


@pytest.mark.parametrize("packing", [False, True])
@pytest.mark.parametrize(
    ("window", "mixture", "workers"), [(1, False, 0), (3, False, 0), (4, False, 0), (3, True, 0), (3, True, 2)]
)
def test_resuming_at_every_step_gives_the_same_batches(packing: bool, window: int, mixture: bool, workers: int) -> None:
    """What is saved is what was taken, not what workers made ahead."""
    loader = make_loader(packing, window=window, micro=1, mixture=mixture, workers=workers)
    states, windows = [], []
    while loader.state_dict()["epoch"] < 3:
        states.append(loader.state_dict())
        windows.append(loader.next_window())
    assert states[1]["index"] == window
    for step, state in enumerate(states):
        resumed = make_loader(packing, window=window, micro=1, mixture=mixture, workers=workers)
        resumed.load_state_dict(state)
        assert resumed.state_dict() == state
        for expected in windows[step : step + 6]:
            assert equal(resumed.next_window(), expected)
        resumed.close()
    loader.close()


def test_a_loader_goes_back_after_it_has_made_batches_ahead() -> None:
    loader = make_loader(workers=2)
    first, state, second = loader.next_window(), loader.state_dict(), loader.next_window()
    loader.load_state_dict({"epoch": 0, "index": 0})
    assert equal(loader.next_window(), first)
    loader.close()
    assert loader.state_dict() == state
    assert equal(loader.next_window(), second)
    loader.close()


@pytest.mark.parametrize("mixture", [False, True])
@pytest.mark.parametrize("packing", [False, True])
@pytest.mark.parametrize("workers", [1, 3])
def test_workers_change_nothing(packing: bool, mixture: bool, workers: int) -> None:
    plain = make_loader(packing, micro=1, mixture=mixture)
    ahead = make_loader(packing, micro=1, mixture=mixture, workers=workers)
    for _ in range(12):
        assert equal(plain.next_window(), ahead.next_window())
        assert plain.state_dict() == ahead.state_dict()
    ahead.close()
    options = {"sequence_length": SEQUENCE, "micro_batch_size": 2, "pad_token_id": PAD, "packing": packing}
    dataset = make_mixture()
    evaluations = [list(evaluation_batches(dataset, **options, workers=count)) for count in (0, workers)]
    assert equal(*evaluations) and sorted(draws(evaluations[0])) == list(range(len(LENGTHS)))


@pytest.mark.parametrize("packing", [False, True])
def test_a_mixture_draws_its_shares_and_no_draw_twice(packing: bool) -> None:
    loader = make_loader(packing, window=1, micro=1, mixture=True)
    found, epochs = [], 30
    while loader.state_dict()["epoch"] < epochs:
        found.extend(draws(loader.next_window()))
    assert len(found) == len(set(found)) == epochs * len(LENGTHS)
    orders = [mixture_order([4, 5, 2], np.array(SHARES), seed=5, epoch=epoch) for epoch in range(epochs)]
    expected = np.concatenate(orders).tolist()
    if packing:
        # Bins are opened in the order of drawing and hold what fits, within an epoch.
        assert sorted(found) == sorted(expected)
    else:
        assert found == expected
    sources = np.searchsorted([4, 9, 11], np.array(found) % 11, side="right")
    assert np.bincount(sources).tolist() == [165, 99, 66]
    # Every batch holds the sample that its draw index names.
    (batch,) = make_loader(mixture=True, window=4, micro=4).next_window()
    for row, documents in enumerate(batch.documents):
        index = int(documents[0]) % 11
        length = int((documents >= 0).sum())
        assert batch.inputs["input_ids"][row, :length].tolist() == make_mixture()[index].input_ids.tolist()


def test_samples_per_sequence() -> None:
    assert make_loader().samples_per_sequence == 1
    packed = make_loader(packing=True)
    assert packed.samples_per_sequence == len(LENGTHS) / len(packed.sequences(0))


def test_pinned_batches_hold_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    pinned = []
    monkeypatch.setattr(Tensor, "pin_memory", lambda tensor: pinned.append(tensor) or tensor.clone())
    (plain,) = evaluation_batches(make_dataset([3, 9]), sequence_length=16, micro_batch_size=2, pad_token_id=PAD)
    assert pinned == []
    (batch,) = evaluation_batches(
        make_dataset([3, 9]), sequence_length=16, micro_batch_size=2, pad_token_id=PAD, pin_memory=True
    )
    assert equal([batch], [plain]) and len(pinned) == 3
    loader = Loader(
        make_dataset(LENGTHS),
        sequence_length=SEQUENCE,
        packing=False,
        global_batch_size=4,
        micro_batch_size=2,
        seed=5,
        pad_token_id=PAD,
        pin_memory=True,
    )
    assert equal(loader.next_window(), make_loader().next_window()) and len(pinned) == 9


class Torn(TokenizedDataset):
    """A data set whose sample 4 cannot be read, until it is `mended`."""

    mended = False

    def __getitem__(self, index: int):
        if index == 4 and not self.mended:
            raise OSError("truncated image")
        return super().__getitem__(index)


@pytest.mark.parametrize("packing", [False, True])
@pytest.mark.parametrize("workers", [0, 2])
def test_a_sample_that_cannot_be_read_is_named(packing: bool, workers: int) -> None:
    plain = make_dataset(LENGTHS)
    dataset = Torn(plain.input_ids, plain.supervised, plain.lengths, plain.report, name="images")
    loader = Loader(
        dataset,
        sequence_length=SEQUENCE,
        packing=packing,
        global_batch_size=2,
        micro_batch_size=1,
        seed=0,
        pad_token_id=PAD,
        workers=workers,
    )
    with pytest.raises(RunError, match=r"^sample 4 \(counted from 0\) of images cannot be read: truncated image$"):
        for _ in range(len(LENGTHS)):
            state = loader.state_dict()
            loader.next_window()
    assert loader.state_dict() == state
    dataset.mended = True
    whole = make_loader(packing, window=2, micro=1, seed=0)
    whole.load_state_dict(state)
    assert equal(loader.next_window(), whole.next_window()), "the same window, once it can be read"
    loader.close()


def test_a_state_of_other_data_is_refused() -> None:
    loader = make_loader()
    with pytest.raises(ValueError, match=r"sequence 11 of epoch 2, but an epoch has 11 sequences"):
        loader.load_state_dict({"epoch": 2, "index": 11})


def test_a_micro_batch_that_does_not_divide_the_window_is_refused() -> None:
    with pytest.raises(ValueError, match=r"training\.micro_batch_size = 3 on 1 ranks does not divide"):
        make_loader(micro=3)


def test_windows_larger_than_the_data_set_hold_several_epochs() -> None:
    (batch,) = make_loader(lengths=[3, 2], window=6, micro=6).next_window()
    assert sorted(draws([batch])) == [0, 1, 2, 3, 4, 5]


@pytest.mark.parametrize("packing", [False, True])
def test_evaluation_takes_the_first_samples_once(packing: bool) -> None:
    batches = list(
        evaluation_batches(
            make_dataset(LENGTHS),
            sequence_length=SEQUENCE,
            micro_batch_size=4,
            pad_token_id=PAD,
            packing=packing,
            max_samples=7,
        )
    )
    assert sorted(draws(batches)) == list(range(7))
    assert sum(batch.tokens for batch in batches) == sum(LENGTHS[:7])
    assert draws(batches) == draws(batches)
    if not packing:
        assert draws(batches) == [1, 6, 4, 2, 5, 0, 3]  # longest first


@pytest.mark.parametrize("packing", [False, True])
def test_ranks_share_a_window_and_the_split_changes_no_draw(packing):
    dataset = make_dataset([3, 9, 5, 7, 4, 8, 6, 2, 9, 5, 3, 7, 4])
    options = {"sequence_length": 10, "packing": packing, "global_batch_size": 4, "seed": 5, "pad_token_id": PAD}
    whole = Loader(dataset, micro_batch_size=1, **options)
    parts = [Loader(dataset, micro_batch_size=1, **options, rank=rank, ranks=2) for rank in (0, 1)]
    for _ in range(6):
        window = whole.next_window()
        split = [part.next_window() for part in parts]
        for number, batch in enumerate(window):
            torch.testing.assert_close(split[number % 2][number // 2].documents, batch.documents, rtol=0, atol=0)
        assert parts[0].state_dict() == parts[1].state_dict() == whole.state_dict()
    with pytest.raises(ValueError, match="micro_batch_size = 1 on 3 ranks does not divide"):
        Loader(dataset, micro_batch_size=1, **options, rank=0, ranks=3)


@pytest.mark.parametrize(("samples", "ranks"), [(13, 2), (13, 4), (3, 4), (8, 2)])
def test_ranks_share_an_evaluation_and_stay_in_step(samples, ranks):
    dataset = make_dataset([3 + index % 5 for index in range(samples)])
    options = {"sequence_length": 10, "micro_batch_size": 2, "pad_token_id": PAD}
    per_rank = [[*evaluation_batches(dataset, **options, rank=rank, ranks=ranks)] for rank in range(ranks)]
    assert {len(batches) for batches in per_rank} == {-(-samples // (2 * ranks))}
    counted = [batch for batches in per_rank for batch in batches if batch.counts]
    drawn = sorted(draw for batch in counted for draw in batch.documents[batch.documents >= 0].unique().tolist())
    assert drawn == [*range(samples)]
