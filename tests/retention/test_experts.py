"""Retained experts: the gradients of recomputed ones, and no grouped product in the replay."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import framework
from framework.models.products import matrix_products
from framework.retention import blocks_of
from framework.retention.experts import KnownGrouped
from framework.retention.linears import expert_paths

FAMILIES = ["qwen3_moe", "mixtral", "deepseek_v3", "gpt_oss"]


class Grouped(TorchDispatchMode):
    """Counts grouped products."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func is torch.ops.aten._grouped_mm.default
        return func(*args, **(kwargs or {}))


def build(families, family, experts="grouped_mm"):
    model = families.build(family, dtype=torch.float32)
    model.set_experts_implementation(experts)
    return model


def test_a_known_product_has_the_gradients_of_the_product():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(10, 8, generator=generator, requires_grad=True)
    weight = torch.randn(3, 16, 8, generator=generator, requires_grad=True)
    ends = torch.tensor([4, 4, 10], dtype=torch.int32)
    product = torch._grouped_mm(x, weight.transpose(-2, -1), offs=ends)
    grad = torch.randn(product.shape, generator=generator)
    want = torch.autograd.grad(product, (x, weight), grad)
    known = KnownGrouped.apply([product.detach().clone()], ends, x, weight.transpose(-2, -1))
    got = torch.autograd.grad(known, (x, weight), grad)
    for mine, theirs in zip(got, want, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_gradients_are_those_of_the_reference(families, steps, family):
    inputs = families.sample_inputs(build(families, family))
    eager = build(families, family, "eager")
    chosen = steps.positions(eager, inputs)
    want_loss, want = steps.reference(eager, inputs, chosen)
    for retain_linears in (False, True, ["experts.gate_up_proj"], ["experts.down_proj", "o_proj"]):
        model = build(families, family)
        loss, got, fallbacks = steps.selective(model, inputs, chosen, retain_linears=retain_linears)
        assert not fallbacks
        torch.testing.assert_close(loss, want_loss, rtol=1e-5, atol=0)
        assert steps.worst_error(got, want) < 1e-4


@pytest.mark.parametrize("family", FAMILIES)
def test_a_replay_has_no_grouped_product_of_retained_experts(families, steps, family):
    model = build(families, family)
    inputs = families.sample_inputs(model)
    chosen = steps.positions(model, inputs)
    layers = sum(bool(expert_paths(block)) for block in blocks_of(model).values())
    counts = []
    for retain_linears in (False, True, ["gate_up_proj"], ["o_proj"]):
        framework.enable_token_selection(model, retain_linears=retain_linears)
        for counted in (False, True):
            # The first pass tries the blocks.
            with framework.fixed_selection(model, chosen):
                loss = model(**inputs).loss
            with Grouped() as seen:
                loss.backward()
            if counted:
                counts.append(seen.count)
        framework.disable_token_selection(model)
    # Two gradients of two products each.
    assert layers > 0 and counts == [layers * each for each in (6, 4, 5, 6)]
    assert not any(type(module).__name__.startswith("Retaining") for module in model.modules())


def test_a_row_goes_to_the_experts_that_it_was_recorded_with(families, steps, monkeypatch):
    """A router that decides otherwise in the replay, by rounding, does not change which products are meant."""
    model = build(families, "qwen3_moe")
    inputs = families.sample_inputs(model)
    chosen = steps.positions(model, inputs)
    _, want, _ = steps.selective(model, inputs, chosen)
    plain = type(model.model.layers[0].mlp.gate).forward

    def forward(self, hidden_states):
        logits, weights, experts = plain(self, hidden_states)
        return logits, weights, experts if len(hidden_states) > chosen.numel() else (experts + 1) % self.num_experts

    monkeypatch.setattr(type(model.model.layers[0].mlp.gate), "forward", forward)
    state = framework.enable_token_selection(model)
    # Its trial would find the same difference.
    state.retention._tried.update(state.retention.blocks)
    with framework.fixed_selection(model, chosen):
        model(**inputs).loss.backward()
    framework.disable_token_selection(model)
    assert steps.worst_error(steps.collect(model), want) < 1e-5


def test_experts_are_counted_where_they_can_be_retained(families):
    for experts, paths in (("eager", []), ("grouped_mm", ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"])):
        model = build(families, "qwen3_moe", experts)
        (first, *_) = matrix_products(model, blocks_of(model)).blocks
        found = [layer for layer in first.linears if "experts" in layer.path]
        assert [layer.path for layer in found] == paths
        sizes = model.config.hidden_size, model.config.moe_intermediate_size, model.config.num_experts_per_tok
        if found:
            hidden, width, chosen = sizes
            assert found[0][1:] == (hidden, chosen * 2 * width) and found[1][1:] == (width, chosen * hidden)
