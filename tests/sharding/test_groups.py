import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from framework.errors import UserError
from framework.models.wrapping import unwrapped
from framework.retention.linears import retain_linears
from framework.sharding.groups import check_parameters, gathered_modules


def model(tied: bool = False) -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=16,
        hidden_size=8,
        intermediate_size=8,
        num_hidden_layers=2,
        num_attention_heads=2,
        tie_word_embeddings=tied,
    )
    return LlamaForCausalLM(config)


def check(model: nn.Module) -> None:
    inner = unwrapped(model)
    check_parameters(model, inner, gathered_modules(inner))


def test_blocks_embedding_and_head_are_gathered_apart():
    blocks = ["model.layers.0", "model.layers.1"]
    assert [*gathered_modules(model())] == [*blocks, "model.embed_tokens", "lm_head"]
    assert [*gathered_modules(model(tied=True))] == blocks


def test_a_module_that_may_be_read_without_being_called_is_gathered_with_the_model():
    adapted = get_peft_model(model(), LoraConfig(target_modules=["embed_tokens", "q_proj"]))
    assert [*gathered_modules(unwrapped(adapted))] == ["model.layers.0", "model.layers.1", "lm_head"]
    check(adapted)
    bias_elsewhere = model()
    bias_elsewhere.lm_head.bias = bias_elsewhere.bias = nn.Parameter(torch.zeros(16))
    assert [*gathered_modules(bias_elsewhere)] == ["model.layers.0", "model.layers.1", "model.embed_tokens"]


def test_a_head_that_retains_its_outputs_is_a_plain_one():
    retained = model()
    retain_linears(retained)
    assert "lm_head" in gathered_modules(retained)


def test_what_cannot_be_sharded_is_refused_by_name():
    shared, scalar, mixed = model(), model(), model()
    layers = shared.model.layers
    layers[0].mlp.up_proj.weight = layers[1].mlp.up_proj.weight
    scalar.model.layers[0].scale = nn.Parameter(torch.ones(()))
    mixed.model.layers[0].mlp.up_proj.to(torch.bfloat16)
    outside = get_peft_model(model(), LoraConfig(target_modules=["q_proj"]))
    outside.base_model.extra = nn.Parameter(torch.ones(2))
    for refused, message in (
        (shared, r"model.layers.0.mlp.up_proj.weight is shared by model.layers.0, model.layers.1$"),
        (scalar, r"model.layers.0.scale is a scalar"),
        (mixed, r"model.layers.0 trains bfloat16 and float32"),
        (outside, r"base_model.extra lies outside of LlamaForCausalLM"),
    ):
        with pytest.raises(UserError, match=message):
            check(refused)


def test_frozen_weights_may_have_other_dtypes():
    quantised = model()
    for parameter in quantised.parameters():
        parameter.requires_grad_(False)
    weight = torch.zeros(8, 8, dtype=torch.uint8)
    quantised.model.layers[0].mlp.up_proj.weight = nn.Parameter(weight, requires_grad=False)
    check(get_peft_model(quantised, LoraConfig(target_modules=["q_proj"])))
