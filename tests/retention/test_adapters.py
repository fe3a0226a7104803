"""Token-selective gradients of every adapter method against the slow reference, with and without retained linears."""

import copy

import pytest
import torch
from peft import LilyConfig, LoraConfig, get_peft_model
from torch import nn

import framework
from framework.config import AdapterConfig
from framework.config.adapters import ADAPTER_METHODS
from framework.models import AddedTokens
from framework.models.adapters import add_adapter
from framework.models.tokens import add_tokens
from framework.training.loss import unwrapped

EXACT = 1e-10
# Fourier transforms of C3A run in float32 whatever the weights are.
TOLERANCES = {"c3a": 1e-6}
SMALL = {
    "lora": {"rank": 4, "alpha": 8.0},
    "dora": {"rank": 4, "alpha": 8.0},
    "ia3": {},
    "loha": {"rank": 4, "alpha": 8.0},
    "lokr": {"rank": 4, "alpha": 8.0},
    "vera": {"rank": 4},
    "randlora": {"rank": 4, "alpha": 80.0},
    "oft": {"options": {"oft_block_size": 4}},
    "boft": {"options": {"boft_block_size": 4}},
    "hra": {"rank": 4},
    "fourierft": {"options": {"n_frequency": 20}},
    "ln_tuning": {},
    "shira": {"rank": 4},
    "miss": {"rank": 4},
    "trainable_tokens": {"options": {"token_indices": [*range(5, 30)]}},
    "beft": {},
    "c3a": {"options": {"block_size": 4}},
    "deft": {"rank": 4},
    "delora": {"rank": 4},
    "glora": {"rank": 4},
    "gralora": {"rank": 4, "alpha": 8.0},
    "hira": {"rank": 4},
    "osf": {},
    "peanut": {"rank": 4},
    "psoft": {"rank": 4, "alpha": 8.0},
    "pvera": {"rank": 4},
    "road": {"options": {"group_size": 4}},
    "supertuning": {},
    "tinylora": {"rank": 2},
    "unilora": {"rank": 4},
    "vblora": {"rank": 4, "options": {"num_vectors": 16, "vector_length": 4}},
    "waveft": {"options": {"n_frequency": 20}},
}
VARIANTS = {
    "lora-rslora": ("lora", {**SMALL["lora"], "options": {"use_rslora": True}}),
    "lora-pissa": ("lora", {**SMALL["lora"], "options": {"init_lora_weights": "pissa"}}),
    "lora-olora": ("lora", {**SMALL["lora"], "options": {"init_lora_weights": "olora"}}),
    "lora-bias": ("lora", {**SMALL["lora"], "options": {"lora_bias": True, "bias": "all"}}),
    "loha-rank-dropout": ("loha", {**SMALL["loha"], "options": {"rank_dropout": 0.3}}),
    "lokr-module-dropout": ("lokr", {**SMALL["lokr"], "options": {"module_dropout": 0.5}}),
    "oft-constrained": ("oft", {"rank": 4, "options": {"coft": True}}),
    "miss-bat": ("miss", {**SMALL["miss"], "options": {"init_weights": "bat"}}),
}
WITH_DROPOUT = [kind for kind, method in ADAPTER_METHODS.items() if method.dropout is not None]
# What PEFT has for the transposed linears of GPT-2; the others refuse them by name.
TRANSPOSED = (
    "lora dora ia3 vera randlora fourierft ln_tuning trainable_tokens deft gralora hira pvera tinylora unilora vblora "
    "waveft"
).split()
# Latent attention has widths of 12 and 16, experts are held as 3-D parameters.
EXPERTS = "lora dora ia3 loha lokr vera hra ln_tuning shira miss boft delora glora osf road".split()


def adapted(families, family, kind, settings, dtype=torch.float64):
    """A tiny model with an adapter that is not at its start."""
    # Some methods decompose weights, for which PEFT wants float32.
    model = families.build(family, dtype=torch.float32)
    torch.manual_seed(3)
    model = add_adapter(model, AdapterConfig(kind=kind, **settings), task="causal_lm").to(dtype).train()
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator).to(dtype))
    return model


def check(families, steps, model, tolerance, *, padding=5, random=False):
    inputs = families.sample_inputs(model.get_base_model(), padding=padding)
    chosen = steps.positions(model, inputs)
    want_loss, want = steps.reference(model, inputs, chosen)
    assert want
    for retain_linears in (False, True):
        loss, got, fallbacks = steps.selective(model, inputs, chosen, retain_linears=retain_linears)
        assert not fallbacks
        torch.testing.assert_close(loss, want_loss, rtol=1e-6, atol=0)
        assert steps.worst_error(got, want) < tolerance
    if random:
        assert steps.selective(model, inputs, chosen, seed=1)[0] != want_loss


def test_every_method_is_here():
    assert SMALL.keys() == ADAPTER_METHODS.keys()


@pytest.mark.parametrize("kind", SMALL)
def test_llama(families, steps, kind):
    model = adapted(families, "llama", kind, SMALL[kind])
    check(families, steps, model, TOLERANCES.get(kind, EXACT), random=kind == "pvera")


@pytest.mark.parametrize("variant", VARIANTS)
def test_variants(families, steps, variant):
    model = adapted(families, "llama", *VARIANTS[variant])
    check(families, steps, model, EXACT, padding=0, random="dropout" in variant)


@pytest.mark.parametrize("kind", WITH_DROPOUT)
def test_dropout(families, steps, kind):
    model = adapted(families, "llama", kind, {**SMALL[kind], "dropout": 0.5})
    check(families, steps, model, TOLERANCES.get(kind, EXACT), random=True)


@pytest.mark.parametrize("kind", TRANSPOSED)
def test_gpt2(families, steps, kind):
    check(families, steps, adapted(families, "gpt2", kind, SMALL[kind]), EXACT)


@pytest.mark.parametrize("kind", EXPERTS)
@pytest.mark.parametrize("family", ["qwen3_moe", "deepseek_v3"])
def test_experts(families, steps, family, kind):
    settings = dict(SMALL[kind])
    if kind == "dora":
        # PEFT takes the experts for linears too, on whose parameters it has no DoRA.
        settings["target_modules"] = ["o_proj"]
    if kind == "ia3":
        settings |= {"target_modules": ["o_proj"], "options": {"feedforward_modules": []}}
    check(families, steps, adapted(families, family, kind, settings), EXACT)


def test_lora_on_the_parameters_of_experts(families, steps):
    settings = {"target_modules": ["q_proj"], "options": {"target_parameters": ["mlp.experts.down_proj"]}}
    model = adapted(families, "qwen3_moe", "lora", {**SMALL["lora"], **settings})
    assert any("experts" in name for name, parameter in model.named_parameters() if parameter.requires_grad)
    check(families, steps, model, EXACT)


@pytest.mark.parametrize("kind", ["lora", "dora", "ia3", "oft", "loha"])
def test_float32(families, steps, kind):
    check(families, steps, adapted(families, "llama", kind, SMALL[kind], torch.float32), 1e-5)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_modules_saved_in_full(families, steps, family):
    saved = {"llama": ["embed_tokens", "lm_head", "up_proj", "norm"], "gpt2": ["wte", "ln_f"]}[family]
    targets = {"llama": ["q_proj", "v_proj"], "gpt2": ["c_attn"]}[family]
    settings = {**SMALL["lora"], "target_modules": targets, "modules_to_save": saved}
    check(families, steps, adapted(families, family, "lora", settings), EXACT)


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2"])
def test_trained_rows_of_the_embedding(families, steps, family):
    settings = {**SMALL["lora"], "target_modules": ["q_proj", "v_proj"], "options": {"trainable_token_indices": [7, 9]}}
    if family == "gpt2":
        settings = {**settings, "target_modules": ["c_attn"]}
    if family != "llama":
        settings["options"] = {"trainable_token_indices": {"wte" if family == "gpt2" else "embed_tokens": [7, 9]}}
    check(families, steps, adapted(families, family, "lora", settings), 2e-7 if family == "gemma2" else EXACT)


@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt2"])
@pytest.mark.parametrize("with_adapter", [False, True])
def test_added_token(families, steps, family, with_adapter):
    """The gradient of an added token's row, of the embedding and of a tied or untied head."""
    model = families.build(family)
    (token,) = add_tokens(model, AddedTokens(1))
    if with_adapter:
        config = AdapterConfig(kind="lora", rank=4, alpha=8.0)
        model = add_adapter(model, config, task="causal_lm", added_tokens=[token]).double().train()
    inputs = families.sample_inputs(unwrapped(model))
    inputs["input_ids"][:, 3:12:2] = token
    inputs["labels"][:, 3:12:2] = token
    chosen = torch.tensor([[2, 3, 4, 7, 9, 12], [1, 2, 3, 6, 8, 11]])
    _, want = steps.reference(model, inputs, chosen)
    rows = [g for name, g in want.items() if "trainable_tokens" in name or g.shape[0] == token + 1]
    assert len(rows) == (2 if family == "llama" else 1)
    assert all(row[-1].norm() > 0 for row in rows)
    for retain_linears in (False, True):
        _, got, fallbacks = steps.selective(model, inputs, chosen, retain_linears=retain_linears)
        assert not fallbacks
        assert steps.worst_error(got, want) < (2e-7 if family == "gemma2" else EXACT)


def test_merging_and_unmerging_while_selection_is_enabled(families, steps):
    model = adapted(families, "llama", "dora", {**SMALL["dora"], "options": {"bias": "all"}})
    inputs = families.sample_inputs(model.get_base_model())
    chosen = steps.positions(model, inputs)
    want_loss, want = steps.reference(model, inputs, chosen)
    framework.enable_token_selection(model)

    def loss_and_gradients():
        with framework.fixed_selection(model, chosen):
            loss = model(**inputs).loss
        if loss.requires_grad:
            loss.backward()
        return loss.detach(), steps.collect(model)

    model.merge_adapter()
    merged_loss, _ = loss_and_gradients()
    torch.testing.assert_close(merged_loss, want_loss)
    model.unmerge_adapter()
    loss, got = loss_and_gradients()
    torch.testing.assert_close(loss, want_loss)
    assert steps.worst_error(got, want) < EXACT
    framework.disable_token_selection(model)
    assert {type(m) for m in model.modules() if isinstance(m, nn.Linear) and "retention" in type(m).__module__} == set()


def test_merged_model_is_plain_after_selection_ends(families):
    model = adapted(families, "llama", "lora", SMALL["lora"])
    plain = copy.deepcopy(model).merge_and_unload()
    framework.enable_token_selection(model)
    merged = model.merge_and_unload()
    framework.disable_token_selection(merged)
    assert [type(module) for module in merged.modules()] == [type(module) for module in plain.modules()]
    for name, tensor in plain.state_dict().items():
        assert torch.equal(merged.state_dict()[name], tensor), name


def test_adapter_that_mixes_tokens_falls_back_even_at_its_start(families, steps):
    """Lily routes by a mean over all tokens; at its start it adds nothing, so that no comparison shows it."""
    base = families.build("llama")
    torch.manual_seed(3)
    model = get_peft_model(base, LilyConfig(r=4, target_modules="all-linear")).double().train()
    inputs = families.sample_inputs(base)
    chosen = steps.positions(model, inputs)
    _, _, fallbacks = steps.selective(model, inputs, chosen)
    assert len(fallbacks) == 2 and "Lily" in next(iter(fallbacks.values()))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * 0.05)
    _, want = steps.reference(model, inputs, chosen, fallbacks)
    _, got, _ = steps.selective(model, inputs, chosen)
    assert steps.worst_error(got, want) < EXACT


class OwnGenerator(nn.Module):
    """Noise from a generator that nobody else knows."""

    def __init__(self):
        super().__init__()
        self.generator = torch.Generator().manual_seed(0)

    def forward(self, hidden):
        return hidden + torch.randn(hidden.shape, generator=self.generator, dtype=hidden.dtype)


class UnknownDraw(nn.Module):
    """Noise by a function that the replay does not intercept."""

    def forward(self, hidden):
        return hidden + 1e-9 * torch.poisson(torch.full_like(hidden, 3.0))


def test_noise_of_an_own_generator_is_replayed(families, steps):
    model = families.build("llama")
    for layer in model.model.layers:
        layer.mlp.act_fn = nn.Sequential(layer.mlp.act_fn, OwnGenerator())
    inputs = families.sample_inputs(model)
    chosen = steps.positions(model, inputs)

    def rewind():
        for module in model.modules():
            if isinstance(module, OwnGenerator):
                module.generator.manual_seed(0)

    state = framework.enable_token_selection(model)
    with framework.fixed_selection(model, chosen):
        model(**inputs)
        assert not state.retention.fallbacks
        rewind()
        model(**inputs).loss.backward()
    framework.disable_token_selection(model)
    got = steps.collect(model)
    rewind()
    _, want = steps.reference(model, inputs, chosen)
    assert steps.worst_error(got, want) < EXACT


def test_draws_that_cannot_be_repeated_fall_back(families, steps):
    model = families.build("llama")
    model.model.layers[0].mlp.act_fn = nn.Sequential(model.model.layers[0].mlp.act_fn, UnknownDraw())
    inputs = families.sample_inputs(model)
    chosen = steps.positions(model, inputs)
    _, got, fallbacks = steps.selective(model, inputs, chosen)
    assert fallbacks == {"model.layers.0": "it draws random numbers in a way that a replay cannot repeat"}
    _, want = steps.reference(model, inputs, chosen, fallbacks)
    assert steps.worst_error(got, want) < EXACT


def test_weight_sent_through_a_linear_is_not_taken_for_tokens(families, steps):
    """A matrix with as many rows as the batch has tokens (48) looks like the batch's rows to a linear."""
    model = adapted(families, "llama", "peanut", SMALL["peanut"])
    assert model.config.intermediate_size == 48
    check(families, steps, model, EXACT)


def test_lora_through_the_library_alone(families, steps):
    """What a user's own loop does: PEFT's call, then ours."""
    model = get_peft_model(families.build("llama"), LoraConfig(r=4, target_modules="all-linear", use_dora=True))
    check(families, steps, model.double().train(), EXACT)
