"""The cases are runs of the models that they name; rows say what was found."""

from __future__ import annotations

import pytest
from check_simulation import CASES, GIB, MODELS, Case, Row, line

from framework.config import Config
from framework.models.configured import configured_empty_model

PARAMETERS = {
    "Llama-2-7B": 6_738_415_616,
    "Llama-3-8B": 8_030_261_248,
    "Llama-2-13B": 13_015_864_320,
    "Qwen2.5-32B": 32_763_876_352,
    "Llama-3-70B": 70_553_706_496,
}
"""As in their published weights."""


@pytest.mark.parametrize("name", MODELS)
def test_models_have_as_many_parameters_as_published(name):
    config = Config.model_validate(Case(name, "full", "all").config())
    model = configured_empty_model(config, None)
    assert sum(parameter.numel() for parameter in model.parameters()) == PARAMETERS[name]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_cases_are_runs_of_two_micro_batches(case):
    config = Config.model_validate(case.config())
    assert config.gradient_accumulation(case.ranks) == 2
    assert config.micro_batch_size == 2


def test_a_row_is_a_line():
    row = Row(round(10.3 * GIB), 10 * GIB, "loss", 12.4, GIB // 2)
    text = line(Case("Llama-3-8B", "LoRA", "checkpoint", "FSDP2", 8), row)
    assert text == "| Llama-3-8B | LoRA | checkpoint | FSDP2 | 8 | 10.30 | 10.00 | +3.00% | loss | 12 | 0.50 |"
