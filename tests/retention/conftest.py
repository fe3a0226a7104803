"""Gradients of a model by the fast way and by the slow reference."""

import importlib.util
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import framework
from framework.retention.reference import reference_gradients
from framework.selection import Selection
from framework.training.loss import LossKind, loss_kind, rows_loss, selected_supervised_rows, unwrapped

# Builds of torch for the CPU come without Triton.
collect_ignore = [] if importlib.util.find_spec("triton") else ["test_replay_kernels.py"]

TOOLS = Path(__file__).parents[2] / "tools"


def load_tool(name):
    """A module of tools/, which is not a package."""
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(name, TOOLS / f"{name}.py")
        sys.modules[name] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules[name])
    return sys.modules[name]


def collect(model):
    """Gradients by name; the model's are cleared."""
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad(set_to_none=True)
    return gradients


def selective_step(model, inputs, selection, seed=0, **options):
    """Loss, gradients and fall-backs of one token-selective step."""
    state = framework.enable_token_selection(model, **options)
    torch.manual_seed(seed)
    with framework.fixed_selection(model, selection):
        loss = model(**inputs).loss
    loss.backward()
    framework.disable_token_selection(model)
    return loss.detach(), collect(model), dict(state.retention.fallbacks)


def reference_step(model, inputs, selection, fallbacks=(), seed=0):
    """Loss and gradients of the slow reference for the same selection."""
    inner = unwrapped(model)
    kind = loss_kind(inner)
    chosen = selection if isinstance(selection, Selection) else Selection.of_positions(selection)
    torch.manual_seed(seed)
    tokens = token_count(model, inputs)
    with reference_gradients(inner, chosen.mask(tokens), fallbacks):
        if kind is LossKind.POOLED:
            loss = model(**inputs).loss
        else:
            rest = {name: value for name, value in inputs.items() if name != "labels"}
            index, targets, _ = selected_supervised_rows(inputs["labels"], kind, chosen)
            logits = model(**rest, use_cache=False).logits
            loss = rows_loss(logits.flatten(0, 1)[index], targets) / max(1, len(index))
        loss.backward()
    return loss.detach(), collect(model)


def token_count(model, inputs):
    """Tokens of a sequence: an image's patches and its class token, or the input's length."""
    if "pixel_values" in inputs:
        return (model.config.image_size // model.config.patch_size) ** 2 + 1
    return inputs["input_ids"].shape[1]


def positions(model, inputs, selected=8, seed=0):
    """Random positions `[2, selected]` outside of the padding; classifiers' pooled token among them."""
    tokens, padding = token_count(model, inputs), 5
    generator = torch.Generator().manual_seed(seed)
    first = 1 if loss_kind(unwrapped(model)) is LossKind.POOLED else 0
    drawn = [torch.randperm(tokens - padding - first, generator=generator)[: selected - first] for _ in range(2)]
    rows = [torch.cat([torch.zeros(first, dtype=torch.int64), row.sort().values + first]) for row in drawn]
    return torch.stack(rows)


def worst_error(gradients, reference):
    """The largest relative error of a tensor; infinite if the sets of parameters with gradient differ.

    A gradient that cancels to zero (the bias of BERT's keys) is rounding of its far larger terms: hence the floor.
    """
    if gradients.keys() != reference.keys():
        return float("inf")
    floor = 1e-5 * max(float(g.norm()) for g in reference.values())
    return max(float((gradients[k] - reference[k]).norm() / (reference[k].norm() + floor)) for k in reference)


@pytest.fixture(scope="session")
def families():
    """tools/families.py: tiny models of many families."""
    return load_tool("families")


@pytest.fixture(scope="session")
def steps():
    """The helpers above."""
    return SimpleNamespace(
        collect=collect,
        selective=selective_step,
        reference=reference_step,
        positions=positions,
        worst_error=worst_error,
    )
