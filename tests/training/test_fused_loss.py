"""Head and cross-entropy in one: the stock model's loss and gradients, without its logits."""

import copy
from contextlib import nullcontext

import families
import pytest
import torch
from check_families import NoFloat32
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import LlamaConfig, LlamaForCausalLM

import framework
from framework.models.wrapping import unwrapped
from framework.retention import output_layer_of
from framework.training import fused_loss
from framework.training.fused_loss import FusedCrossEntropy
from framework.training.loss import exact_loss
from framework.training.memory import CpuMemoryTracker

COUNT = 7.0
CHUNK = 4
"""Rows of a chunk, of 13 or 14."""


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch):
    monkeypatch.setattr(fused_loss, "CHUNK_ROWS", CHUNK)


def gradients(model, loss):
    loss.backward()
    found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad(set_to_none=True)
    return found


def stock(model, inputs):
    """transformers' own loss, from all logits."""
    return model(**inputs, num_items_in_batch=COUNT, use_cache=False).loss


def of_masked(model, inputs):
    """The same of a masked language model, whose own loss is a mean."""
    return model(**inputs).loss * ((inputs["labels"] != -100).sum() / COUNT)


def assert_same(found, wanted, tolerance=1e-12):
    """Each gradient to a part of its largest element; those that cancel to zero to a part of the largest of all."""
    assert found.keys() == wanted.keys()
    floor = 1e-3 * max(float(gradient.abs().max()) for gradient in wanted.values())
    for name, gradient in wanted.items():
        assert found[name].dtype == gradient.dtype
        error = float((found[name] - gradient).abs().max())
        assert error <= tolerance * max(float(gradient.abs().max()), floor), name


# A soft cap, two scales, a bias, tied weights, and heads whose layer comes last of several.
@pytest.mark.parametrize("family", ["llama", "gemma2", "granite", "cohere", "phi", "gpt2", "opt", "mixtral", "mamba"])
def test_causal_models_have_the_stock_loss_and_gradients(family):
    compare(family, stock)


@pytest.mark.parametrize("family", ["bert", "roberta", "electra", "modernbert", "deberta-v2"])
def test_masked_models_have_the_stock_loss_and_gradients(family):
    compare(family, of_masked)


def compare(family, reference):
    """In float64 throughout."""
    model = families.build(family)
    inputs = families.sample_inputs(model, tokens=16, padding=3)
    assert output_layer_of(model) is not None
    with NoFloat32():
        loss, wanted = exact_loss(model, inputs, COUNT), reference(model, inputs)
        torch.testing.assert_close(loss, wanted, rtol=1e-14, atol=0)
        assert_same(gradients(model, loss), gradients(model, wanted))


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("rows", [1, 12, 13, 14, 1000])
def test_the_number_of_chunks_changes_nothing(rows, tied, monkeypatch):
    model = families.build("llama", tie_word_embeddings=tied)
    inputs = families.sample_inputs(model, tokens=16, padding=3)
    wanted = gradients(model, stock(model, inputs))
    monkeypatch.setattr(fused_loss, "CHUNK_ROWS", rows)
    assert_same(gradients(model, exact_loss(model, inputs, COUNT)), wanted, 1e-6)


@pytest.mark.parametrize("family", ["llama", "gemma2", "bert"])
@pytest.mark.parametrize("labels", [True, False])
def test_every_module_is_called_once_however_many_rows_there_are(family, labels):
    model = families.build(family)
    inputs = families.sample_inputs(model, tokens=16, padding=3)
    if not labels:
        inputs["labels"] = torch.full_like(inputs["labels"], -100)
    calls = {name: 0 for name, module in model.named_modules() if not isinstance(module, nn.ModuleList)}
    for name in calls:
        module = model.get_submodule(name)
        module.register_forward_hook(lambda *_, name=name: calls.__setitem__(name, calls[name] + 1))
    with torch.no_grad():
        model(**{name: value for name, value in inputs.items() if name != "labels"})
    once, calls = calls, dict.fromkeys(calls, 0)
    exact_loss(model, inputs, COUNT).backward()
    assert calls == once


def test_without_rows_the_loss_is_a_zero_with_a_graph():
    model = families.build("gemma2")
    inputs = families.sample_inputs(model, tokens=16, padding=3)
    inputs["labels"] = torch.full_like(inputs["labels"], -100)
    loss = exact_loss(model, inputs, COUNT)
    assert loss.item() == 0
    found = gradients(model, loss)
    assert found.keys() == {name for name, _ in model.named_parameters()}
    assert not any(gradient.any() for gradient in found.values())


@pytest.mark.parametrize("family", ["gemma2", "bert"])
@pytest.mark.parametrize("count", [None, torch.tensor(5)])
@pytest.mark.parametrize("draw", [{}, {"strategy": "uniform", "ratio": 0.6}, {"normalization": "selected"}])
def test_token_selection_has_the_same_gradients_with_it(family, count, draw):
    model = families.build(family)
    inputs = families.sample_inputs(model, tokens=16, padding=3)
    found = []
    for fused in (False, True):
        framework.enable_token_selection(model, **draw, fused_loss=fused)
        output = model(**inputs, num_items_in_batch=count)
        assert (output.logits is None) == fused
        found.append((output.loss.detach(), gradients(model, output.loss)))
        framework.disable_token_selection(model)
    torch.testing.assert_close(found[1][0], found[0][0], rtol=1e-14, atol=0)
    assert_same(found[1][1], found[0][1])


def test_a_model_that_gives_tuples_gives_the_loss_first():
    model = families.build("llama")
    inputs = families.sample_inputs(model, tokens=16, padding=3)
    framework.enable_token_selection(model, fused_loss=True)
    named = model(**inputs)
    loss, hidden_states = model(**inputs, output_hidden_states=True, return_dict=False)
    torch.testing.assert_close(loss, named.loss)
    assert isinstance(hidden_states, tuple)


def adapted(**options):
    """A llama with LoRA that contributes from the start."""
    torch.manual_seed(0)
    model = families.build("llama")
    return get_peft_model(model, LoraConfig(r=2, init_lora_weights=False, **options))


@pytest.mark.parametrize(
    ("options", "fused"),
    [
        ({"target_modules": ["q_proj"]}, True),
        ({"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}, True),
        ({"target_modules": ["q_proj", "lm_head"]}, False),
    ],
)
def test_adapters_have_the_stock_gradients(options, fused):
    model = adapted(**options)
    inputs = families.sample_inputs(unwrapped(model), tokens=16, padding=3)
    assert (output_layer_of(unwrapped(model)) is not None) == fused
    with NoFloat32():
        wanted = gradients(model, stock(model, inputs))
        assert_same(gradients(model, exact_loss(model, inputs, COUNT)), wanted)
    assert any("lm_head" in name for name in wanted) == ("modules_to_save" in options or not fused)


def test_heads_that_are_no_plain_linear_layer_at_the_end_are_left_alone():
    class Doubled(nn.Linear):
        def forward(self, input):
            return 2 * super().forward(input)

    model = families.build("llama")
    assert output_layer_of(model) is not None
    model.lm_head.__class__ = Doubled
    assert output_layer_of(model) is None
    model.lm_head.__class__ = nn.Linear
    model.lm_head.forward = lambda input: input
    assert output_layer_of(model) is None
    # One adds a parameter to the layer's result, the other takes the layer's weight without a call.
    options = {"esm": {"position_embedding_type": "rotary"}, "mobilebert": {"embedding_size": 16}}
    for family, own in options.items():
        model = families.build(family, **families.MASKED, intra_bottleneck_size=32, **own)
        inputs = families.sample_inputs(model, tokens=16, padding=3)
        assert output_layer_of(model) is None
        with NoFloat32():
            wanted = gradients(model, of_masked(model, inputs))
            assert_same(gradients(model, exact_loss(model, inputs, COUNT)), wanted, 1e-10)


def same(raw):
    return raw


def capped(raw):
    return torch.tanh(raw / 3) * 3


def random_rows(rows, width=24, classes=50, dtype=torch.float64):
    """Rows, matrix, bias, targets, weights."""
    drawn = torch.Generator().manual_seed(0)
    leaves = [torch.randn(shape, generator=drawn).to(dtype) for shape in ((rows, width), (classes, width), (classes,))]
    targets = torch.randint(classes, (rows,), generator=drawn)
    return *(leaf.requires_grad_() for leaf in leaves), targets, torch.rand(rows, generator=drawn) + 0.5


@pytest.mark.parametrize("after", [same, capped])
@pytest.mark.parametrize("weighted", [True, False])
@pytest.mark.parametrize("wanted", [(0, 1, 2), (0,), (1,), (2,), (0, 2)])
def test_values_against_autograd(after, weighted, wanted):
    *leaves, targets, weights = random_rows(10)
    for number, leaf in enumerate(leaves):
        leaf.requires_grad_(number in wanted)
    weights = weights if weighted else None
    rows, matrix, bias = leaves
    loss = FusedCrossEntropy.apply(rows, matrix, bias, targets, weights, torch.tensor(3), after)
    each = functional.cross_entropy(after(rows @ matrix.T + bias), targets, reduction="none")
    plain = ((each * weights).sum() if weighted else each.sum()) / 3
    torch.testing.assert_close(loss, plain, rtol=1e-14, atol=0)
    asked = [leaves[number] for number in wanted]
    for found, reference in zip(
        torch.autograd.grad(loss * 5, asked), torch.autograd.grad(plain * 5, asked), strict=True
    ):
        torch.testing.assert_close(found, reference, rtol=1e-12, atol=1e-14)


def test_a_second_backward_pass_is_an_error():
    *leaves, targets, _ = random_rows(3)
    loss = FusedCrossEntropy.apply(*leaves, targets, None, 1.0, same)
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="one backward pass"):
        loss.backward()


def relative_error(found, wanted):
    return float((found.double() - wanted).norm() / wanted.norm())


def test_sums_in_bfloat16_lose_little_over_many_chunks():
    rows, matrix, bias, targets, _ = random_rows(32 * CHUNK)
    FusedCrossEntropy.apply(rows, matrix, bias, targets, None, 9.0, same).backward()
    wanted = matrix.grad
    found = {}
    for dtype in (torch.bfloat16, torch.float16):
        leaves = [leaf.detach().to(dtype).requires_grad_() for leaf in (rows, matrix, bias)]
        FusedCrossEntropy.apply(*leaves, targets, None, 9.0, same).backward()
        assert all(leaf.grad.dtype == dtype for leaf in leaves)
        found[dtype] = relative_error(leaves[1].grad, wanted)
    plain = [leaf.detach().bfloat16().requires_grad_() for leaf in (rows, matrix, bias)]
    logits = functional.linear(*plain)
    (functional.cross_entropy(logits.float(), targets, reduction="sum") / 9).backward()
    assert found[torch.bfloat16] < 1.5 * relative_error(plain[1].grad, wanted)
    assert found[torch.float16] < 0.003


def test_half_precision_holds_what_only_a_loss_scale_brings_into_its_range():
    rows, matrix, bias, targets, _ = random_rows(40, dtype=torch.float16)
    rows = (rows.detach() * 0.01).requires_grad_()
    targets = torch.zeros_like(targets)
    count, scale = 2.0**22, 2.0**20
    (FusedCrossEntropy.apply(rows, matrix, bias, targets, None, count, same) * scale).backward()
    exact = [leaf.detach().double().requires_grad_() for leaf in (rows, matrix, bias)]
    (FusedCrossEntropy.apply(*exact, targets, None, count, same) * scale).backward()
    for mine, reference in zip((rows, matrix, bias), exact, strict=True):
        assert relative_error(mine.grad, reference.grad) < 0.01
    # Two thousand rows of 100 for one class are beyond float16; their mean is not.
    many = torch.full((2000, 24), 100.0, dtype=torch.float16, requires_grad=True)
    flat = torch.zeros(50, 24, dtype=torch.float16, requires_grad=True)
    FusedCrossEntropy.apply(many, flat, None, torch.zeros(2000, dtype=torch.int64), None, 2000.0, same).backward()
    torch.testing.assert_close(flat.grad[0], torch.full((24,), -98.0, dtype=torch.float16))


@pytest.mark.parametrize("family", ["llama", "gemma2", "phi"])
def test_autocast_computes_as_linear_layers_do(family):
    model = families.build(family, dtype=torch.float32)
    inputs = families.sample_inputs(model, tokens=16, padding=3)
    exact = gradients(model, stock(model, inputs))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        plain, fused = stock(model, inputs), exact_loss(model, inputs, COUNT)
    assert fused.dtype == torch.float32
    torch.testing.assert_close(fused, plain, rtol=2e-3, atol=0)
    usual, found = gradients(model, plain), gradients(model, fused)
    assert found.keys() == usual.keys()
    for name, gradient in exact.items():
        assert found[name].dtype == torch.float32
        assert relative_error(found[name], gradient) < 1.3 * relative_error(usual[name], gradient) + 1e-3


class Largest(TorchDispatchMode):
    """The number of elements of the largest tensor that an operator makes."""

    def __init__(self):
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        made = (tensor.numel() for tensor in tree_leaves(result) if isinstance(tensor, torch.Tensor))
        self.elements = max(self.elements, *made, 0)
        return result


@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16, "autocast"])
@pytest.mark.parametrize("frozen", [False, True])
def test_no_more_than_a_chunks_logits_ever_exist(precision, frozen, monkeypatch):
    tokens, vocabulary, hidden, chunk = 512, 1000, 16, 32
    monkeypatch.setattr(fused_loss, "CHUNK_ROWS", chunk)
    config = {"hidden_size": hidden, "intermediate_size": 16, "vocab_size": vocabulary, "num_hidden_layers": 1}
    model = LlamaForCausalLM(LlamaConfig(**config, num_attention_heads=2, num_key_value_heads=2)).train()
    if precision is torch.bfloat16:
        model.to(precision)
    model.lm_head.weight.requires_grad_(not frozen)
    ids = torch.randint(vocabulary, (1, tokens), generator=torch.Generator().manual_seed(0))
    inputs = {"input_ids": ids, "labels": ids}
    largest, tracker = Largest(), CpuMemoryTracker()
    casts = torch.autocast("cpu", dtype=torch.bfloat16) if precision == "autocast" else nullcontext()
    with tracker, largest:
        with casts:
            loss = exact_loss(model, inputs, 1.0)
        kept = tracker.current
        loss.backward()
    # A chunk's logits, or attention's scores.
    assert largest.elements <= max(chunk * vocabulary, 2 * tokens**2)
    width = 2 if precision is torch.bfloat16 else 4
    matrix = vocabulary * hidden
    # Logits in two precisions, the gradients of head and embedding, the head in 16 bits, and blocks.
    assert tracker.peak < (4 + 2) * chunk * vocabulary + 2 * (width + 1) * matrix + 400 * tokens * hidden
    if frozen:
        model.lm_head.weight.requires_grad_(True)
        with casts:
            other = CpuMemoryTracker()
            with other:
                loss = exact_loss(model, inputs, 1.0)
        assert other.current - kept == width * matrix


def test_the_gradient_of_a_parameter_is_the_sum_itself():
    model = families.build("llama")
    inputs = families.sample_inputs(model, tokens=16, padding=3)
    loss = exact_loss(model, inputs, COUNT)
    sums = loss.grad_fn.made.matrix if hasattr(loss.grad_fn, "made") else None
    assert sums is not None
    place = sums.data_ptr()
    del sums
    loss.backward()
    assert model.lm_head.weight.grad.data_ptr() == place


def test_a_copy_of_the_model_is_as_good():
    model = families.build("gemma2")
    inputs = families.sample_inputs(model, tokens=16, padding=3)
    exact_loss(model, inputs, COUNT).backward()
    copied = copy.deepcopy(model)
    copied.zero_grad()
    torch.testing.assert_close(exact_loss(copied, inputs, COUNT), exact_loss(model, inputs, COUNT))
    assert "forward" not in vars(model) and "forward" not in vars(model.lm_head)
    assert not model.lm_head._forward_hooks
