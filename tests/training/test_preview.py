import pytest

from framework.errors import UserError
from framework.training.preview import dry_run


def test_a_dry_run_counts_the_parameters_of_each_group(make_config):
    adapter = {"kind": "lora", "rank": 2, "alpha": 4.0, "target_modules": ["q_proj", "v_proj"]}
    config = make_config(
        model__adapter=adapter, optimizer__groups=[{"pattern": "lora_B", "learning_rate": 0.05, "weight_decay": 0.1}]
    )
    lines = dry_run(config).splitlines()
    assert [line for line in lines if line.startswith("optimizer")] == [
        'optimizer      "lora_B": 48 parameters, learning rate 0.05, weight decay 0.1',
        "optimizer      64 parameters, learning rate 0.01, weight decay 0",
    ]


def test_a_dry_run_refuses_a_group_that_matches_nothing(make_config):
    with pytest.raises(UserError, match=r'optimizer\.groups: "lora_A" matches no parameter'):
        dry_run(make_config(optimizer__groups=[{"pattern": "lora_A", "weight_decay": 0.0}]))


def test_a_dry_run_knows_the_length_in_epochs_or_steps(make_config):
    assert "steps          6\n" in dry_run(make_config())
    config = make_config(training__max_steps=None, training__epochs=1.5)
    assert "steps          1.5 epochs; data.train says how many steps\n" in dry_run(config)
