import copy

import pytest

from framework.data import load_dataset, load_tokenizer
from framework.errors import UserError
from framework.training.resuming import check_resumable


@pytest.fixture
def saved(make_config):
    """A manifest with its config and data, and how to compare it with a changed config."""
    adapter = {"kind": "lora", "rank": 2, "alpha": 4.0}
    config = make_config(model__adapter=adapter)
    tokenizer = load_tokenizer(config.model.tokenizer)
    data = load_dataset(config.data.train, tokenizer=tokenizer, sequence_length=32, format="completion")
    manifest = {"config": config.to_json(), "data_fingerprint": data.fingerprint}
    return manifest, lambda manifest, **changes: check_resumable(manifest, make_config(**changes), data)


def test_the_same_config_has_no_differences(saved):
    manifest, compare = saved
    assert compare(manifest) == []


def test_a_key_that_did_not_exist_when_the_checkpoint_was_saved_counts_as_its_default(saved):
    manifest, compare = saved
    older = copy.deepcopy(manifest)
    for section, key in (("optimizer", "groups"), ("training", "early_stopping"), ("checkpoint", "keep_best")):
        del older["config"][section][key]
    del older["config"]["model"]["adapter"]["modules_to_save"]
    assert compare(older) == []
    assert compare(older, optimizer__decay_embeddings=False, optimizer__weight_decay=0.1) == [
        "optimizer.weight_decay: 0.0 -> 0.1",
        "optimizer.decay_embeddings: true -> false",
    ]


def test_a_key_that_exists_no_more_is_named(saved):
    manifest, compare = saved
    older = copy.deepcopy(manifest)
    older["config"]["optimizer"]["momentum"] = 0.9
    assert compare(older) == ["optimizer.momentum: 0.9 -> (absent)"]


def test_how_long_a_run_is_and_how_it_is_watched_is_no_remark_but_when_it_ends_early_is(saved):
    manifest, compare = saved
    changes = {"training__eval_every_steps": 2, "training__max_steps": 9, "checkpoint__keep_best": 3}
    assert compare(manifest, **changes, training__early_stopping={"patience": 2}) == [
        "training.eval_every_steps: 0 -> 2",
        'training.early_stopping: null -> {"patience": 2, "min_delta": 0.0, "metric": "loss"}',
    ]


def test_another_model_or_precision_is_refused_with_all_differences(saved):
    manifest, compare = saved
    with pytest.raises(
        UserError, match=r"(?s)model\.adapter\.rank: 2 -> 4.*optimizer\.precision: \"fp32\" -> \"fp16\""
    ):
        compare(manifest, model__adapter={"kind": "lora", "rank": 4, "alpha": 4.0}, optimizer__precision="fp16")
