"""Runs whose length is given in epochs."""

import json

import pytest

import framework
from framework.data import load_dataset, load_tokenizer
from framework.training.setup import make_loaders


@pytest.mark.parametrize(("epochs", "steps"), [(1, 6), (0.5, 3), (1.3, 8), (2, 12)])
def test_the_length_in_epochs(make_config, capsys, epochs, steps):
    # 48 samples of 8 a step: 1.3 epochs are 48 + 14.4 sequences, rounded up.
    config = make_config(training__max_steps=None, training__epochs=epochs)
    result = framework.train(config)
    assert result.step == steps
    assert f"training.epochs: {epochs:g} epochs are" in capsys.readouterr().out
    resolved = json.loads((result.run_dir / "config.json").read_text())["training"]
    assert (resolved["max_steps"], resolved["epochs"]) == (steps, None)


def test_the_length_in_epochs_of_packed_samples(make_config):
    config = make_config(
        training__max_steps=None, training__epochs=2, data__packing=True, training__global_batch_size=4
    )
    result = framework.train(config)
    tokenizer = load_tokenizer(config.model.tokenizer)
    data = load_dataset(config.data.train, tokenizer=tokenizer, sequence_length=32, format="completion")
    loader, _ = make_loaders(config, data, tokenizer.pad_token_id)
    windows = 0
    while loader.state_dict()["epoch"] < 2:
        loader.next_window()
        windows += 1
    assert result.step == windows < 2 * 48 / 4


def test_the_same_epochs_resume_and_more_epochs_go_on(make_config):
    result = framework.train(make_config(training__max_steps=None, training__epochs=0.5))
    assert framework.train(make_config()).train_loss is None
    longer = framework.train(make_config(training__epochs=1))
    assert (longer.step, longer.run_dir) == (6, result.run_dir)
