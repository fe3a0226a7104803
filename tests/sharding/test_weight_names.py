"""What the weights of a model are called, tied and frozen ones included."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from framework.errors import UserError
from framework.sharding.weight_names import WeightNames


class Stored:
    """Shapes by name in place of a checkpoint."""

    def __init__(self, **shapes: tuple[int, ...]) -> None:
        self.shapes = {name.replace("__", "."): shape for name, shape in shapes.items()}

    def __str__(self) -> str:
        return "somewhere"

    def names(self):
        return iter(self.shapes)

    def shape(self, name: str) -> tuple[int, ...]:
        return self.shapes[name]


def tied() -> nn.Module:
    model = nn.ModuleDict({"embedding": nn.Embedding(5, 3), "norm": nn.BatchNorm1d(3), "head": nn.Linear(3, 5)})
    model["head"].weight = model["embedding"].weight
    model["norm"].register_buffer("table", torch.zeros(4), persistent=False)
    return model


NORM = {"norm__weight": (3,), "norm__bias": (3,), "norm__running_mean": (3,), "norm__running_var": (3,)}
REST = {**NORM, "norm__num_batches_tracked": (), "head__bias": (5,)}


def test_names_shapes_and_what_is_saved():
    names = WeightNames.of(tied())
    assert names.first["head.weight"] == "embedding.weight" == names.first["embedding.weight"]
    assert names.shapes["embedding.weight"] == (5, 3) and "head.weight" not in names.shapes
    assert names.shapes["norm.table"] == (4,) and "norm.table" not in names.saved
    assert names.saved == [
        "embedding.weight",
        "norm.weight",
        "norm.bias",
        "head.bias",
        "norm.running_mean",
        "norm.running_var",
        "norm.num_batches_tracked",
    ]
    with torch.device("meta"):
        assert WeightNames.of(tied()) == names


def test_a_tensor_that_is_held_in_part_has_the_shape_that_is_said():
    names = WeightNames.of(tied(), lambda tensor: (2 * tensor.numel(),))
    assert names.shapes["head.bias"] == (10,)


@pytest.mark.parametrize("name", ["embedding__weight", "head__weight"])
def test_a_tied_weight_may_have_any_of_its_names(name: str):
    assert WeightNames.of(tied()).mismatches(Stored(**REST, **{name: (5, 3)})) == []


def test_everything_that_does_not_fit_is_named():
    stored = Stored(**{**REST, "head__bias": (6,), "stranger": (1,)})
    assert WeightNames.of(tied()).mismatches(stored) == [
        "  missing: embedding.weight",
        "  unexpected: stranger",
        "  other shape: head.bias [6] in the file, [5] in the model",
    ]
    with pytest.raises(UserError, match=r"(?s)^somewhere: these weights are not those .*\n  missing: embedding"):
        WeightNames.of(tied()).check(stored)


def test_of_many_names_the_first_are_listed():
    stored = Stored(**REST, embedding__weight=(5, 3), **{f"x{number}": (1,) for number in range(10)})
    assert WeightNames.of(tied()).mismatches(stored) == ["  unexpected: x0, x1, x2, x3, x4, x5, x6, x7, and 2 more"]
