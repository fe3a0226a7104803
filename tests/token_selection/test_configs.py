"""The config object of a model, which says what attention it runs, and which several models may share."""

import copy
import importlib.util
import sys
from pathlib import Path

import pytest

import framework

spec = importlib.util.spec_from_file_location("families", Path(__file__).parents[2] / "tools" / "families.py")
families = sys.modules.setdefault("families", importlib.util.module_from_spec(spec))
spec.loader.exec_module(families)


@pytest.fixture
def model():
    return families.build("llama")


@pytest.fixture
def inputs(model):
    return families.sample_inputs(model)


def test_attention_changed_while_enabled_is_refused(model, inputs):
    framework.enable_token_selection(model)
    model.set_attn_implementation("eager")
    with pytest.raises(RuntimeError, match="'eager'.*'selective_sdpa'.*disable_token_selection"):
        model(**inputs)
    framework.disable_token_selection(model)
    model.set_attn_implementation("eager")
    framework.enable_token_selection(model)
    model(**inputs).loss.backward()


def test_attention_changed_by_a_model_over_the_same_config_is_refused(model, inputs):
    framework.enable_token_selection(model)
    other = type(model)(model.config)
    other.set_attn_implementation("sdpa")
    with pytest.raises(RuntimeError, match="'sdpa'.*copy.deepcopy"):
        model(**inputs)


def test_attention_changed_in_a_part_with_a_config_of_its_own_is_refused(model, inputs):
    model.model.config = copy.deepcopy(model.config)
    framework.enable_token_selection(model)
    model.model.set_attn_implementation("eager")
    with pytest.raises(RuntimeError, match="LlamaModel.*'eager'.*disable_token_selection"):
        model(**inputs)
