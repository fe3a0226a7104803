"""The correction makes of the mean gradient over all selections the ordinary gradient, in every attention path."""

import itertools

import pytest
import torch

import framework
from framework.selection import Selection
from framework.training.loss import exact_loss

TOKENS = 4
PROBABILITY = (0.25, 0.5, 0.125, 0.5)
# Powers of two: a selection holds float32, and its inverses have to be exact.


def mean_over_selections(model, inputs, steps, **options):
    """Gradients averaged over all subsets of the tokens, each as likely as independent draws make it."""
    framework.enable_token_selection(model, strategy="bernoulli", ratio=0.5, **options)
    mean = {}
    probability = torch.tensor([PROBABILITY])
    for chosen in itertools.product([False, True], repeat=TOKENS):
        mask = torch.tensor([chosen])
        likely = float(torch.where(mask, probability.double(), 1 - probability.double()).prod())
        with framework.fixed_selection(model, Selection.of_mask(mask, probability)):
            model(**inputs, num_items_in_batch=TOKENS - 1).loss.backward()
        for name, gradient in steps.collect(model).items():
            mean[name] = mean.get(name, 0) + likely * gradient
    framework.disable_token_selection(model)
    return mean


def one_sequence(model):
    generator = torch.Generator().manual_seed(3)
    ids = torch.randint(model.config.vocab_size, (1, TOKENS), generator=generator)
    return {"input_ids": ids, "labels": ids.clone()}


def ordinary(model, inputs, steps):
    # Not the model's own loss, which is float32.
    exact_loss(model, inputs, TOKENS - 1).backward()
    return steps.collect(model)


@pytest.mark.parametrize("retain_linears", [False, True])
@pytest.mark.parametrize(("family", "attention"), [("starcoder2", "sdpa"), ("gpt2", "sdpa"), ("gpt2", "eager")])
def test_mean_over_all_selections_is_the_ordinary_gradient(families, steps, family, attention, retain_linears):
    """Of families that compute nothing in float32, whose rounding would be another with every selection."""
    model = families.build(family)
    model.set_attn_implementation(attention)
    inputs = one_sequence(model)
    want = ordinary(model, inputs, steps)
    got = mean_over_selections(model, inputs, steps, correction=1.0, retain_linears=retain_linears)
    assert steps.worst_error(got, want) < 1e-12


def test_soft_capped_scores_are_corrected(families, steps):
    model = families.build("gemma2")
    model.set_attn_implementation("eager")
    inputs = one_sequence(model)
    want = ordinary(model, inputs, steps)
    got = mean_over_selections(model, inputs, steps, correction=1.0)
    # Its eager attention computes probabilities in float32.
    assert steps.worst_error(got, want) < 2e-6


def test_correction_closes_the_gap_in_proportion(families, steps):
    model = families.build("llama")
    inputs = one_sequence(model)
    want = ordinary(model, inputs, steps)

    def bias(correction):
        got = mean_over_selections(model, inputs, steps, correction=correction)
        difference = torch.cat([(got[name] - want[name]).flatten() for name in want])
        return float(difference.norm() / torch.cat([g.flatten() for g in want.values()]).norm())

    none, half = bias(0.0), bias(0.5)
    assert none > 0.05
    assert 0.3 < half / none < 0.7


def test_a_token_selected_for_certain_needs_no_correction(families, steps):
    model = families.build("llama")
    inputs = families.sample_inputs(model)
    chosen = steps.positions(model, inputs)
    _, plain, _ = steps.selective(model, inputs, chosen)
    _, corrected, _ = steps.selective(model, inputs, chosen, correction=1.0)
    assert steps.worst_error(corrected, plain) < 1e-14


def test_bidirectional_models_are_refused(families):
    model = families.build("bert")
    with pytest.raises(ValueError, match="come back"):
        framework.enable_token_selection(model, strategy="bernoulli", ratio=0.5, correction=1.0)


def test_blocks_that_fall_back_are_refused(families):
    model = families.build("mamba")
    inputs = families.sample_inputs(model)
    framework.enable_token_selection(model, strategy="bernoulli", ratio=0.5, correction=1.0)
    with pytest.raises(ValueError, match=r"selection\.correction: block .* cannot be corrected"):
        model(**inputs)
