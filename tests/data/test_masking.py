"""Which tokens are hidden, and how: to exact counts, shares and places."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoTokenizer

from framework.data import TokenCache, dataset, hold_out, language_collate, load_dataset
from framework.data.masking import Masking, collate_masked, maskable
from framework.errors import UserError

MASK, PAD, CLS, SEP = 3, 0, 1, 2


@pytest.fixture
def tokenizer(encoder_tokenizer_path: Path) -> Any:
    return AutoTokenizer.from_pretrained(encoder_tokenizer_path)


@pytest.fixture
def masking(tokenizer: Any) -> Masking:
    return Masking.of_tokenizer(tokenizer, probability=0.15, seed=5)


@pytest.fixture
def data(tmp_path: Path, tokenizer: Any) -> Any:
    path = tmp_path / "text.jsonl"
    path.write_text("".join(json.dumps({"text": "x" * length}) + "\n" for length in (3, 20, 11, 7, 30)))
    return load_dataset(path, tokenizer=tokenizer, sequence_length=48, format="text")


def test_special_and_ordinary_tokens(masking: Masking) -> None:
    assert masking.mask_token_id == MASK and masking.special_ids.tolist() == [0, 1, 2, 3, 4]
    assert masking.ordinary_ids.tolist() == [*range(5, 106)]


def test_the_shares_are_berts(masking: Masking) -> None:
    document = np.full(20_000, 50)
    document[::4] = SEP
    seen, labels = masking.document(document, draw=1)
    chosen = labels != -100
    assert chosen.sum() == 0.15 * 15_000
    assert not chosen[::4].any() and (labels[chosen] == 50).all() and (seen[~chosen] == document[~chosen]).all()
    masked, kept = (seen[chosen] == MASK).mean(), (seen[chosen] == 50).mean()
    # Three standard deviations of a share of 2250: .025, .019.
    assert abs(masked - 0.8) < 0.025 and abs(kept - 0.1) < 0.019
    strangers = seen[chosen & (seen != MASK) & (seen != 50)]
    assert strangers.min() >= 5 and len(np.unique(strangers)) > 50
    # Anywhere in the document alike: halves differ by less than three standard deviations.
    assert abs(chosen[:10_000].sum() - chosen[10_000:].sum()) < 3 * np.sqrt(2250)


@pytest.mark.parametrize(("tokens", "hidden"), [(1, 1), (3, 1), (9, 1), (10, 2), (20, 3), (100, 15)])
def test_a_fixed_share_and_at_least_one(masking: Masking, tokens: int, hidden: int) -> None:
    document = np.array([CLS, *[60] * tokens, SEP])
    counts = {int((masking.document(document, draw)[1] != -100).sum()) for draw in range(20)}
    assert counts == {hidden}


def test_draws_differ_and_repeat(masking: Masking, tokenizer: Any) -> None:
    document = np.arange(5, 85)
    first, again, other = (masking.document(document, draw)[1] for draw in (3, 3, 4))
    assert (first == again).all() and (first != other).any()
    seeded = Masking.of_tokenizer(tokenizer, probability=0.15, seed=6).document(document, 3)[1]
    assert (seeded != first).any()


def test_draws_are_made_of_raw_output(masking: Masking) -> None:
    # Token by token what numpy keeps the same between versions: a resumed run may not see other masks.
    for draw in range(200):
        document = np.array([CLS, *range(5, 25 + draw % 9), SEP])
        raw = np.random.Philox(np.random.SeedSequence([5, draw], spawn_key=(1,))).random_raw
        tokens = len(document) - 2
        keys = raw(tokens).tolist()
        hidden = sorted(range(tokens), key=keys.__getitem__)[: round(0.15 * tokens)]
        fates, others = raw(len(hidden)).tolist(), raw(len(hidden)).tolist()
        expected = document.copy()
        for place, fate, other in zip(hidden, fates, others, strict=True):
            if fate / 2**64 < 0.8:
                expected[1 + place] = MASK
            elif fate / 2**64 < 0.9:
                expected[1 + place] = 5 + other % 101
        seen, labels = masking.document(document, draw)
        assert seen.tolist() == expected.tolist()
        assert sorted(np.flatnonzero(labels != -100) - 1) == sorted(hidden)


def test_nothing_to_hide(masking: Masking) -> None:
    seen, labels = masking.document(np.array([CLS, SEP]), 0)
    assert seen.tolist() == [CLS, SEP] and labels.tolist() == [-100, -100]


def test_a_batch_is_masked_alike_however_it_is_split(masking: Masking, data: Any) -> None:
    collate = language_collate(48, PAD)
    whole = collate_masked(collate, masking, data, [0, 6, 2, 8])
    for row, draw in enumerate([0, 6, 2, 8]):
        alone = collate_masked(collate, masking, data, [draw])
        length = int(alone.inputs["attention_mask"].sum())
        for name in ("input_ids", "labels"):
            assert torch.equal(alone.inputs[name][0, :length], whole.inputs[name][row, :length])
    plain = collate(data, [0, 6, 2, 8])
    masked = whole.inputs["labels"] != -100
    assert torch.equal(whole.supervised, masked) and whole.supervised_tokens == int(masked.sum()) == 1 + 3 + 2 + 1
    assert torch.equal(whole.inputs["labels"][masked], plain.inputs["input_ids"][masked])
    assert torch.equal(whole.inputs["input_ids"][~masked], plain.inputs["input_ids"][~masked])


def test_documents_without_a_token_to_hide_are_dropped(tmp_path: Path, tokenizer: Any, masking: Masking) -> None:
    path = tmp_path / "text.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in ("", "abcdefghij", "<mask>", "a")))
    data = maskable(load_dataset(path, tokenizer=tokenizer, sequence_length=48, format="text"), masking, "data.train")
    assert [tokenizer.decode(sample.input_ids) for sample in data] == ["<cls>abcdefghij<sep>", "<cls>a<sep>"]
    report = data.report
    assert (report.samples, report.unsupervised, report.tokens, report.supervised_tokens) == (2, 2, 15, 3)
    path.write_text('{"text": "<mask>"}\n')
    with pytest.raises(UserError, match=r"data\.train: no document has a token that may be masked"):
        maskable(load_dataset(path, tokenizer=tokenizer, sequence_length=48, format="text"), masking, "data.train")


def test_tokens_stay_where_they_are_when_every_document_is_kept(
    tmp_path: Path, tokenizer: Any, masking: Masking, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "text.jsonl"
    records = [{"text": text} for text in ("abc", "de", "<mask>")]

    def load(count: int, **options: Any) -> Any:
        path.write_text("".join(json.dumps(record) + "\n" for record in records[:count]))
        return load_dataset(path, tokenizer=tokenizer, sequence_length=48, format="text", **options)

    cache = TokenCache(tmp_path / "cache", tokenizer)
    whole, more = load(2, cache=cache), load(3, cache=cache)
    plain = maskable(load(2), masking, "data.train")
    stored = plain.fingerprint
    monkeypatch.setattr(dataset, "sample_digest", None)
    data = maskable(whole, masking, "data.train")
    assert data.input_ids is whole.input_ids
    assert data.fingerprint == stored
    fewer = maskable(more, masking, "data.train")
    assert len(more) == 3 and fewer.fingerprint == stored
    assert fewer.input_ids.tolist() == data.input_ids.tolist() == plain.input_ids.tolist()


def test_both_sides_of_a_split_report_the_masked_share(data: Any, masking: Masking) -> None:
    whole = maskable(data, masking, "data.train")
    assert whole.supervised_lengths.tolist() == [1, 3, 2, 1, 4]
    train, held_out = hold_out(whole, 0.5)
    assert len(train) + len(held_out) == 5 and len(train) and len(held_out)
    for side in (train, held_out):
        texts = side.lengths - 2  # between the special tokens
        assert side.report.supervised_tokens == masking.counts(texts).sum()
        assert side.report.labelled_share < 0.26
    assert train.report.supervised_tokens + held_out.report.supervised_tokens == whole.report.supervised_tokens == 11


def test_a_tokenizer_without_a_mask_token_is_refused(tiny_tokenizer: Any) -> None:
    with pytest.raises(UserError, match=r"model\.tokenizer: .* has no mask token"):
        Masking.of_tokenizer(tiny_tokenizer, probability=0.15, seed=0)
