"""Attention of selected queries in plain torch against dense attention in float64."""

import pytest
import torch
from replay_problems import KINDS, Inputs, Results, dense

from framework.retention.attention import tiled


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch):
    monkeypatch.setattr(tiled, "QUERIES", 16)
    monkeypatch.setattr(tiled, "KEYS", 32)


def check(problem, tolerance, **options):
    inputs = Inputs.draw(problem, **options)
    scale, softcap, *scales = (inputs.options[name] for name in ("scale", "softcap", "key_scale", "value_scale"))
    seen = problem.first, problem.last
    output, lse = tiled.attend(inputs.query, *inputs.matrices, *scales, *seen, scale, softcap)
    gradients = tiled.attend_backward(
        inputs.grad, inputs.query, *inputs.matrices, *scales, output, lse, *seen, problem.position, scale, softcap
    )
    errors = Results(output, lse, *gradients).errors(dense(problem, inputs))
    assert max(errors.values()) < tolerance, errors


@pytest.mark.parametrize("name", KINDS)
def test_every_kind_of_interval(name):
    check(KINDS[name], 1e-5)


@pytest.mark.parametrize("name", ["causal", "sliding window", "bidirectional"])
def test_in_double_precision(name):
    check(KINDS[name], 1e-12, dtype=torch.float64)


def test_grouped_heads_soft_cap_and_values_of_another_size():
    check(KINDS["packed documents"], 1e-5, heads=6, kv_heads=2, size=24, value_size=16, softcap=2.0)


def test_keys_and_values_of_8_bits_are_read_as_they_are():
    check(KINDS["fillers"], 1e-5, heads=4, kv_heads=2, int8=True)


def test_bfloat16():
    check(KINDS["causal"], 1e-2, heads=4, kv_heads=2, dtype=torch.bfloat16)
