import pytest

from framework.errors import UserError
from framework.sharding.deepspeed_config import OwnOptions
from framework.training.plan import state_bytes
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


ZERO = {"sharding__engine": "deepspeed", "hardware__gpus_per_node": 4, "training__micro_batch_size": 1}


def test_a_dry_run_describes_the_ranks_of_the_hardware_or_of_the_launch(make_config):
    config = make_config(**ZERO, sharding__zero_stage=2, optimizer__precision="fp32_master")
    text = dry_run(config)
    assert "8 sequences a step = 1 (micro-batch) x 2 (accumulation) x 4 (ranks), of up" in text
    assert "deepspeed, ZeRO stage 2, precision fp32_master: weights bfloat16 beside masters in float32, comp" in text
    assert " a rank without activations: weights 3.98 KiB, master weights 1.99 KiB, gradients 1.99 KiB, opt" in text
    assert "1 (micro-batch) x 8 (accumulation) x 1 (rank), of up" in dry_run(config, 1)


def test_a_dry_run_finds_what_contradicts_a_users_own_options(make_config):
    own = OwnOptions({"zero_optimization": {"stage": 1}, "gradient_clipping": 0.1}, "ds.json")
    with pytest.raises(
        UserError, match=r"(?s)ds\.json: 2 problems.*zero_optimization\.stage is 1.*gradient_clipping is 0\.1"
    ):
        dry_run(make_config(**ZERO), own_options=own)


GIB = 2**30


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, {"weights": 8, "gradients": 4, "optimizer state": 8}),
        ({"sharding__zero_stage": 0}, {"weights": 8, "gradients": 4, "optimizer state": 8}),
        ({"sharding__zero_stage": 1}, {"weights": 8, "master weights": 1, "gradients": 4, "optimizer state": 2}),
        ({"sharding__zero_stage": 2}, {"weights": 8, "master weights": 1, "gradients": 1, "optimizer state": 2}),
        ({"sharding__zero_stage": 3}, {"weights": 2, "master weights": 1, "gradients": 1, "optimizer state": 2}),
        (
            {"sharding__zero_stage": 1, "optimizer__precision": "fp32_master"},
            {"weights": 4, "master weights": 1, "gradients": 1, "optimizer state": 2},
        ),
        (
            {"sharding__zero_stage": 3, "optimizer__precision": "pure_bf16"},
            {"weights": 1, "master weights": 0.5, "gradients": 0.5, "optimizer state": 1},
        ),
        ({"sharding__engine": "fsdp"}, {"weights": 2, "gradients": 1, "optimizer state": 2}),
        (
            {"sharding__engine": "fsdp", "sharding__replicas": 2, "optimizer__precision": "fp32_master"},
            {"weights": 4, "gradients": 2, "optimizer state": 4},
        ),
    ],
)
def test_bytes_of_a_rank_of_four(make_config, changes, expected):
    """Of two gibi-parameters, one of them trained."""
    if "sharding__zero_stage" in changes:
        changes = ZERO | changes
    elif not changes:
        changes = {"sharding__engine": "single"}
    found = state_bytes(make_config(**changes), 2 * GIB, GIB, 4)
    assert {kind: size / GIB for kind, size in found.items()} == expected
