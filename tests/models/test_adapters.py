"""Adapters through PEFT: what is trained, in which dtype, tied embeddings, and what is refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from peft import PeftModel

from framework.config import AdapterConfig
from framework.errors import UserError
from framework.models import load_model


def load(
    values: dict[str, Any], *, task: str = "causal_lm", dtype: Any = torch.float32, seed: int = 0, **lora: Any
) -> Any:
    adapter = AdapterConfig(kind="lora", **{"rank": 2, "alpha": 4.0, **lora})
    return load_model(
        path=None, from_config=values, task=task, dtype=dtype, attention="sdpa", seed=seed, adapter=adapter
    )


def trainable(model: torch.nn.Module) -> set[str]:
    return {name.removeprefix("base_model.model.") for name, tensor in model.named_parameters() if tensor.requires_grad}


def test_listed_targets_get_an_adapter_and_nothing_else_is_trained(family_config: Any) -> None:
    model = load(family_config("llama"), target_modules=["q_proj", "mlp.up_proj"])
    assert isinstance(model, PeftModel)
    assert trainable(model) == {
        f"model.layers.{block}.{name}.lora_{matrix}.default.weight"
        for block in (0, 1)
        for name in ("self_attn.q_proj", "mlp.up_proj")
        for matrix in "AB"
    }


def test_all_linear_leaves_the_head_out(family_config: Any) -> None:
    names = {name.split(".lora_")[0].rpartition(".")[2] for name in trainable(load(family_config("llama")))}
    assert names == {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}


def test_all_linear_knows_the_transposed_layers_of_gpt2(family_config: Any) -> None:
    names = {name.split(".lora_")[0].rpartition(".")[2] for name in trainable(load(family_config("gpt2")))}
    assert names == {"c_attn", "c_proj", "c_fc"}


def test_regular_expression_matches_full_names(family_config: Any) -> None:
    model = load(family_config("llama"), target_modules=r".*layers\.1\..*\.v_proj")
    assert {name.split(".lora_")[0] for name in trainable(model)} == {"model.layers.1.self_attn.v_proj"}


@pytest.mark.parametrize(
    ("weights", "adapter"), [(torch.float32, torch.float32), (torch.float16, torch.float32), (torch.bfloat16,) * 2]
)
def test_dtype_of_the_adapter(family_config: Any, weights: torch.dtype, adapter: torch.dtype) -> None:
    model = load(family_config("llama"), dtype=weights)
    dtypes = {(tensor.requires_grad, tensor.dtype) for tensor in model.parameters()}
    assert dtypes == {(True, adapter), (False, weights)}


def test_adapter_starts_as_the_base_model_and_depends_on_the_seed_alone(family_config: Any) -> None:
    ids = torch.arange(3, 19).reshape(2, 8)
    base = load_model(
        path=None,
        from_config=family_config("llama"),
        task="causal_lm",
        dtype=torch.float32,
        attention="sdpa",
        seed=1,
    )
    torch.manual_seed(77)
    state = torch.get_rng_state()
    first = load(family_config("llama"), seed=1)
    assert torch.equal(torch.get_rng_state(), state)
    second, other = load(family_config("llama"), seed=1), load(family_config("llama"), seed=2)
    assert torch.equal(first.eval()(ids).logits, base.eval()(ids).logits)
    name = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.default.weight"
    assert torch.equal(first.state_dict()[name], second.state_dict()[name])
    assert not torch.equal(first.state_dict()[name], other.state_dict()[name])


@pytest.mark.parametrize("names", [["embed_tokens"], ["lm_head"], ["embed_tokens", "lm_head"], ["model.embed_tokens"]])
def test_saved_embedding_stays_tied_to_the_head(family_config: Any, names: list[str]) -> None:
    model = load(family_config("qwen2"), target_modules=["q_proj"], modules_to_save=names)
    embedding = model.get_input_embeddings().modules_to_save["default"]
    head = model.get_output_embeddings().modules_to_save["default"]
    assert embedding.weight is head.weight and embedding.weight.requires_grad
    assert [name for name in trainable(model) if "lora" not in name] == [
        "model.embed_tokens.modules_to_save.default.weight"
    ]


def test_saved_embedding_stays_tied_where_only_the_head_has_a_usual_name(family_config: Any) -> None:
    model = load(family_config("gpt2"), target_modules=["c_attn"], modules_to_save=["wte"])
    embedding = model.get_input_embeddings().modules_to_save["default"]
    assert embedding.weight is model.get_output_embeddings().modules_to_save["default"].weight


def test_untied_embedding_and_head_are_saved_apart(family_config: Any) -> None:
    model = load(family_config("llama"), target_modules=["q_proj"], modules_to_save=["embed_tokens", "lm_head"])
    assert {name for name in trainable(model) if "lora" not in name} == {
        "model.embed_tokens.modules_to_save.default.weight",
        "lm_head.modules_to_save.default.weight",
    }


def test_tied_embedding_that_cannot_stay_tied_is_refused(family_config: Any) -> None:
    with pytest.raises(UserError, match=r"modules_to_save: bert\.embeddings\.word_embeddings and .* cannot keep them"):
        load(family_config("bert"), task="masked_lm", modules_to_save=["word_embeddings"])


@pytest.mark.parametrize("targets", [["q_proj", "embed_tokens"], ["lm_head"], r".*(q_proj|lm_head)|lm_head"])
def test_adapter_on_a_tied_embedding_is_refused(family_config: Any, targets: Any) -> None:
    with pytest.raises(UserError, match=r"target_modules: .* shares its weight .*modules_to_save"):
        load(family_config("qwen2"), target_modules=targets)


@pytest.mark.parametrize(("family", "head"), [("llama", "score"), ("bert", "classifier"), ("vit", "classifier")])
def test_classification_head_is_trained_with_the_adapter(family_config: Any, family: str, head: str) -> None:
    task = "image_classification" if family == "vit" else "sequence_classification"
    names = trainable(load(family_config(family), task=task))
    assert f"{head}.modules_to_save.default.weight" in names
    assert not any(f"{head}.lora" in name for name in names)


def test_unknown_names_are_listed_with_those_that_exist(family_config: Any) -> None:
    with pytest.raises(UserError) as caught:
        load(family_config("llama"), target_modules=["q_proj", "query", "w1"], modules_to_save=["norm", "head"])
    assert str(caught.value).splitlines() == [
        "model.adapter.target_modules: query, w1: not in this model",
        "model.adapter.modules_to_save: head: not in this model",
        "linear modules of this model: q_proj, k_proj, v_proj, o_proj, gate_proj, up_proj, down_proj, lm_head",
    ]


@pytest.mark.parametrize(
    ("targets", "message"),
    [("q_proj", "matches no linear module by its full name"), ("(", "not a regular expression"), (["norm"], "norm")],
)
def test_targets_that_match_nothing_are_refused(family_config: Any, targets: Any, message: str) -> None:
    with pytest.raises(UserError, match=rf"model\.adapter\.target_modules: .*{message}"):
        load(family_config("llama"), target_modules=targets)


def load_kind(values: dict[str, Any], kind: str, **settings: Any) -> Any:
    adapter = AdapterConfig(kind=kind, **settings)
    return load_model(
        path=None,
        from_config=values,
        task="causal_lm",
        dtype=torch.float32,
        attention="sdpa",
        seed=0,
        adapter=adapter,
    )


def test_unknown_options_are_reported_with_the_other_problems(family_config: Any) -> None:
    with pytest.raises(UserError) as caught:
        load(family_config("llama"), target_modules=["query"], options={"use_rslor": True, "zzz": 1})
    lines = str(caught.value).splitlines()
    assert lines[0] == "model.adapter.options.use_rslor: not an option of LoraConfig; did you mean use_rslora?"
    assert lines[1].startswith(
        "model.adapter.options.zzz: not an option of LoraConfig; it has alora_invocation_tokens,"
    )
    assert lines[2] == "model.adapter.target_modules: query: not in this model"


def test_options_reach_the_method(family_config: Any) -> None:
    model = load(family_config("llama"), rank=4, alpha=8.0, options={"use_rslora": True, "bias": "lora_only"})
    config = model.peft_config["default"]
    assert (config.r, config.lora_alpha, config.use_rslora, config.bias) == (4, 8.0, True, "lora_only")
    assert model.base_model.model.model.layers[0].self_attn.q_proj.scaling["default"] == 8.0 / 4**0.5
    oft = load_kind(family_config("llama"), "oft", rank=4).peft_config["default"]
    assert (oft.r, oft.oft_block_size) == (4, 0)
    dora = load_kind(family_config("llama"), "dora", rank=4, alpha=8.0).peft_config["default"]
    assert dora.use_dora


@pytest.mark.parametrize(
    ("kind", "settings", "message"),
    [
        ("boft", {"options": {"boft_block_size": 5}}, "must be divisible by boft_block_size"),
        ("lora", {"rank": 2, "alpha": 4.0, "options": {"init_lora_weights": "best"}}, "Unknown initialization"),
        ("c3a", {}, "block size should be a factor"),
        ("vblora", {"rank": 2, "options": {"vector_length": 5}}, "must be divisible"),
    ],
)
def test_values_that_peft_refuses(family_config: Any, kind: str, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=rf"model\.adapter: PEFT cannot add {kind} .*{message}"):
        load_kind(family_config("llama"), kind, **settings)


def test_layers_that_a_method_does_not_know_are_refused(family_config: Any) -> None:
    with pytest.raises(UserError, match=r"PEFT cannot add hra to this model: .*Conv1D.* is not supported"):
        load_kind(family_config("gpt2"), "hra", rank=2)


def test_default_targets_suit_the_method(family_config: Any) -> None:
    def adapted(model: Any) -> set[str]:
        names = (name.rpartition(".")[0] for name in trainable(model))
        return {part for name in names for part in name.split(".") if part in KNOWN}

    KNOWN = {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj", "lm_head", "embed_tokens"} | {
        "input_layernorm",
        "post_attention_layernorm",
        "norm",
    }
    assert adapted(load_kind(family_config("llama"), "ia3")) == {"k_proj", "v_proj", "down_proj"}
    assert adapted(load_kind(family_config("llama"), "ln_tuning")) == {
        "input_layernorm",
        "post_attention_layernorm",
        "norm",
    }
    assert adapted(load_kind(family_config("llama"), "hra", rank=2)) == KNOWN - {
        "lm_head",
        "embed_tokens",
        "input_layernorm",
        "post_attention_layernorm",
        "norm",
    }
    tokens = load_kind(family_config("llama"), "trainable_tokens", options={"token_indices": [5]})
    assert adapted(tokens) == {"embed_tokens"}


def test_targets_that_a_method_cannot_have(family_config: Any) -> None:
    smollm = {"model_type": "smollm3", **{k: v for k, v in family_config("llama").items() if k != "model_type"}}
    with pytest.raises(UserError, match="PEFT has no IA³ modules for smollm3; name the projections"):
        load_kind(smollm, "ia3")
    with pytest.raises(UserError, match="the method adapts norms, name these"):
        load_kind(family_config("llama"), "ln_tuning", target_modules="all-linear")
    with pytest.raises(UserError, match="q_proj: not in this model"):
        load_kind(family_config("llama"), "ln_tuning", target_modules=["q_proj"])


def test_tied_embedding_is_saved_by_lora_only(family_config: Any) -> None:
    with pytest.raises(UserError, match=r'which PEFT keeps tied beside kind "lora" or "dora" only'):
        load_kind(family_config("qwen2"), "hra", rank=2, modules_to_save=["embed_tokens"])


def test_modules_saved_by_a_method_without_them(family_config: Any) -> None:
    with pytest.raises(UserError, match=r'modules_to_save: kind "trainable_tokens" saves no further modules'):
        load_kind(
            family_config("llama"), "trainable_tokens", options={"token_indices": [5]}, modules_to_save=["lm_head"]
        )
