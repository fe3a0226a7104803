"""Blocks with recurrent state on contiguous selections, against the models' own caches."""

import copy
import itertools
import logging

import pytest
import recurrent_ranks
import several_ranks
import torch
from check_families import NoFloat32
from peft import LoraConfig, get_peft_model
from recurrent_reference import reference_step
from torch.nn import functional
from transformers import DynamicCache
from transformers.cache_utils import LinearAttentionLayer

import framework
from framework.retention import blocks_of, recurrent
from framework.retention.recurrent import RecurrentMixer
from framework.retention.runs import TokensBefore
from framework.selection import Selection
from framework.training.loss import rows_loss

TOKENS = 24
RUNS = ((9, 20), (13, 19))
"""First token and the one after the last, of each sequence; the second has padding at its end."""

# All but the short convolution compute their recurrence in float32: as they are, sums in another order differ by that.
EXACT, FLOAT32_PARTS = 1e-10, 1e-5
FAMILIES = {
    "qwen3_next": 1,
    "qwen3_5_text": 1,
    "olmo_hybrid": 1,
    "mamba2": 2,
    "bamba": 1,
    "granitemoehybrid": 1,
    "nemotron_h": 1,
    "falcon_h1": 2,
    "lfm2": 1,
}
"""Blocks that are replayed from their state."""


@pytest.fixture(autouse=True)
def differentiable_cache(monkeypatch):
    """States are put into the cache where it copies them over the ones before, which autograd has saved."""

    def put(self, recurrent_states, state_idx=0, **_):
        self.recurrent_states[state_idx] = recurrent_states.clone()
        return recurrent_states

    monkeypatch.setattr(LinearAttentionLayer, "update_recurrent_state", put)


@pytest.fixture
def no_float32():
    """What families compute in float32 whatever the model's dtype is computed in float64."""
    with NoFloat32():
        yield


def selection_of(runs):
    mask = torch.zeros(len(runs), TOKENS, dtype=torch.bool)
    for row, run in zip(mask, runs, strict=True):
        row[torch.arange(*run) if isinstance(run, tuple) else run] = True
    return Selection.of_mask(mask, torch.ones(mask.shape))


def sample(families, model, padding=5):
    """Inputs with a label on every token."""
    inputs = families.sample_inputs(model, tokens=TOKENS, padding=padding)
    inputs["labels"] = inputs["input_ids"].masked_fill(inputs.get("attention_mask", torch.ones(2, TOKENS)) == 0, -100)
    return inputs


def selective_step(steps, model, inputs, selection, **options):
    """Loss, logits and gradients of a token-selective step, and the names of blocks in runs and of fall-backs."""
    state = framework.enable_token_selection(model, **options)
    torch.manual_seed(0)
    with framework.fixed_selection(model, selection):
        output = model(**inputs)
    output.loss.backward()
    in_runs, fallbacks = set(state.retention.in_runs), dict(state.retention.fallbacks)
    framework.disable_token_selection(model)
    assert not any(isinstance(module, RecurrentMixer) for module in model.modules())
    return output.loss.detach(), output.logits[0].detach(), steps.collect(model), in_runs, fallbacks


def check(steps, model, inputs, selection, tolerance=EXACT):
    """Compare with the reference, without and with retained linears; gives the blocks that were replayed in runs."""
    for retain_linears in (False, True):
        options = {"normalization": "selected", "retain_linears": retain_linears}
        loss, logits, got, in_runs, fallbacks = selective_step(steps, model, inputs, selection, **options)
        assert not fallbacks
        want_loss, want_logits, want = reference_step(steps, model, inputs, selection)
        torch.testing.assert_close(loss, want_loss, rtol=1e-6, atol=0)
        torch.testing.assert_close(logits, want_logits, rtol=1e-5, atol=1e-5)
        assert steps.worst_error(got, want) < tolerance
    return in_runs


@pytest.mark.parametrize("padding", [0, 5])
@pytest.mark.parametrize("family", FAMILIES)
def test_gradients_equal_those_of_the_models_own_cache(families, steps, family, padding):
    model = families.build(family)
    in_runs = check(steps, model, sample(families, model, padding), selection_of(RUNS), FLOAT32_PARTS)
    assert len(in_runs) == FAMILIES[family]


@pytest.mark.parametrize("family", FAMILIES)
def test_without_float32_parts_they_are_exact(families, steps, family, no_float32):
    model = families.build(family)
    check(steps, model, sample(families, model), selection_of(RUNS))


@pytest.mark.parametrize(
    "runs",
    [
        ((0, 24), (0, 24)),
        ((0, 5), (22, 24)),
        ((12, 24), (12, 24)),
        ((9, 20), ()),
        ((1, 2), (2, 3)),
    ],
    ids=["all", "edges", "equal", "one of two", "one token each"],
)
@pytest.mark.parametrize("family", ["qwen3_next", "falcon_h1", "lfm2"])
def test_runs_may_be_anywhere(families, steps, family, runs, no_float32):
    if family == "falcon_h1" and runs[0] == (1, 2):
        pytest.skip("its own step over one token has no gradient")
    model = families.build(family)
    runs = tuple(run or torch.tensor([], dtype=torch.int64) for run in runs)
    check(steps, model, sample(families, model, padding=0), selection_of(runs))


@pytest.mark.parametrize("family", ["qwen3_next", "mamba2", "falcon_h1", "lfm2"])
def test_tokens_between_selected_ones_are_cut_at_the_block_only(families, steps, family, no_float32):
    """The rule for selections with gaps: one run from the first selected token to the last."""
    model = families.build(family)
    chosen = [torch.tensor([5, 6, 9, 15, 16]), torch.tensor([8, 18])]
    check(steps, model, sample(families, model), selection_of(chosen))


def test_nothing_selected_is_a_zero_loss_with_a_graph(families, steps):
    model = families.build("qwen3_next")
    nothing = selection_of((torch.tensor([], dtype=torch.int64),) * 2)
    loss, _, got, in_runs, _ = selective_step(steps, model, sample(families, model), nothing)
    assert loss == 0 and in_runs == {"model.layers.0"}
    assert all(gradient.eq(0).all() for gradient in got.values())


@pytest.mark.parametrize("family", ["qwen3_next", "mamba2"])
def test_the_forward_value_is_the_plain_models(families, steps, family):
    model = families.build(family)
    inputs = sample(families, model)
    with torch.no_grad():
        plain = model(**{name: value for name, value in inputs.items() if name != "labels"}).logits
    selection = selection_of(RUNS)
    _, logits, *_ = selective_step(steps, model, inputs, selection)
    kept = selection.mask(TOKENS) & (functional.pad(inputs["labels"][:, 1:], (0, 1), value=-100) != -100)
    torch.testing.assert_close(logits, plain[kept], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("strategy", ["uniform", "bernoulli"])
def test_strategies_with_gaps_fall_back(families, steps, strategy):
    model = families.build("qwen3_next")
    inputs = sample(families, model)
    options = {"strategy": strategy, "ratio": 0.5, "normalization": "selected"}
    _, _, got, in_runs, fallbacks = selective_step(steps, model, inputs, selection_of(RUNS), **options)
    assert not in_runs and list(fallbacks) == ["model.layers.0"]
    _, want = steps.reference(model, inputs, selection_of(RUNS), fallbacks)
    assert steps.worst_error(got, want) < FLOAT32_PARTS


@pytest.mark.parametrize(
    ("family", "count", "reason"),
    [
        ("mamba", 2, "from its state, it mixes tokens"),  # its scan starts from zero whatever it is given
        ("falcon_mamba", 2, "from its state, it mixes tokens"),
        ("jamba", 1, "from its state, it mixes tokens"),
        ("recurrent_gemma", 1, "it mixes tokens outside"),  # it keeps its state to itself
        ("zamba", 4, "differentiable arguments"),
        ("zamba2", 4, "differentiable arguments"),
    ],
)
def test_mixers_without_a_state_to_start_from_fall_back(families, steps, family, count, reason):
    model = families.build(family)
    _, _, got, in_runs, fallbacks = selective_step(steps, model, sample(families, model), selection_of(RUNS))
    assert got and not in_runs
    assert len(fallbacks) == count and all(reason in said for said in fallbacks.values())


@pytest.mark.parametrize(
    ("family", "lost"),
    [
        *itertools.product(("qwen3_next", "mamba2", "falcon_h1"), ("update_conv_state", "recurrent_states")),
        ("mamba2", "mask"),
    ],
)
def test_a_state_that_is_not_handed_over_is_noticed(families, steps, monkeypatch, family, lost):
    """Each of what a replay depends on, taken away."""
    if lost == "update_conv_state":
        monkeypatch.setattr(recurrent._HandedOver, lost, lambda self, conv_states, *_, **__: conv_states)
    elif lost == "mask":
        monkeypatch.setattr(TokensBefore, "real", property(lambda self: torch.ones(2, self.columns).bool()))
    else:
        given = recurrent._HandedOver.__init__

        def forget(self, state):
            given(self, state)
            self.recurrent_states = {0: torch.zeros_like(self.recurrent_states[0])}

        monkeypatch.setattr(recurrent._HandedOver, "__init__", forget)
    model = families.build(family)
    _, _, _, in_runs, fallbacks = selective_step(steps, model, sample(families, model), selection_of(RUNS))
    assert not in_runs and all("from its state, it " in reason for reason in fallbacks.values())


def calls_of(model, inputs, selection):
    """How often each module is called in the forward and in the backward pass."""
    calls = {"forward": {}, "backward": {}}
    phase = "forward"

    def count(name):
        def hook(*_):
            calls[phase][name] = calls[phase].get(name, 0) + 1

        return hook

    handles = [module.register_forward_pre_hook(count(name)) for name, module in model.named_modules()]
    with framework.fixed_selection(model, selection):
        loss = model(**inputs).loss
    phase = "backward"
    loss.backward()
    for handle in handles:
        handle.remove()
    return calls


@pytest.mark.parametrize("family", ["qwen3_next", "mamba2", "falcon_h1", "lfm2"])
def test_modules_are_called_equally_often_whatever_is_selected(families, family):
    model = families.build(family, **({} if family != "qwen3_next" else {"num_experts": 0}))
    inputs = sample(families, model)
    framework.enable_token_selection(model)
    gaps = [torch.tensor([5, 6, 9]), torch.tensor([], dtype=torch.int64)]
    nothing = [torch.tensor([], dtype=torch.int64)] * 2
    first = calls_of(model, inputs, selection_of(RUNS))  # tries the blocks, too
    found = [calls_of(model, inputs, selection_of(runs)) for runs in (RUNS, ((0, 24), (0, 24)), gaps, nothing)]
    assert found[0] != first
    assert all(calls == found[0] for calls in found)
    for phase in found[0].values():
        assert all(number == 1 for name, number in phase.items() if ".layers." in name)


def test_dropout_of_adapters_is_replayed(families, steps):
    """All tokens but the padding, so that ordinary autograd with the same draws is the reference.

    The second sequence has fewer rows than the first: masks are spread over padding.
    """
    model = families.build("qwen3_next")
    config = LoraConfig(r=4, target_modules=["in_proj_qkvz", "in_proj_ba", "out_proj"], lora_dropout=0.3)
    model = get_peft_model(model, config).double().train()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(0, 0.3)
    inputs = sample(families, model)
    torch.manual_seed(0)
    logits = model(**{name: value for name, value in inputs.items() if name != "labels"}).logits
    targets = functional.pad(inputs["labels"][:, 1:], (0, 1), value=-100)
    want_loss = rows_loss(logits[targets != -100], targets[targets != -100]) / (targets != -100).sum()
    want_loss.backward()
    want = steps.collect(model)
    for retain_linears in (False, True):
        options = {"normalization": "selected", "retain_linears": retain_linears}
        loss, _, got, in_runs, _ = selective_step(steps, model, inputs, selection_of(((0, 24), (0, 19))), **options)
        assert len(in_runs) == 1
        torch.testing.assert_close(loss, want_loss, rtol=1e-6, atol=0)
        assert steps.worst_error(got, want) < FLOAT32_PARTS


@pytest.mark.parametrize("retain_linears", [False, True])
def test_autocast(families, steps, retain_linears):
    model = families.build("qwen3_next", dtype=torch.float32)
    inputs, selection = sample(families, model), selection_of(RUNS)
    with torch.autocast("cpu", torch.bfloat16):
        _, _, want = reference_step(steps, model, inputs, selection)
        found = selective_step(steps, model, inputs, selection, normalization="selected", retain_linears=retain_linears)
    _, _, got, in_runs, _ = found
    assert in_runs == {"model.layers.0"}
    assert all(gradient.dtype == torch.float32 for gradient in got.values())
    flat = [torch.cat([g[name].flatten() for name in want]) for g in (got, want)]
    assert float((flat[0] - flat[1]).norm() / flat[1].norm()) < 3e-2


def test_a_suffix_is_replayed_from_its_state(families, steps):
    model = families.build("qwen3_next")
    inputs = sample(families, model)
    state = framework.enable_token_selection(model, strategy="suffix", ratio=0.4, retain_linears=False)
    loss = model(**inputs).loss
    loss.backward()
    got = steps.collect(model)
    assert state.retention.in_runs == {"model.layers.0"}
    framework.disable_token_selection(model)
    ends = selection_of(((14, 24), (11, 19)))  # 10 of 24 tokens, 8 of 19
    want_loss, _, want = reference_step(steps, model, inputs, ends)
    torch.testing.assert_close(loss.detach(), want_loss, rtol=1e-6, atol=0)
    assert steps.worst_error(got, want) < FLOAT32_PARTS


def test_a_copy_trains_by_itself_and_evaluation_is_plain(families, steps):
    model = families.build("falcon_h1")
    inputs, selection = sample(families, model), selection_of(RUNS)
    plain = copy.deepcopy(model).eval()(input_ids=inputs["input_ids"]).logits
    framework.enable_token_selection(model)
    with framework.fixed_selection(model, selection):
        model(**inputs).loss.backward()
    want = steps.collect(model)
    twin = copy.deepcopy(model)
    with framework.fixed_selection(twin, selection):
        twin(**inputs).loss.backward()
    assert not steps.collect(model)
    assert steps.worst_error(steps.collect(twin), want) == 0
    assert model.eval()(input_ids=inputs["input_ids"]).logits.equal(plain)


def test_document_borders_that_a_run_has_not_are_refused(families):
    model = families.build("qwen3_next")
    inputs = sample(families, model, padding=0)
    framework.enable_token_selection(model)
    model(**inputs).loss.backward()
    with pytest.raises(ValueError, match=r"Qwen3NextGatedDeltaNet got cu_seq_lens_q.*position_ids"):
        model(**inputs, cu_seq_lens_q=torch.tensor([0, 7, 24]))


def test_a_cache_of_states_is_refused_in_training(families):
    model = families.build("mamba2")
    framework.enable_token_selection(model)
    with pytest.raises(ValueError, match=r"forward got cache_params.*whole sequences"):
        model(**sample(families, model), cache_params=DynamicCache(config=model.config))


def test_a_batch_of_single_tokens_does_not_decide_otherwise(families, steps):
    model = families.build("qwen3_next")
    state = framework.enable_token_selection(model)
    short = {"input_ids": torch.tensor([[5], [6]]), "labels": torch.tensor([[5], [6]])}
    model(**short).loss.backward()
    assert state.retention.in_runs == {"model.layers.0"}


@pytest.mark.multiprocess
def test_ranks_may_select_differently(tmp_path):
    """FSDP2 and ZeRO 3 gather weights for each call of a module, so every rank has to make the same calls."""
    several_ranks.run(2, tmp_path, recurrent_ranks.main, tmp_path)
    found = torch.load(tmp_path / "errors.pt", weights_only=True)
    assert len(found) == 2 * 2 * 3
    assert max(found.values()) < 1e-5, found


def test_what_a_block_is_replayed_from_is_said(families, steps, caplog):
    model = families.build("falcon_h1")
    with caplog.at_level(logging.INFO, logger="framework"):
        selective_step(steps, model, sample(families, model), selection_of(RUNS))
    names = [f"block {name} is replayed from the state of mamba" for name in blocks_of(model)]
    told = [record.getMessage() for record in caplog.records if record.name.startswith("framework")]
    assert told == names
