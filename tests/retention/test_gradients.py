"""Token-selective gradients against the slow reference, on stock models of many families, in float64."""

import pytest
import torch
from peft import LoraConfig, get_peft_model

import framework
from framework.selection import Selection

# A gradient that is summed in float32 (norms of the Gemma and Cohere kind, routers) differs by the order of the sum: a
# float32 unit in the last place is 1.2e-7.
EXACT, FLOAT32_PARTS = 1e-10, 2e-7
FAMILIES = {
    **dict.fromkeys(("llama", "mistral", "qwen2", "qwen3", "phi", "phi3", "olmo2", "granite", "starcoder2"), EXACT),
    **dict.fromkeys(("opt", "gpt2", "gpt_neox", "stablelm", "glm", "smollm3"), EXACT),
    **dict.fromkeys(("mixtral", "qwen3_moe", "gpt_oss", "deepseek_v3"), EXACT),
    **dict.fromkeys(("bert", "roberta", "electra", "modernbert", "vit"), EXACT),
    **dict.fromkeys(("gemma2", "gemma3_text", "cohere"), FLOAT32_PARTS),
}
FALLING_BACK = {"mamba": 2, "jamba": 1, "qwen3_next": 1, "zamba2": 4, "deberta-v2": 2, "falcon": 2}


@pytest.mark.parametrize("padding", [0, 5])
@pytest.mark.parametrize("family", FAMILIES)
def test_gradients_equal_the_reference(families, steps, family, padding):
    model = families.build(family)
    inputs = families.sample_inputs(model, padding=padding)
    chosen = steps.positions(model, inputs)
    want_loss, want = steps.reference(model, inputs, chosen)
    for retain_linears in (False, True):
        loss, got, fallbacks = steps.selective(model, inputs, chosen, retain_linears=retain_linears)
        assert not fallbacks
        torch.testing.assert_close(loss, want_loss, rtol=1e-6, atol=0)
        assert steps.worst_error(got, want) < FAMILIES[family]


@pytest.mark.parametrize("family", FALLING_BACK)
def test_blocks_that_mix_tokens_elsewhere_fall_back(families, steps, family):
    model = families.build(family)
    inputs = families.sample_inputs(model)
    chosen = steps.positions(model, inputs)
    _, got, fallbacks = steps.selective(model, inputs, chosen, strategy="uniform", ratio=0.5)
    assert len(fallbacks) == FALLING_BACK[family]
    _, want = steps.reference(model, inputs, chosen, fallbacks)
    assert steps.worst_error(got, want) < FLOAT32_PARTS


@pytest.mark.parametrize("family", ["llama", "mistral", "gemma2", "gpt_neox", "deepseek_v3", "qwen3_moe", "gpt2"])
def test_packed_documents(families, steps, family):
    model = families.build(family)
    inputs = families.sample_inputs(model, padding=0)
    lengths = [[9, 1, 14], [5, 19]]
    inputs["position_ids"] = torch.stack([torch.cat([torch.arange(n) for n in row]) for row in lengths])
    chosen = steps.positions(model, inputs, selected=10)
    _, want = steps.reference(model, inputs, chosen)
    _, got, fallbacks = steps.selective(model, inputs, chosen)
    assert not fallbacks
    assert steps.worst_error(got, want) < (FLOAT32_PARTS if family in ("gemma2", "deepseek_v3") else EXACT)


@pytest.mark.parametrize("family", ["llama", "opt", "gpt2", "gpt_neox", "bert", "vit"])
def test_dropout_is_replayed(families, steps, family):
    rates = ("resid_pdrop", "embd_pdrop", "dropout", "hidden_dropout", "hidden_dropout_prob")
    known = families.tiny_config(family).to_dict()
    model = families.build(family, **{rate: 0.3 for rate in rates if rate in known})
    if family == "llama":
        model = get_peft_model(model, LoraConfig(r=4, target_modules="all-linear", lora_dropout=0.3)).double().train()
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "lora_B" in name:
                    parameter.normal_(0, 0.3)
    inputs = families.sample_inputs(model)
    chosen = steps.positions(model, inputs)
    want_loss, want = steps.reference(model, inputs, chosen)
    for retain_linears in (False, True):
        loss, got, fallbacks = steps.selective(model, inputs, chosen, retain_linears=retain_linears)
        assert not fallbacks
        torch.testing.assert_close(loss, want_loss, rtol=1e-6, atol=0)
        assert steps.worst_error(got, want) < EXACT
    other_loss, *_ = steps.selective(model, inputs, chosen, seed=1)
    assert abs(other_loss - want_loss) > 1e-4


def test_stochastic_depth_is_replayed(families, steps):
    """A draw per sequence, not per token: DINOv2 drops whole branches, and pools over all patches."""
    sizes = {"image_size": 20, "patch_size": 4, "num_labels": 7, "mlp_ratio": 2}
    model = families.build("dinov2", task="image_classification", drop_path_rate=0.4, **sizes)
    inputs = families.sample_inputs(model)
    chosen = steps.positions(model, inputs)
    want_loss, want = steps.reference(model, inputs, chosen)
    for retain_linears in (False, True):
        loss, got, fallbacks = steps.selective(model, inputs, chosen, retain_linears=retain_linears)
        assert not fallbacks and loss == want_loss
        assert steps.worst_error(got, want) < EXACT
    assert steps.selective(model, inputs, chosen, seed=1)[0] != want_loss


def test_attention_dropout_is_switched_off_and_said(families, steps):
    model = families.build("llama", attention_dropout=0.5)
    inputs = families.sample_inputs(model)
    chosen = steps.positions(model, inputs)
    _, want = steps.reference(families.build("llama"), inputs, chosen)
    with pytest.warns(UserWarning, match="dropout on attention probabilities is off"):
        _, got, _ = steps.selective(model, inputs, chosen)
    assert steps.worst_error(got, want) < EXACT


@pytest.mark.parametrize(("family", "targets"), [("llama", "all-linear"), ("gpt2", ["c_attn", "c_proj", "c_fc"])])
def test_lora_with_frozen_base(families, steps, family, targets):
    torch.manual_seed(3)
    config = LoraConfig(r=4, target_modules=targets, fan_in_fan_out=family == "gpt2")
    model = get_peft_model(families.build(family), config).double().train()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(0, 0.3)
    inputs = families.sample_inputs(model)
    chosen = steps.positions(model, inputs)
    _, want = steps.reference(model, inputs, chosen)
    assert all("lora_" in name for name in want)
    for retain_linears in (False, True):
        _, got, fallbacks = steps.selective(model, inputs, chosen, retain_linears=retain_linears)
        assert not fallbacks
        assert steps.worst_error(got, want) < EXACT


@pytest.mark.parametrize("frozen", ["model.embed_tokens", "model.layers.0", "model.layers.1", "model.norm"])
def test_frozen_parts(families, steps, frozen):
    model = families.build("llama")
    model.get_submodule(frozen).requires_grad_(False)
    inputs = families.sample_inputs(model)
    chosen = steps.positions(model, inputs)
    _, want = steps.reference(model, inputs, chosen)
    _, got, _ = steps.selective(model, inputs, chosen)
    assert not any(name.startswith(frozen) for name in want)
    assert steps.worst_error(got, want) < EXACT


@pytest.mark.parametrize("family", ["llama", "bert"])
def test_ragged_rows_and_fillers_get_and_send_nothing(families, steps, family):
    model = families.build(family)
    inputs = families.sample_inputs(model, padding=0)
    mask = torch.zeros(2, 24, dtype=torch.bool)
    mask[0, [1, 2, 5, 9, 15, 20]] = True
    mask[1, [3, 23]] = True
    chosen = Selection.of_mask(mask, torch.ones(2, 24))
    _, want = steps.reference(model, inputs, chosen)
    _, got, _ = steps.selective(model, inputs, chosen, normalization="selected")
    assert steps.worst_error(got, want) < EXACT


@pytest.mark.parametrize("retain_linears", [False, True])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.bfloat16, 2e-2), (torch.float16, 3e-3)])
def test_autocast(families, steps, dtype, tolerance, retain_linears):
    """The reference runs under the same autocast: what remains is the rounding of sums in another order."""
    model = families.build("llama", dtype=torch.float32)
    inputs = families.sample_inputs(model)
    chosen = steps.positions(model, inputs)
    with torch.autocast("cpu", dtype):
        _, want = steps.reference(model, inputs, chosen)
        _, got, fallbacks = steps.selective(model, inputs, chosen, retain_linears=retain_linears)
    assert not fallbacks
    assert all(g.dtype == torch.float32 for g in got.values())
    assert steps.worst_error(got, want) < tolerance


def test_autocast_ended_before_backward(families, steps):
    model = families.build("llama", dtype=torch.float32)
    inputs = families.sample_inputs(model)
    chosen = steps.positions(model, inputs)

    framework.enable_token_selection(model)
    results = []
    for inside in (True, False):
        with torch.autocast("cpu", torch.bfloat16):
            with framework.fixed_selection(model, chosen):
                loss = model(**inputs).loss
            if inside:
                loss.backward()
        if not inside:
            loss.backward()
        results.append(steps.collect(model))
    assert steps.worst_error(*results) < 1e-2
    framework.disable_token_selection(model)


@pytest.mark.parametrize(("kv_format", "limit"), [("int8", 0.02), ("int4", 0.1)])
@pytest.mark.parametrize("family", ["llama", "qwen3", "deepseek_v3", "gpt_neox", "bert"])
def test_quantised_keys_and_values_stay_within_a_bound(families, steps, family, kv_format, limit):
    model = families.build(family)
    inputs = families.sample_inputs(model)
    chosen = steps.positions(model, inputs)
    _, want = steps.reference(model, inputs, chosen)
    _, got, fallbacks = steps.selective(model, inputs, chosen, kv_format=kv_format)
    assert not fallbacks and got.keys() == want.keys()
    flat = [torch.cat([g[name].flatten() for name in want]) for g in (got, want)]
    error = float((flat[0] - flat[1]).norm() / flat[1].norm())
    assert limit / 100 < error < limit


def float64_loss(model, inputs):
    """The stock model's own loss, except that its loss function works in float32."""
    if "pixel_values" in inputs:
        return model(**inputs).loss
    logits = model(**{name: value for name, value in inputs.items() if name != "labels"}, use_cache=False).logits
    causal = "Masked" not in type(model).__name__
    pairs = (logits[:, :-1], inputs["labels"][:, 1:]) if causal else (logits, inputs["labels"])
    return torch.nn.functional.cross_entropy(pairs[0].flatten(0, 1), pairs[1].flatten())


@pytest.mark.parametrize("retain_linears", [False, True])
@pytest.mark.parametrize("family", ["llama", "gemma2", "mixtral", "bert", "vit"])
def test_ratio_one_equals_exact_training(families, steps, family, retain_linears):

    model = families.build(family)
    inputs = families.sample_inputs(model)
    want_loss = float64_loss(model, inputs)
    want_loss.backward()
    want = steps.collect(model)
    framework.enable_token_selection(model, strategy="uniform", ratio=1.0, retain_linears=retain_linears)
    loss = model(**inputs).loss
    loss.backward()
    framework.disable_token_selection(model)
    torch.testing.assert_close(loss, want_loss, rtol=1e-6, atol=0)
    tolerance = FLOAT32_PARTS if family == "gemma2" else EXACT
    assert steps.worst_error(steps.collect(model), want) < tolerance
