"""Sizes from a config against those of the whole model."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoModelForCausalLM

from framework.errors import UserError
from framework.models.configuration import read_model_config
from framework.planner.shapes import shapes_of

SMALL = {
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 100,
}


@pytest.mark.parametrize(
    "family",
    [{"model_type": "llama"}, {"model_type": "granite", "tie_word_embeddings": True}, {"model_type": "qwen2"}],
    ids=lambda family: family["model_type"],
)
def test_elements_are_those_of_the_model(family):
    config = read_model_config(None, family | SMALL)
    shapes = shapes_of(config)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    assert shapes.parameters == sum(parameter.numel() for parameter in model.parameters())
    assert shapes.block == sum(parameter.numel() for parameter in model.model.layers[1].parameters())
    assert (shapes.norms, shapes.rest) == (2 * 48, 96 if family["model_type"] == "qwen2" else 0)
    assert (shapes.queries, shapes.keys, shapes.head) == (48, 24, 4800)
    assert shapes.adapter(4, ("q_proj", "down_proj")) == 4 * (48 + 48) + 4 * (80 + 48)
    assert config.num_hidden_layers == 3


def test_blocks_without_a_gated_mlp_are_refused():
    with pytest.raises(UserError, match="no closed form for the blocks of gpt2"):
        shapes_of(read_model_config(None, {"model_type": "gpt2", "n_embd": 48, "n_head": 4, "vocab_size": 100}))
