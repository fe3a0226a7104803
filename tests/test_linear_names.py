"""Names of linear layers within a block."""

import pytest

from framework.errors import UserError
from framework.linear_names import check_names, retains, short_names

PATHS = ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj", "mlp.c_fc.lora_A")


def test_a_name_is_the_end_of_a_path():
    assert [retains(("c_proj",), path) for path in PATHS] == [False, True, False, True, False]
    assert [retains(("attn.c_proj", "lora_A"), path) for path in PATHS] == [False, True, False, False, True]
    assert not retains(("proj",), "attn.c_proj") and not retains((), "attn.c_proj")
    assert [retains(chosen, "fc1") for chosen in (True, False, ["fc1"])] == [True, False, True]


def test_all_layers_are_all_but_an_adapters_up_projections():
    assert [retains(True, path) for path in (*PATHS, "mlp.c_fc.lora_B")] == [True] * 5 + [False]
    assert all(retains(("*",), path) for path in (*PATHS, "mlp.c_fc.lora_B"))
    assert retains(("lora_B",), "mlp.c_fc.lora_B") and not retains(False, "mlp.c_fc.lora_B")


def test_the_shortest_names_that_no_other_layer_has():
    assert [*short_names(PATHS).values()] == ["c_attn", "attn.c_proj", "c_fc", "mlp.c_proj", "lora_A"]
    # The one has no name of its own, since the other ends with it.
    assert short_names(["attention.output.dense", "output.dense"]) == {
        "attention.output.dense": "attention.output.dense",
        "output.dense": "output.dense",
    }


def test_names_are_checked():
    for chosen in (True, False, (), ("c_fc", "attn.c_proj"), ("*",)):
        check_names(chosen, PATHS)
    with pytest.raises(UserError, match=r"called 'fc'; there are c_attn, attn\.c_proj, c_fc, mlp\.c_proj, lora_A$"):
        check_names(("c_fc", "fc"), PATHS)
