"""Retained linears: the linear's own backward, and no matrix product in the replay."""

import pytest
import torch
from torch.nn import functional
from torch.utils.flop_counter import FlopCounterMode

import framework
from framework.config import AdapterConfig
from framework.errors import UserError
from framework.linear_names import retains
from framework.models.adapters import add_adapter
from framework.models.wrapping import unwrapped
from framework.retention import blocks_of
from framework.retention.linears import KnownOutput, RetainedLinear, linear_paths
from framework.selection import Selection
from framework.training.memory import CpuMemoryTracker


@pytest.mark.parametrize("transposed", [True, False])
@pytest.mark.parametrize("frozen", [(), ("x",), ("weight", "bias"), ("bias",)])
def test_known_output_has_the_gradients_of_the_product(transposed, frozen):
    generator = torch.Generator().manual_seed(0)

    def leaf(name, *shape):
        tensor = torch.randn(*shape, generator=generator, dtype=torch.float64)
        return tensor.requires_grad_(name not in frozen)

    x, bias = leaf("x", 2, 5, 3), leaf("bias", 4)
    weight = leaf("weight", 4, 3) if transposed else leaf("weight", 3, 4)
    leaves = [t for t in (x, weight, bias) if t.requires_grad]
    product = functional.linear(x, weight if transposed else weight.T, bias)
    grad = torch.randn(product.shape, generator=generator, dtype=torch.float64)
    want = torch.autograd.grad(product, leaves, grad)
    known = KnownOutput.apply([product.detach().clone()], transposed, x, weight, bias)
    assert known.equal(product)
    got = torch.autograd.grad(known, leaves, grad)
    for mine, theirs in zip(got, want, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-13, atol=1e-13)


def matrix_flops(model, inputs, run):
    """FLOPs of linears in a training step, attention and head apart."""
    model.zero_grad()
    with FlopCounterMode(display=False) as counter:
        run(model, inputs).backward()
    counts = counter.get_flop_counts()["Global"]
    return sum(counts.get(op, 0) for op in (torch.ops.aten.mm, torch.ops.aten.addmm))


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_units_of_matrix_work(families, steps, family):
    """Ordinary 3, checkpointed 4, selective 1 + 3r, with retained linears 1 + 2r units of one forward's work."""
    model = families.build(family)
    inputs = {**families.sample_inputs(model, tokens=32, padding=0)}
    inputs["labels"] = torch.full_like(inputs["labels"], -100)
    inputs["labels"][:, 5] = 7
    head = 2 * model.config.hidden_size * model.config.vocab_size
    chosen = torch.stack([torch.arange(4, 12)] * 2)
    ratio = chosen.shape[1] / 32

    def ordinary(model, inputs):
        return framework.training.loss.exact_loss(model, inputs, 2)

    def selective(model, inputs):
        with framework.fixed_selection(model, chosen):
            return model(**inputs).loss

    heads = 3 * 2 * head  # two rows, forward and backward
    unit = (matrix_flops(model, inputs, ordinary) - heads) / 3
    measured = {}
    framework.retention.apply_checkpointing(model)
    measured["checkpoint"] = matrix_flops(model, inputs, ordinary) - heads
    model._set_gradient_checkpointing(enable=False)
    widest = ("down_proj",) if family == "llama" else ("mlp.c_proj",)
    for retain_linears in (False, True, widest):
        framework.enable_token_selection(model, retain_linears=retain_linears)
        selective(model, inputs).backward()  # blocks are tried on their first input
        measured[retain_linears] = matrix_flops(model, inputs, selective) - heads
        framework.disable_token_selection(model)
    # Non-reentrant recomputation stops after the last needed tensor: the block's last product is not repeated.
    assert 3.7 < measured["checkpoint"] / unit <= 4
    assert measured[False] / unit == pytest.approx(1 + 3 * ratio)
    assert measured[True] / unit == pytest.approx(1 + 2 * ratio)
    layers = [module for name, module in model.named_modules() if name.endswith(widest)]
    products = sum(module.weight.numel() for module in layers)
    assert measured[False] - measured[widest] == 2 * products * chosen.numel()


@pytest.mark.parametrize("names", [["down_proj"], ["self_attn.o_proj", "q_proj"], ["lora_B", "up_proj"]])
def test_some_layers_are_retained_with_the_same_gradients(families, steps, names):
    model = families.build("llama")
    if "lora_B" in names:
        settings = {"kind": "lora", "rank": 4, "alpha": 8.0}
        model = add_adapter(model, AdapterConfig(**settings), task="causal_lm").double().train()
    inputs = families.sample_inputs(unwrapped(model))
    chosen = steps.positions(model, inputs)
    _, want, _ = steps.selective(model, inputs, chosen, retain_linears=True)
    state = framework.enable_token_selection(model, retain_linears=names)
    paths = [linear_paths(block) for block in state.retention.blocks.values()]
    kept = {path for each in paths for module, path in each.items() if isinstance(module, RetainedLinear)}
    assert kept == {path for path in paths[0].values() if retains(names, path)} and 0 < len(kept) < len(paths[0])
    framework.disable_token_selection(model)
    assert not any(isinstance(module, RetainedLinear) for module in model.modules())
    _, got, _ = steps.selective(model, inputs, chosen, retain_linears=names)
    assert steps.worst_error(got, want) < 1e-12


def test_an_adapters_up_projections_are_computed_again(families, steps):
    """Retaining them, too, takes their outputs' bytes, and changes no gradient."""
    settings = {"kind": "lora", "rank": 4, "alpha": 8.0}
    model = add_adapter(families.build("llama"), AdapterConfig(**settings), task="causal_lm").double().train()
    generator = torch.Generator().manual_seed(0)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1, generator=generator)
    inputs = families.sample_inputs(unwrapped(model))
    chosen = steps.positions(model, inputs)
    kept, gradients = {}, {}
    for names in (True, ["*"]):
        model.zero_grad()
        _, gradients[names is True], _ = steps.selective(model, inputs, chosen, retain_linears=names)
        framework.enable_token_selection(model, retain_linears=names)
        with framework.fixed_selection(model, chosen):
            model(**inputs).loss.backward()  # blocks are tried on their first input
            with CpuMemoryTracker() as tracker:
                loss = model(**inputs).loss
                kept[names is True] = tracker.current
                loss.backward()
        framework.disable_token_selection(model)
    assert steps.worst_error(gradients[True], gradients[False]) < 1e-12
    outputs = sum(module.out_features for name, module in model.named_modules() if name.endswith("lora_B.default"))
    assert kept[False] - kept[True] == 8 * chosen.numel() * outputs > 0


def test_layers_have_their_names_without_an_adapter(families):
    plain = families.build("llama")
    names = [*linear_paths(blocks_of(plain)["model.layers.0"]).values()]
    assert names == [*(f"self_attn.{each}_proj" for each in "qkvo"), "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"]
    settings = {"kind": "lora", "rank": 4, "alpha": 8.0, "target_modules": ["q_proj"]}
    model = unwrapped(add_adapter(plain, AdapterConfig(**settings), task="causal_lm"))
    adapted = {*linear_paths(blocks_of(model)["model.layers.0"]).values()}
    assert adapted == {*names, "self_attn.q_proj.lora_A", "self_attn.q_proj.lora_B"}


def test_a_name_that_no_layer_has_is_refused_with_those_that_there_are(families):
    with pytest.raises(UserError) as caught:
        framework.enable_token_selection(families.build("gpt2"), retain_linears=["c_fc", "down_proj"])
    assert str(caught.value) == (
        "retention.retain_linears: no linear layer in the model's blocks is called 'down_proj'; there are c_attn, "
        "attn.c_proj, c_fc, mlp.c_proj"
    )


def test_no_row_is_spent_on_ragged_selections(families, steps):
    """Six rows of one sequence and two of the other cost eight, not twelve."""
    model = families.build("llama")
    inputs = {**families.sample_inputs(model, tokens=24, padding=0)}
    inputs["labels"] = torch.full_like(inputs["labels"], -100)
    inputs["labels"][0, 5] = 7
    mask = torch.zeros(2, 24, dtype=torch.bool)
    mask[0, [1, 2, 4, 9, 15, 20]] = True
    mask[1, [3, 23]] = True
    chosen = Selection.of_mask(mask, torch.ones(2, 24))
    head = 3 * 2 * model.config.hidden_size * model.config.vocab_size

    def selective(model, inputs):
        with framework.fixed_selection(model, chosen):
            return model(**inputs).loss

    def ordinary(model, inputs):
        return framework.training.loss.exact_loss(model, inputs, 1)

    unit = (matrix_flops(model, inputs, ordinary) - head) / 3
    framework.enable_token_selection(model)
    selective(model, inputs).backward()
    assert (matrix_flops(model, inputs, selective) - head) / unit == pytest.approx(1 + 2 * 8 / 48)
