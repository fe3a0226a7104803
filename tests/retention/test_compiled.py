"""Compiled blocks: gradients of blocks that are not compiled, and one compilation for batches of all sizes."""

import shutil

import pytest
import torch
from torch._dynamo.utils import counters

import framework
from framework.config import AdapterConfig
from framework.models.adapters import add_adapter
from framework.models.wrapping import unwrapped
from framework.retention import apply_checkpointing, compile_blocks, compiled

COMPILER = pytest.mark.skipif(shutil.which("g++") is None, reason="generated code needs a C++ compiler")

# Tokens of a sequence and selected ones. The first length is a width of the models.
SIZES = [(32, 9), (32, 12), (41, 30), (17, 9), (64, 33)]


@pytest.fixture(autouse=True)
def nothing_compiled(monkeypatch):
    """Traced blocks run operator by operator, but in the tests that ask for more."""
    monkeypatch.setattr(compiled, "BACKEND", "eager")
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


def batches(families, model):
    for tokens, count in SIZES:
        inputs = families.sample_inputs(unwrapped(model), tokens=tokens, padding=0)
        generator = torch.Generator().manual_seed(count)
        yield inputs, torch.stack([torch.randperm(tokens, generator=generator)[:count].sort().values for _ in range(2)])


def with_lora(model):
    settings = {"kind": "lora", "rank": 4, "alpha": 8.0, "dropout": 0.25}
    return add_adapter(model, AdapterConfig(**settings), task="causal_lm").double().train()


@pytest.mark.parametrize(
    ("family", "options"),
    [
        ("llama", {}),
        ("llama", {"retain_linears": False}),
        ("llama", {"retain_linears": ["down_proj"], "kv_format": "int8"}),
        ("llama", {"kv_format": "recompute", "correction": 0.5}),
        ("llama with LoRA", {}),
        ("gemma3", {"retain_linears": False}),
        ("gpt2", {}),
        ("qwen3_next", {}),
    ],
)
def test_gradients_are_those_of_blocks_that_are_not_compiled(families, steps, family, options):
    model = families.build(family.removesuffix(" with LoRA"))
    if family == "llama with LoRA":
        model = with_lora(model)
    found = {}
    for compile in (False, True):
        options["compile"] = compile
        framework.enable_token_selection(model, **options)
        found[compile] = [step(model, inputs, chosen, steps) for inputs, chosen in batches(families, model)]
        framework.disable_token_selection(model)
    assert counters["frames"]["ok"] > 0 and not counters["recompiles"]
    for (loss, gradients), (want_loss, want) in zip(found[True], found[False], strict=True):
        assert loss == pytest.approx(want_loss, rel=1e-14)
        assert steps.worst_error(gradients, want) < 1e-12


def step(model, inputs, chosen, steps):
    torch.manual_seed(0)
    with framework.fixed_selection(model, chosen):
        loss = model(**inputs).loss
    loss.backward()
    return loss.item(), steps.collect(model)


@pytest.mark.parametrize("transform", [compile_blocks, lambda model: apply_checkpointing(model, compile=True)])
def test_exact_training_is_compiled_once_too(families, steps, transform):
    model, found = families.build("llama"), []
    for change in (lambda model: None, transform):
        change(model)
        for inputs, _ in batches(families, model):
            loss = model(**inputs).loss
            loss.backward()
            found.append((loss.item(), steps.collect(model)))
    assert counters["frames"]["ok"] == 1 and not counters["recompiles"] and not counters["graph_break"]
    for (loss, gradients), (want_loss, want) in zip(found[len(SIZES) :], found[: len(SIZES)], strict=True):
        assert loss == pytest.approx(want_loss, rel=1e-14)
        assert steps.worst_error(gradients, want) < 1e-12


def test_evaluation_is_not_compiled(families):
    model = families.build("llama")
    compile_blocks(model)
    inputs = families.sample_inputs(model)
    with torch.no_grad():
        model.eval()(**inputs)
    assert counters["frames"]["ok"] == 0


# GPT-2 computes nothing in float32, whose rounding generated code changes.
@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=COMPILER)])
def test_compiled_backward_passes_have_the_same_gradients(families, steps, monkeypatch, backend):
    monkeypatch.setattr(compiled, "BACKEND", backend)
    model = families.build("gpt2")
    inputs, chosen = next(iter(batches(families, model)))
    _, want, _ = steps.selective(model, inputs, chosen, retain_linears=False)
    _, got, _ = steps.selective(model, inputs, chosen, retain_linears=False, compile=True)
    assert counters["stats"]["unique_graphs"] > 0
    assert steps.worst_error(got, want) < 1e-12
