"""The gradient check of families: it passes where it should, and would notice if it should not."""

from __future__ import annotations

import json

import check_families
import families
import pytest
import torch
from check_families import NoFloat32, check, draw_positions, total_error, worst_error


def test_an_exact_family_passes():
    result = check("llama")
    assert (result.blocks, result.fallen_back, result.failure) == (2, {}, None)
    assert max(result.error, result.error_retained, result.error_as_is) < 1e-14
    assert 1e-4 < result.error_int8 < 0.02  # rounded, and seen to be
    assert result.same_parameters
    assert result.passed


def test_float32_parts_are_set_apart():
    result = check("gemma3")
    assert result.model_type == "gemma3_text"
    assert max(result.error, result.error_retained) < 1e-14
    assert 1e-9 < result.error_as_is < 1e-6
    assert result.passed


def test_a_family_that_falls_back_says_why():
    result = check("mamba")
    assert result.blocks == 0
    assert len(result.fallen_back) == 2
    assert result.passed


def test_a_wrong_gradient_is_noticed(monkeypatch):
    """Rows outside the selection that are cut at the wrong place: the reference of a shifted selection."""
    right = check_families.reference_gradients
    monkeypatch.setattr(
        check_families, "reference_gradients", lambda model, mask, names: right(model, mask.roll(1, dims=1), names)
    )
    result = check("llama")
    assert result.error > 1e-3
    assert not result.passed


def test_errors_are_per_tensor_and_in_total():
    wanted = {"large": torch.tensor([3.0, -4.0]), "small": torch.tensor([1e-3, 0.0]), "zero": torch.zeros(2)}
    found = {"large": torch.tensor([3.0, -4.0]), "small": torch.tensor([2e-3, 0.0]), "zero": torch.tensor([4e-10, 0])}
    assert worst_error(found, wanted) == pytest.approx(1.0)
    assert total_error(found, wanted) == pytest.approx(1e-3 / 5, rel=1e-4)
    assert worst_error(wanted, wanted) == total_error(wanted, wanted) == 0


def test_no_float32_holds_in_backward_passes():
    x = torch.full((4,), 1 / 3, dtype=torch.float64, requires_grad=True)
    with NoFloat32():
        y = x.float()
        assert y.dtype == torch.float64
        assert torch.softmax(x, 0, dtype=torch.float32).dtype == torch.float64
        (y * y).sum().backward()
    assert torch.equal(x.grad, 2 * x.detach())


def test_positions_are_sorted_distinct_and_hold_the_pooled_token():
    positions = draw_positions(batch=3, tokens=20, selected=8)
    assert positions.shape == (3, 8)
    assert (positions.diff(dim=1) > 0).all()
    assert (positions[:, 0] == 0).all()
    assert positions.max() < 20


def test_command_reports_a_failing_family_and_goes_on(tmp_path, capsys):
    output = tmp_path / "families.json"
    assert check_families.main(["no_such_family", "gpt2", "--dtype", "float32", "--json", str(output)]) == 1
    rows = json.loads(output.read_text())["rows"]
    assert [(row["model_type"], row["passed"]) for row in rows] == [("no_such_family", False), ("gpt2", True)]
    assert "transformers knows no 'no_such_family'" in rows[0]["failure"]
    assert "gpt2" in capsys.readouterr().out
    assert check_families.main(["opt"]) == 0


def test_models_that_no_list_names_are_built_by_their_kind():
    assert type(families.build("olmo3")).__name__ == "Olmo3ForCausalLM"
    assert type(families.build("distilbert")).__name__ == "DistilBertForMaskedLM"
    assert type(families.build("llama", task="sequence_classification")).__name__ == "LlamaForSequenceClassification"
    with pytest.raises(ValueError, match="is none of causal_lm"):
        families.build("sam")


def test_inputs_follow_the_model():
    inputs = families.sample_inputs(families.build("llama"), batch=2, tokens=12, padding=3)
    assert inputs["attention_mask"].tolist() == [[1] * 12, [1] * 9 + [0] * 3]
    assert (inputs["labels"][1, 9:] == -100).all()
    assert (inputs["labels"] != -100).any()
    assert "attention_mask" not in families.sample_inputs(families.build("llama"), padding=0)
    image = families.sample_inputs(families.build("vit"))
    assert image["pixel_values"].shape == (2, 3, 20, 20)
    assert image["labels"].shape == (2,)
