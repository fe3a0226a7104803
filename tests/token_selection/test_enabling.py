"""The Python interface in a plain loop: values, unbiasedness, refusals."""

import copy
import itertools
import math
import pickle

import families
import pytest
import torch
from peft import LoraConfig, PromptTuningConfig, get_peft_model
from torch.nn import functional

import framework
from framework.selection import Selection
from framework.training.loss import evaluation_loss, exact_loss


def gradients(model):
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad(set_to_none=True)
    return found


def token_losses(model, inputs):
    """Cross-entropy of every supervised token by the plain model, [batch, sequence], 0 elsewhere."""
    rest = {name: value for name, value in inputs.items() if name != "labels"}
    with torch.no_grad():
        logits = model(**rest).logits
    targets = functional.pad(inputs["labels"][:, 1:], (0, 1), value=-100)
    return functional.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none").view_as(targets)


def test_supervised_selection_has_the_ordinary_loss(model, inputs):
    want = model(**inputs).loss
    framework.enable_token_selection(model)
    got = model(**inputs)
    torch.testing.assert_close(got.loss, want.double(), rtol=1e-6, atol=0)
    assert got[0] is got.loss and got["loss"] is got.loss
    supervised = int((inputs["labels"][:, 1:] != -100).sum())
    assert got.logits.shape == (1, supervised, model.config.vocab_size)


def test_num_items_in_batch_divides_the_sum(model, inputs):
    total = token_losses(model, inputs).sum()
    framework.enable_token_selection(model)
    for count in (7, torch.tensor(7)):
        torch.testing.assert_close(model(**inputs, num_items_in_batch=count).loss, total / 7)


def test_fixed_selection_is_the_mean_over_its_labelled_tokens(model, inputs):
    positions = torch.tensor([[2, 5, 9], [0, 3, 11]])
    losses = token_losses(model, inputs).gather(1, positions)
    framework.enable_token_selection(model)
    with framework.fixed_selection(model, positions):
        got = model(**inputs).loss
    assert (losses != 0).sum() not in (0, 6)
    torch.testing.assert_close(got, losses.sum() / (losses != 0).sum())


def test_eval_mode_and_no_grad_are_the_plain_model(model, inputs):
    rest = {name: value for name, value in inputs.items() if name != "labels"}
    plain = model(**inputs)
    framework.enable_token_selection(model, strategy="uniform", ratio=0.3)
    with torch.no_grad():
        torch.testing.assert_close(model(**inputs).logits, plain.logits, rtol=0, atol=0)
        assert model(**rest).loss is None
    model.eval()
    torch.testing.assert_close(model(**inputs).loss, plain.loss, rtol=0, atol=0)
    assert model.generate(rest["input_ids"][:1, :4], max_new_tokens=3, do_sample=False).shape == (1, 7)


def test_generation_in_train_mode_is_the_plain_models(model, inputs):
    plain = copy.deepcopy(model)
    framework.enable_token_selection(model)
    options = {"max_new_tokens": 6, "do_sample": False, "use_cache": True}
    options |= {"return_dict_in_generate": True, "output_logits": True}
    got, want = (m.train().generate(inputs["input_ids"], **options).logits for m in (model, plain))
    assert torch.equal(torch.stack(got), torch.stack(want))


def test_disable_gives_the_model_back(model, inputs):
    classes = {name: type(module) for name, module in model.named_modules()}
    attention = model.config._attn_implementation
    model(**inputs).loss.backward()
    want = gradients(model)
    framework.enable_token_selection(model, strategy="uniform", ratio=0.3)
    model(**inputs).loss.backward()
    assert gradients(model)["model.embed_tokens.weight"].ne(want["model.embed_tokens.weight"]).any()
    framework.disable_token_selection(model)
    assert {name: type(module) for name, module in model.named_modules()} == classes
    assert model.config._attn_implementation == attention and "forward" not in vars(model)
    model(**inputs).loss.backward()
    for name, gradient in gradients(model).items():
        torch.testing.assert_close(gradient, want[name], rtol=0, atol=0)


def test_a_cache_of_keys_and_values_is_refused_in_training(model, inputs):
    cache = model(input_ids=inputs["input_ids"][:, :3], use_cache=True).past_key_values
    framework.enable_token_selection(model)
    with pytest.raises(ValueError, match=r"past_key_values.*whole sequences"):
        model(**inputs, past_key_values=cache)
    model(**inputs, past_key_values=None).loss.backward()


@pytest.mark.parametrize("keep", [4, torch.tensor([1, 2])])
def test_keeping_some_logits_is_refused_in_training(model, inputs, keep):
    want = model(**inputs, logits_to_keep=0).loss
    framework.enable_token_selection(model)
    with pytest.raises(ValueError, match=r"logits_to_keep.*labels to -100"):
        model(**inputs, logits_to_keep=keep)
    torch.testing.assert_close(model(**inputs, logits_to_keep=0).loss, want.double(), rtol=1e-6, atol=0)
    model.eval()
    assert model(input_ids=inputs["input_ids"], logits_to_keep=keep).logits.shape[1] in (2, 4)


@pytest.mark.parametrize("options", [{}, {"retain_linears": False}])
def test_pickling_an_enabled_model_is_refused_with_what_to_do(model, inputs, tmp_path, options):
    framework.enable_token_selection(model, **options)
    for dump in (lambda: torch.save(model, tmp_path / "model.pt"), lambda: pickle.dumps(model)):
        with pytest.raises(pickle.PicklingError, match=r"framework\.disable_token_selection\(model\) first"):
            dump()
    framework.disable_token_selection(model)
    torch.save(model, tmp_path / "model.pt")
    loaded = torch.load(tmp_path / "model.pt", weights_only=False)
    torch.testing.assert_close(loaded(**inputs).loss, model(**inputs).loss, rtol=0, atol=0)


def test_a_copy_of_an_enabled_model_trains_by_itself(model, inputs):
    framework.enable_token_selection(model)
    twin = copy.deepcopy(model)
    loss = twin(**inputs).loss
    loss.backward()
    assert not gradients(model)
    model(**inputs).loss.backward()
    for name, gradient in gradients(model).items():
        torch.testing.assert_close(gradient, twin.get_parameter(name).grad, rtol=0, atol=0)


@pytest.mark.parametrize(
    ("strategy", "options"), [("uniform", {}), ("bernoulli", {}), ("uniform", {"tokentune": True})]
)
def test_the_expected_loss_over_all_selections_is_the_full_loss(strategy, options):
    """Enumerate every selection of one sequence of 6 tokens with its probability, as the strategy states it."""
    model = families.build("llama")
    tokens, ratio = 6, 0.5
    inputs = {"input_ids": torch.tensor([[5, 9, 7, 30, 12, 80]])}
    inputs["labels"] = inputs["input_ids"].clone()
    inputs["labels"][0, 3] = -100
    full = model(**inputs).loss.detach()
    framework.enable_token_selection(model, strategy=strategy, ratio=ratio, **options)
    drawn = framework.selection.select(
        strategy=strategy,
        ratio=ratio,
        supervised=torch.ones(1, tokens, dtype=torch.bool),
        documents=torch.zeros(1, tokens, dtype=torch.int64),
        seed=0,
        **options,
    )
    expected, total = 0.0, 0.0
    for chosen in itertools.product([False, True], repeat=tokens):
        mask = torch.tensor([chosen])
        probability = torch.full((1, tokens), ratio)
        if strategy == "bernoulli":
            chance = ratio ** sum(chosen) * (1 - ratio) ** (tokens - sum(chosen))
        elif options:  # the ends are certain, one of the four between
            if not (sum(chosen) == 3 and chosen[0] and chosen[-1]):
                continue
            chance, probability = 1 / 4, torch.tensor([[1, 0.25, 0.25, 0.25, 0.25, 1]])
        else:
            if sum(chosen) != 3:
                continue
            chance = 1 / math.comb(tokens, 3)
        if mask.equal(drawn.mask(tokens)):
            torch.testing.assert_close(drawn.probability[drawn.valid], probability[mask])
        with framework.fixed_selection(model, Selection.of_mask(mask, probability)):
            expected += chance * float(model(**inputs).loss.detach())
        total += chance
    assert total == pytest.approx(1)
    assert expected == pytest.approx(float(full), rel=1e-7)


def test_draws_follow_the_documents_whatever_the_micro_batch():
    model = families.build("llama")
    inputs = families.sample_inputs(model, batch=4, padding=0)
    framework.enable_token_selection(model, strategy="uniform", ratio=0.25, seed=5)
    model(**inputs, num_items_in_batch=10).loss.backward()
    whole = gradients(model)
    framework.disable_token_selection(model)
    state = framework.enable_token_selection(model, strategy="uniform", ratio=0.25, seed=5)
    for half in (slice(0, 2), slice(2, 4)):
        part = {name: value[half] for name, value in inputs.items()}
        model(**part, num_items_in_batch=10).loss.backward()
        saved = state.state_dict()
    for name, gradient in gradients(model).items():
        torch.testing.assert_close(gradient, whole[name], rtol=1e-9, atol=1e-12)
    assert saved == {"drawn": 4}
    model(**inputs).loss.backward()
    second = gradients(model)
    state.load_state_dict(saved)
    model(**inputs).loss.backward()
    for name, gradient in gradients(model).items():
        torch.testing.assert_close(gradient, second[name], rtol=0, atol=0)


def test_nothing_supervised_is_a_zero_loss_with_a_graph(model, inputs):
    inputs["labels"].fill_(-100)
    framework.enable_token_selection(model)
    loss = model(**inputs).loss
    loss.backward()
    assert loss == 0
    assert all(gradient.eq(0).all() for gradient in gradients(model).values())


def test_tokentune_normalization_is_the_mean_over_selected_supervised(model, inputs):
    losses = token_losses(model, inputs)
    state = framework.enable_token_selection(
        model, strategy="uniform", ratio=0.4, normalization="selected", retain_linears=False
    )
    got = model(**inputs).loss
    mask = framework.selection.select(
        strategy="uniform",
        ratio=0.4,
        supervised=losses != 0,
        documents=torch.arange(2)[:, None].where(inputs["attention_mask"] == 1, -1),
        seed=state.seed,
    ).mask(24)
    chosen = losses[mask & (losses != 0)]
    torch.testing.assert_close(got, chosen.mean())


def test_a_suffix_is_the_mean_over_its_own_labels(model, inputs):
    losses = token_losses(model, inputs)
    framework.enable_token_selection(model, strategy="suffix", ratio=0.3)
    got = model(**inputs).loss
    lengths = inputs["attention_mask"].sum(1)
    mask = torch.arange(24) >= (lengths - (0.3 * lengths).round())[:, None]
    chosen = losses[mask & (losses != 0)]
    assert 0 < len(chosen) < (losses != 0).sum()
    torch.testing.assert_close(got, chosen.mean())


def test_a_suffix_has_no_probabilities_to_weigh_by(model):
    with pytest.raises(ValueError, match=r"selection\.normalization: 'supervised' makes up for labels"):
        framework.enable_token_selection(model, strategy="suffix", ratio=0.3, normalization="supervised")


@pytest.mark.parametrize("family", ["llama", "gpt2", "opt", "gemma2", "bert"])
def test_exact_and_chunked_evaluation_losses_equal_the_plain_model(family):
    model = families.build(family)
    inputs = families.sample_inputs(model)
    plain = model(**inputs)
    plain.loss.backward()
    want = gradients(model)
    shifted = inputs["labels"][:, 1:] if family != "bert" else inputs["labels"]
    count = int((shifted != -100).sum())
    loss = exact_loss(model, inputs, count)
    loss.backward()
    torch.testing.assert_close(loss, plain.loss.double(), rtol=1e-6, atol=0)
    for name, gradient in gradients(model).items():
        torch.testing.assert_close(gradient, want[name], rtol=1e-5, atol=1e-7)
    for chunks in (1, 3, 1000, None):
        total, tokens, _ = evaluation_loss(model.eval(), inputs, chunks)
        assert tokens == count
        torch.testing.assert_close(total.double() / count, plain.loss.double(), rtol=1e-5, atol=0)


def test_evaluation_with_selection_enabled_and_adapter():
    model = get_peft_model(families.build("llama"), LoraConfig(r=2, target_modules="all-linear")).train()
    inputs = families.sample_inputs(model.get_base_model())
    want = model(**inputs).loss
    framework.enable_token_selection(model)
    total, tokens, _ = evaluation_loss(model.eval(), inputs)
    torch.testing.assert_close(total.double() / tokens, want.double(), rtol=1e-5, atol=0)


def test_sequence_classifier_selects_its_pooled_token():
    model = families.build("llama", task="sequence_classification", num_labels=3)
    inputs = families.sample_inputs(model)
    want = model(**inputs).loss
    framework.enable_token_selection(model)
    loss = model(**inputs).loss
    torch.testing.assert_close(loss, want)
    loss.backward()
    touched = gradients(model)["model.embed_tokens.weight"].norm(dim=1).nonzero()[:, 0].tolist()
    last = [int(inputs["input_ids"][0, 23]), int(inputs["input_ids"][1, 18])]
    assert sorted(set(last)) == touched


def class_loss(model, inputs):
    logits = model(**{name: value for name, value in inputs.items() if name != "labels"}).logits
    return functional.cross_entropy(logits, inputs["labels"])


@pytest.mark.parametrize("family", ["llama", "bert", "vit"])
def test_a_classifiers_loss_is_over_the_items_of_all_micro_batches(family):
    """Stock BERT takes num_items_in_batch and does not look at it."""
    task = "image_classification" if family == "vit" else "sequence_classification"
    model = families.build(family, task=task, num_labels=3)
    inputs = families.sample_inputs(model)
    want = class_loss(model, inputs)
    framework.enable_token_selection(model)
    torch.testing.assert_close(model(**inputs).loss, want)
    torch.testing.assert_close(model(**inputs, num_items_in_batch=5).loss, want * 2 / 5)
    torch.testing.assert_close(model(**inputs, num_items_in_batch=torch.tensor(5)).loss, want * 2 / 5)
    torch.testing.assert_close(model(**inputs, return_dict=False)[0], want)


def test_problems_of_other_kinds_keep_the_models_own_loss():
    model = families.build("bert", task="sequence_classification", num_labels=3, problem_type="regression")
    inputs = families.sample_inputs(model) | {"labels": torch.randn(2, 3, dtype=torch.float64)}
    want = model(**inputs).loss
    framework.enable_token_selection(model)
    torch.testing.assert_close(model(**inputs).loss, want)
    with pytest.raises(ValueError, match="num_items_in_batch: a mean over several micro-batches needs one class"):
        model(**inputs, num_items_in_batch=5)


@pytest.mark.parametrize(("strategy", "ratio", "share"), [("supervised", "labelled", 1.0), ("uniform", 0.25, 0.3)])
def test_a_head_that_averages_makes_every_token_supervised(strategy, ratio, share):
    model = families.build("modernbert", task="sequence_classification", classifier_pooling="mean")
    inputs = families.sample_inputs(model, padding=0)
    class_loss(model, inputs).backward()
    exact = gradients(model)["model.embeddings.tok_embeddings.weight"].norm(dim=1).nonzero()[:, 0].tolist()
    framework.enable_token_selection(model, strategy=strategy, ratio=ratio)
    model(**inputs).loss.backward()
    touched = gradients(model)["model.embeddings.tok_embeddings.weight"].norm(dim=1).nonzero()[:, 0].tolist()
    assert set(touched) <= set(exact)
    assert len(touched) == len(exact) if share == 1 else 0 < len(touched) <= 2 * (share * 24)


def test_refusals(model, inputs):
    rest = {name: value for name, value in inputs.items() if name != "labels"}
    with pytest.raises(ValueError, match="not enabled"):
        framework.disable_token_selection(model)
    with pytest.raises(ValueError, match=r"retention\.kv_format: 'int3'"):
        framework.enable_token_selection(model, kv_format="int3")
    with pytest.raises(ValueError, match=r"retention\.placement: 'disk' is none of device, host"):
        framework.enable_token_selection(model, placement="disk")
    with pytest.raises(ValueError, match=r"selection\.ratio"):
        framework.enable_token_selection(model, strategy="uniform")
    with pytest.raises(ValueError, match="not a Hugging Face model"):
        framework.enable_token_selection(torch.nn.Linear(2, 2))
    with pytest.raises(ValueError, match="no supported kind of model"):
        framework.enable_token_selection(model.model)
    framework.enable_token_selection(model)
    with pytest.raises(ValueError, match="enabled on this model already"):
        framework.enable_token_selection(model)
    with pytest.raises(ValueError, match="got no labels"):
        model(**rest)
    with (
        pytest.raises(ValueError, match="sorted and distinct"),
        framework.fixed_selection(model, torch.tensor([[3, 2]] * 2)),
    ):
        pass
    with (
        pytest.raises(ValueError, match="beyond the sequence"),
        framework.fixed_selection(model, torch.tensor([[3, 24]] * 2)),
    ):
        model(**inputs)
    with pytest.raises(ValueError, match="the selection is over 1 sequences, the batch has 2"):
        with framework.fixed_selection(model, torch.tensor([[3, 4]])):
            model(**inputs)


def test_prompt_tuning_is_refused(model):
    wrapped = get_peft_model(model, PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3))
    with pytest.raises(ValueError, match="PromptTuningConfig trains tokens"):
        framework.enable_token_selection(wrapped)


def test_the_router_loss_is_refused():
    model = families.build("mixtral")
    model.config.output_router_logits = True
    framework.enable_token_selection(model)
    with pytest.raises(ValueError, match="output_router_logits=False"):
        model(**families.sample_inputs(model))


def test_a_second_backward_says_why_it_fails(model, inputs):
    framework.enable_token_selection(model)
    loss = model(**inputs).loss
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="back-propagates once"):
        loss.backward()
