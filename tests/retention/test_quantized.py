"""Token-selective gradients beside layers in NF4: those of the slow reference, and no matrix product in the replay."""

import pytest
import torch

import framework
from framework.config import AdapterConfig
from framework.models.adapters import add_adapter
from framework.models.quantization import NF4Linear, quantize


def adapted(families, family="llama", dtype=torch.float64, **options):
    """A tiny model in NF4 with a LoRA that is not at its start; float64 products with matrices made in float32."""
    model = families.build(family, dtype=torch.float32)
    quantize(model)
    torch.manual_seed(3)
    settings = {"kind": "lora", "rank": 4, "alpha": 8.0, "options": options}
    model = add_adapter(model, AdapterConfig(**settings), task="causal_lm").to(dtype).train()
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator).to(dtype))
    return model


@pytest.mark.parametrize("retain_linears", [False, True])
@pytest.mark.parametrize(
    ("family", "dtype", "tolerance", "options"),
    [
        ("llama", torch.float64, 1e-10, {}),
        # Its linear layers have biases, which are trained here.
        ("qwen2", torch.float64, 1e-10, {"bias": "all"}),
        ("qwen3_moe", torch.float64, 1e-10, {}),
        ("llama", torch.float32, 1e-5, {}),
    ],
)
def test_gradients_are_those_of_the_reference(families, steps, retain_linears, family, dtype, tolerance, options):
    model = adapted(families, family, dtype, **options)
    inputs = families.sample_inputs(model.get_base_model(), padding=5)
    chosen = steps.positions(model, inputs)
    want_loss, want = steps.reference(model, inputs, chosen)
    loss, got, fallbacks = steps.selective(model, inputs, chosen, retain_linears=retain_linears)
    assert want and not fallbacks
    torch.testing.assert_close(loss, want_loss, rtol=1e-6, atol=0)
    assert steps.worst_error(got, want) < tolerance


@pytest.mark.parametrize(("retain_linears", "uses"), [(False, {3}), (True, {2}), (["o_proj", "mlp.down_proj"], {2, 3})])
def test_the_replay_of_retained_linears_needs_no_matrix(families, steps, monkeypatch, retain_linears, uses):
    """A matrix is made in the record pass and for the input's gradient, and in the replay only where it multiplies."""
    model = adapted(families)
    inputs = families.sample_inputs(model.get_base_model())
    chosen = steps.positions(model, inputs)
    framework.enable_token_selection(model, retain_linears=retain_linears)
    made, plain = [], NF4Linear.matrix

    def counted(layer, dtype):
        made.append(layer)
        return plain(layer, dtype)

    for tried in (False, True):
        # The first pass tries the blocks.
        if tried:
            monkeypatch.setattr(NF4Linear, "matrix", counted)
        with framework.fixed_selection(model, chosen):
            model(**inputs).loss.backward()
    framework.disable_token_selection(model)
    layers = [module for module in model.modules() if isinstance(module, NF4Linear)]
    # Nothing below the first block's queries, keys and values is trained.
    first = {f"model.layers.0.self_attn.{name}_proj.base_layer" for name in "qkv"}
    assert {
        made.count(layer)
        for name, layer in model.get_base_model().named_modules()
        if layer in layers and name not in first
    } == uses
    counts = {made.count(model.get_base_model().get_submodule(name)) for name in first}
    assert counts <= uses | {each - 1 for each in uses}
