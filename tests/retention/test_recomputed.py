"""Keys and values that a replay computes again from the block's kept input."""

import pytest
import torch
from peft import LoraConfig, get_peft_model

import framework
from framework.training.memory import CpuMemoryTracker


@pytest.mark.parametrize("retain_linears", [False, True])
@pytest.mark.parametrize("family", ["llama", "mistral", "gpt2", "deepseek_v3", "bert", "qwen3_moe"])
def test_gradients_are_those_of_kept_keys_and_values(families, steps, family, retain_linears):
    model = families.build(family)
    inputs = families.sample_inputs(model)
    chosen = steps.positions(model, inputs)
    _, want, _ = steps.selective(model, inputs, chosen, retain_linears=retain_linears)
    _, got, fallbacks = steps.selective(model, inputs, chosen, retain_linears=retain_linears, kv_format="recompute")
    assert not fallbacks
    assert steps.worst_error(got, want) < 1e-12


def test_dropout_is_drawn_as_in_the_record_pass(families, steps):
    model = families.build("llama")
    torch.manual_seed(0)
    lora = LoraConfig(r=4, lora_dropout=0.3, target_modules="all-linear", init_lora_weights=False)
    adapted = get_peft_model(model, lora).double()
    inputs = families.sample_inputs(model)
    chosen = steps.positions(model, inputs)
    _, want, _ = steps.selective(adapted, inputs, chosen)
    _, got, fallbacks = steps.selective(adapted, inputs, chosen, kv_format="recompute")
    assert not fallbacks
    assert steps.worst_error(got, want) < 1e-12


def test_no_block_keeps_keys_and_values(families):
    """With 8 of 64 tokens selected, a block keeps its input, which is as large as full keys and values are each."""
    model = families.build("gpt2")
    inputs = {"input_ids": torch.arange(128).view(2, 64) % model.config.vocab_size}
    inputs["labels"] = inputs["input_ids"].clone()
    chosen = torch.arange(56, 64).expand(2, -1)

    def kept(kv_format):
        framework.enable_token_selection(model, retain_linears=False, kv_format=kv_format)
        with framework.fixed_selection(model, chosen):
            model(**inputs)
            with CpuMemoryTracker() as tracker:
                loss = model(**inputs).loss
                bytes_kept = tracker.current
        framework.disable_token_selection(model)
        del loss
        return bytes_kept

    row = model.config.n_embd * 8
    difference = kept("model") - kept("recompute")
    # Of each block: keys and values of 128 tokens and 16 selected inputs, against 128 inputs of which the first
    # block's is the embedding's output.
    assert difference == model.config.n_layer * (2 * 128 + 16 - 128) * row
