"""Added tokens: rows of the embedding and of the head, how they start, and which are trained beside an adapter."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from framework.config import AdapterConfig
from framework.errors import UserError
from framework.models import AddedTokens, load_model, read_architecture

LORA = AdapterConfig(kind="lora", rank=2, alpha=4.0, target_modules=["q_proj"])


def load(values: dict[str, Any], added: AddedTokens | None, **options: Any) -> Any:
    return load_model(
        **{
            "path": None,
            "from_config": values,
            "task": "causal_lm",
            "dtype": torch.float32,
            "attention": "sdpa",
            "seed": 0,
            "added_tokens": added,
            **options,
        }
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_new_rows_start_as_the_mean_of_the_others(family_config: Any, family: str, dtype: torch.dtype) -> None:
    plain = load(family_config(family), None, dtype=dtype)
    grown = load(family_config(family), AddedTokens(2, (64, 65), multiple=8), dtype=dtype)
    assert grown.config.vocab_size == 72
    for before, after in (
        (plain.get_input_embeddings().weight, grown.get_input_embeddings().weight),
        (plain.lm_head.weight, grown.lm_head.weight),
    ):
        assert after.shape == (72, 32) and after.dtype == dtype
        assert torch.equal(after[:64], before)
        assert torch.equal(after[64:], before.mean(0, dtype=torch.float32).to(dtype).expand(8, -1))
    tied = family == "qwen2"
    assert (grown.lm_head.weight is grown.get_input_embeddings().weight) == tied
    ids = torch.arange(3, 19).reshape(2, 8)
    assert torch.equal(grown.eval()(ids).logits[..., :64], plain.eval()(ids).logits)


def test_spare_rows_of_the_embedding_are_used_before_it_grows(family_config: Any) -> None:
    """A tokenizer of 50 tokens on an embedding of 64: the row of the new token was never trained."""
    plain = load(family_config("llama"), None)
    same = load(family_config("llama"), AddedTokens(2, (50, 51)))
    assert same.config.vocab_size == 64
    for before, after in zip(plain.parameters(), same.parameters(), strict=True):
        if after.shape[0] != 64 or before.dim() != 2:
            continue
        changed = (before != after).any(1).nonzero()[:, 0].tolist()
        assert changed == [50, 51]
        assert torch.equal(after[50], before[:50].mean(0))


def test_counts_with_and_without_a_tokenizer(family_config: Any) -> None:
    values = family_config("llama")
    plain = read_architecture(path=None, from_config=values)
    two = AddedTokens(2, (64, 65))
    assert read_architecture(path=None, from_config=values, added_tokens=AddedTokens(2)) == read_architecture(
        path=None, from_config=values, added_tokens=two
    )
    grown = read_architecture(path=None, from_config=values, added_tokens=two)
    assert grown.vocab_size == 66
    assert grown.parameters == plain.parameters + 2 * 2 * 32
    adapted = read_architecture(path=None, from_config=values, added_tokens=two, adapter=LORA)
    without = read_architecture(path=None, from_config=values, adapter=LORA)
    assert adapted.trainable_parameters == without.trainable_parameters + 2 * 2 * 32


def trainable(model: torch.nn.Module) -> dict[str, tuple[int, ...]]:
    return {
        name.removeprefix("base_model.model."): tuple(parameter.shape)
        for name, parameter in model.named_parameters()
        if parameter.requires_grad and "lora_" not in name
    }


def test_adapter_trains_the_added_rows_only(family_config: Any) -> None:
    added = AddedTokens(2, (64, 65))
    rows = "token_adapter.trainable_tokens_delta.default"
    tied = load(family_config("qwen2"), added, adapter=LORA)
    assert trainable(tied) == {f"model.embed_tokens.{rows}": (2, 32)}
    untied = load(family_config("llama"), added, adapter=LORA)
    assert trainable(untied) == {f"model.embed_tokens.{rows}": (2, 32), f"lm_head.{rows}": (2, 32)}
    alone = load(family_config("llama"), added, adapter=AdapterConfig(kind="trainable_tokens"))
    assert trainable(alone) == {
        "model.embed_tokens.trainable_tokens_delta.default": (2, 32),
        "lm_head.trainable_tokens_delta.default": (2, 32),
    }


def test_whole_embedding_is_trained_where_it_is_named(family_config: Any) -> None:
    added = AddedTokens(1, (64,))
    saved = LORA.model_copy(update={"modules_to_save": ["embed_tokens"]})
    for name in ("embed_tokens", "lm_head", "model.embed_tokens"):
        named = LORA.model_copy(update={"modules_to_save": [name]})
        tied = load(family_config("qwen2"), added, adapter=named)
        assert trainable(tied) == {"model.embed_tokens.modules_to_save.default.weight": (65, 32)}
    untied = load(family_config("llama"), added, adapter=saved)
    assert trainable(untied) == {
        "model.embed_tokens.modules_to_save.default.weight": (65, 32),
        "lm_head.token_adapter.trainable_tokens_delta.default": (1, 32),
    }
    both = AdapterConfig(kind="ia3", modules_to_save=["embed_tokens", "lm_head"])
    assert trainable(load(family_config("llama"), added, adapter=both)).keys() >= {
        "model.embed_tokens.modules_to_save.default.weight",
        "lm_head.modules_to_save.default.weight",
    }


def test_what_cannot_train_the_rows_is_refused(family_config: Any) -> None:
    added = AddedTokens(1, (64,))
    head_only = AdapterConfig(kind="ia3", modules_to_save=["lm_head"])
    with pytest.raises(UserError, match=r'"ia3" cannot train single rows; name model\.embed_tokens in .*modules_to_sa'):
        load(family_config("llama"), added, adapter=head_only)
    clash = LORA.model_copy(update={"options": {"trainable_token_indices": [5]}})
    with pytest.raises(UserError, match=r"options\.trainable_token_indices: the rows of model\.added_tokens are"):
        load(family_config("llama"), added, adapter=clash)
    phi = {"model_type": "phi", **{k: v for k, v in family_config("llama").items() if k != "model_type"}}
    targets = LORA.model_copy(update={"target_modules": "all-linear"})
    with pytest.raises(UserError, match=r"the head lm_head has a bias.*name model\.embed_tokens and lm_head in"):
        load(phi, added, adapter=targets)
    with pytest.raises(UserError, match=r"the head cls\.predictions\.decoder has a bias.*leave out model\.adapter or"):
        load(family_config("bert"), added, adapter=targets, task="masked_lm")
    with pytest.raises(UserError, match=r"model\.added_tokens: vit has no embedding"):
        load(family_config("vit"), added, task="image_classification")


def test_bias_of_a_head_grows_with_it(family_config: Any) -> None:
    phi = {"model_type": "phi", **{k: v for k, v in family_config("llama").items() if k != "model_type"}}
    model = load(phi, AddedTokens(1, (64,)))
    assert model.lm_head.bias.shape == (65,)
    assert torch.equal(model.lm_head.bias[64], model.lm_head.bias[:64].mean())
