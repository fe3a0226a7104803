"""The config object of a model, which says what attention it runs, and which several models may share."""

import copy
import json
import re

import families
import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import PreTrainedConfig

import framework


def test_attention_changed_while_enabled_is_refused(model, inputs):
    framework.enable_token_selection(model)
    model.set_attn_implementation("eager")
    with pytest.raises(RuntimeError, match=r"'eager'.*'selective_sdpa'.*disable_token_selection"):
        model(**inputs)
    framework.disable_token_selection(model)
    model.set_attn_implementation("eager")
    framework.enable_token_selection(model)
    model(**inputs).loss.backward()


def test_attention_changed_by_a_model_over_the_same_config_is_refused(model, inputs):
    framework.enable_token_selection(model)
    other = type(model)(model.config)
    other.set_attn_implementation("sdpa")
    with pytest.raises(RuntimeError, match=r"'sdpa'.*copy.deepcopy"):
        model(**inputs)


def gradients(model, inputs):
    model.zero_grad(set_to_none=True)
    model(**inputs).loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_equal(got, want):
    assert got.keys() == want.keys()
    for name, gradient in got.items():
        torch.testing.assert_close(gradient, want[name], rtol=1e-4, atol=1e-6, msg=name)


def test_attention_changed_in_a_part_with_a_config_of_its_own_is_refused_or_harmless(model, inputs):
    model.model.config = copy.deepcopy(model.config)
    framework.enable_token_selection(model)
    want = gradients(model, inputs)
    model.model.set_attn_implementation("eager")
    try:
        got = gradients(model, inputs)
    except RuntimeError as error:
        assert re.search(r"LlamaModel.*'eager'.*disable_token_selection", str(error))
    else:  # transformers 5.17 keeps such a part's attention to the part, and its blocks as they are
        assert_equal(got, want)


@pytest.mark.parametrize("first_off", [0, 1])
@pytest.mark.parametrize("lora", [False, True])
def test_models_over_one_config_do_not_see_each_other(inputs, lora, first_off):
    first = families.build("llama")
    config = first.config
    models = [first, type(first)(config), type(first)(config)]
    for other in models[1:]:
        other.load_state_dict(first.state_dict())
    if lora:
        torch.manual_seed(0)
        adapter = LoraConfig(r=2, target_modules=["q_proj", "down_proj"], init_lora_weights=False)
        models = [get_peft_model(models[0], adapter), get_peft_model(models[1], adapter), models[2]]
    for each in models:
        each.train()
    alone = [copy.deepcopy(each) for each in models]
    draw = {"strategy": "uniform", "ratio": 0.4, "seed": 5}
    selective, plain = [], []
    for each in alone:
        plain.append(gradients(each, inputs))
        framework.enable_token_selection(each, **draw)
        selective.append(gradients(each, inputs))

    for index in (0, 1):
        framework.enable_token_selection(models[index], **draw)
        for later in models[index + 1 :]:
            assert_equal(gradients(later, inputs), plain[models.index(later)])
    assert config._attn_implementation == models[2].config._attn_implementation == "sdpa"
    assert_equal(gradients(models[0], inputs), selective[0])
    assert_equal(gradients(models[1], inputs), selective[1])
    framework.disable_token_selection(models[first_off])
    assert_equal(gradients(models[first_off], inputs), plain[first_off])
    other = 1 - first_off
    framework.enable_token_selection(models[first_off], **draw)
    framework.disable_token_selection(models[other])
    assert_equal(gradients(models[other], inputs), plain[other])
    assert_equal(gradients(models[first_off], inputs), selective[first_off])


def test_parts_share_the_models_own_config_as_before(model):
    shared = model.config
    held = {(name, key) for name, m in model.named_modules() for key, value in vars(m).items() if value is shared}
    assert len(held) > 5
    framework.enable_token_selection(model)
    own = model.config
    assert own is not shared
    found = {(name, key) for name, m in model.named_modules() for key, v in vars(m).items() if v is own}
    assert found == held
    parts = [v for m in model.modules() for v in vars(m).values() if isinstance(v, PreTrainedConfig)]
    assert all(part is own for part in parts)
    own.eos_token_id = 7
    framework.disable_token_selection(model)
    assert model.config is own and own._attn_implementation == shared._attn_implementation


def test_the_saved_config_of_an_enabled_model_is_the_plain_one(model, tmp_path):
    model.save_pretrained(tmp_path / "plain")
    framework.enable_token_selection(model)
    model.save_pretrained(tmp_path / "enabled")
    saved = [json.loads((tmp_path / name / "config.json").read_text()) for name in ("plain", "enabled")]
    assert saved[0] == saved[1]
    assert type(model).from_pretrained(tmp_path / "enabled").config._attn_implementation == "sdpa"


def test_a_model_over_an_enabled_models_config_can_be_enabled_too(model, inputs):
    other = type(model)(copy.deepcopy(model.config))
    framework.enable_token_selection(model)
    over_it = type(model)(model.config)
    over_it.load_state_dict(other.state_dict())
    want, got = gradients(other.train(), inputs), gradients(over_it.train(), inputs)
    assert_equal(got, want)
    for each in (other, over_it):
        framework.enable_token_selection(each, strategy="uniform", ratio=0.4)
    assert_equal(gradients(over_it, inputs), gradients(other, inputs))
    framework.disable_token_selection(over_it)
    assert over_it.config._attn_implementation == "sdpa"
    model(**inputs).loss.backward()
