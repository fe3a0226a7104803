import pytest
import torch
from torch import nn

from framework.config import OptimizerConfig
from framework.errors import UserError
from framework.training.parameter_groups import describe_groups, parameter_groups


class Small(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(7, 4)
        self.linear = nn.Linear(4, 4)
        self.norm = nn.LayerNorm(4)
        self.head = nn.Linear(4, 7, bias=False)
        self.head.weight = self.embed.weight
        self.experts_bias = nn.Parameter(torch.zeros(2, 4))
        self.frozen = nn.Parameter(torch.zeros(3, 3), requires_grad=False)


def settings(**changes) -> OptimizerConfig:
    return OptimizerConfig.model_validate({"learning_rate": 0.01, "weight_decay": 0.1} | changes)


def grouped(model: nn.Module, **changes) -> list[tuple]:
    """For each group: pattern, names of its parameters, learning rate scale, weight decay."""
    names = {parameter: name for name, parameter in model.named_parameters()}
    return [
        (group["pattern"], [names[p] for p in group["params"]], group["learning_rate_scale"], group["weight_decay"])
        for group in parameter_groups(model, settings(**changes))
    ]


PLAIN = ["experts_bias", "linear.bias", "norm.weight", "norm.bias"]


def test_only_trainable_matrices_decay_and_a_tied_one_is_there_once():
    assert grouped(Small()) == [
        (None, ["embed.weight", "linear.weight"], 1.0, 0.1),
        (None, PLAIN, 1.0, 0.0),
    ]


def test_embeddings_can_be_spared_the_decay():
    assert grouped(Small(), decay_embeddings=False) == [
        (None, ["linear.weight"], 1.0, 0.1),
        (None, ["experts_bias", "embed.weight", *PLAIN[1:]], 1.0, 0.0),
    ]


def test_groups_of_the_config_come_first_and_the_first_match_counts():
    groups = [
        {"pattern": r"^norm\.", "weight_decay": 0.02},
        {"pattern": "linear", "learning_rate_scale": 16.0},
        {"pattern": "weight$", "learning_rate": 0.001},
    ]
    assert grouped(Small(), groups=groups) == [
        (r"^norm\.", ["norm.weight", "norm.bias"], 1.0, 0.02),
        ("linear", ["linear.weight"], 16.0, 0.1),
        ("linear", ["linear.bias"], 16.0, 0.0),
        ("weight$", ["embed.weight"], 0.1, 0.1),
        (None, ["experts_bias"], 1.0, 0.0),
    ]


def test_a_tied_parameter_is_matched_by_each_of_its_names():
    assert grouped(Small(), groups=[{"pattern": "head", "weight_decay": 0.0}])[0] == (
        "head",
        ["embed.weight"],
        1.0,
        0.0,
    )


@pytest.mark.parametrize(
    ("patterns", "message"),
    [
        (["lineer"], r'"lineer" matches no parameter; near: linear\.weight, linear\.bias'),
        (
            ["qqqq"],
            r'"qqqq" matches no parameter; there are: experts_bias, embed\.weight, head\.weight, linear\.weight',
        ),
        (["frozen"], '"frozen" matches no trained parameter; it matches frozen ones: frozen'),
        (
            ["bias", "norm.bias"],
            r'"norm.bias" matches no parameter that the groups before it \("bias"\) leave over; put',
        ),
        (["lineer", "nrm"], '(?s)"lineer" matches no.*\n.*"nrm" matches no'),
    ],
)
def test_a_pattern_without_effect_is_an_error(patterns, message):
    groups = [{"pattern": pattern, "weight_decay": 0.0} for pattern in patterns]
    with pytest.raises(UserError, match=message):
        parameter_groups(Small(), settings(groups=groups))


def test_the_description_counts_what_is_trained_alike():
    changes = {"groups": [{"pattern": "linear", "learning_rate_scale": 2.0}], "weight_decay": 0.0}
    assert describe_groups(parameter_groups(Small(), settings(**changes)), 0.01) == [
        '"linear": 20 parameters, learning rate 0.02, weight decay 0',
        "44 parameters, learning rate 0.01, weight decay 0",
    ]
    assert describe_groups(parameter_groups(Small(), settings()), 0.01) == [
        "44 parameters, learning rate 0.01, weight decay 0.1",
        "20 parameters, learning rate 0.01, weight decay 0",
    ]
