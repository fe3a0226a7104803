"""Sizes read without weights, and whether data fits a model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import PreTrainedTokenizerFast

from framework.config import AdapterConfig
from framework.errors import UserError
from framework.models import Architecture, check_compatibility, count_parameters, load_model, read_architecture

LLAMA_13B = {
    "model_type": "llama",
    "hidden_size": 5120,
    "intermediate_size": 13824,
    "num_hidden_layers": 40,
    "num_attention_heads": 40,
    "num_key_value_heads": 40,
    "vocab_size": 32000,
    "max_position_embeddings": 4096,
}
LORA = AdapterConfig(kind="lora", rank=4, alpha=8.0, target_modules=["q_proj", "down_proj"])


def tokenizer_of(size: int) -> PreTrainedTokenizerFast:
    vocabulary = {f"t{index}": index for index in range(size)}
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer(WordLevel(vocabulary, unk_token="t0")))


def test_thirteen_billion_parameters_by_hand() -> None:
    hidden, inner, vocabulary, blocks = 5120, 13824, 32000, 40
    block = 4 * hidden * hidden + 3 * hidden * inner + 2 * hidden
    expected = 2 * vocabulary * hidden + blocks * block + hidden
    assert read_architecture(path=None, from_config=LLAMA_13B) == Architecture(
        family="llama",
        parameters=expected,
        trainable_parameters=expected,
        blocks=40,
        hidden_size=5120,
        vocab_size=32000,
        max_positions=4096,
        attention_heads=40,
        key_value_heads=40,
    )


def test_adapter_is_counted_and_only_it_is_trained() -> None:
    plain = read_architecture(path=None, from_config=LLAMA_13B)
    adapted = read_architecture(path=None, from_config=LLAMA_13B, adapter=LORA)
    added = 40 * 4 * ((5120 + 5120) + (13824 + 5120))
    assert (adapted.trainable_parameters, adapted.parameters) == (added, plain.parameters + added)


@pytest.mark.parametrize(
    ("family", "task"),
    [
        ("llama", "causal_lm"),
        ("qwen2", "causal_lm"),
        ("gpt2", "causal_lm"),
        ("mixtral", "causal_lm"),
        ("roberta", "masked_lm"),
        ("vit", "image_classification"),
    ],
)
@pytest.mark.parametrize("with_adapter", [False, True])
def test_counts_are_those_of_the_loaded_model(family_config: Any, family: str, task: str, with_adapter: bool) -> None:
    adapter = AdapterConfig(kind="lora", rank=2, alpha=4.0) if with_adapter else None
    described = read_architecture(path=None, from_config=family_config(family), task=task, adapter=adapter)
    model = load_model(
        path=None,
        from_config=family_config(family),
        task=task,
        dtype=torch.float32,
        attention="sdpa",
        seed=0,
        adapter=adapter,
    )
    assert (described.parameters, described.trainable_parameters) == count_parameters(model)
    assert (described.family, described.blocks, described.hidden_size) == (family, 2, 32)


@pytest.mark.parametrize(
    ("family", "task", "sizes"),
    [
        ("llama", "causal_lm", (64, 128, 4, 2)),
        ("gpt2", "causal_lm", (64, 96, 4, 4)),
        ("bert", "masked_lm", (64, 80, 4, 4)),
        ("roberta", "masked_lm", (64, 64, 4, 4)),
        ("bloom", "causal_lm", (64, None, 4, 4)),
        ("vit", "image_classification", (None, None, 4, 4)),
    ],
)
def test_tokens_positions_and_heads(family_config: Any, family: str, task: str, sizes: tuple[Any, ...]) -> None:
    found = read_architecture(path=None, from_config=family_config(family), task=task, attention="eager")
    assert (found.vocab_size, found.max_positions, found.attention_heads, found.key_value_heads) == sizes


def test_longest_sequence_runs_and_one_more_does_not(family_config: Any) -> None:
    for family, task in (("gpt2", "causal_lm"), ("roberta", "masked_lm"), ("bert", "masked_lm")):
        model = load_model(
            path=None,
            from_config=family_config(family),
            task=task,
            dtype=torch.float32,
            attention="sdpa",
            seed=0,
        ).eval()
        limit = read_architecture(path=None, from_config=family_config(family), task=task).max_positions
        model(torch.full((1, limit), 5))
        with pytest.raises((IndexError, RuntimeError)):
            model(torch.full((1, limit + 1), 5))


def test_local_config_without_weights_is_enough(tmp_path: Path, family_config: Any) -> None:
    (tmp_path / "config.json").write_text(json.dumps(family_config("llama")))
    from_path = read_architecture(path=str(tmp_path), from_config=None)
    assert from_path == read_architecture(path=None, from_config=family_config("llama"))
    # beside a path, the values in the run's config are what planning goes by
    assert read_architecture(path="lab/unreachable", from_config=family_config("llama")) == from_path


def test_what_fits_passes(family_config: Any) -> None:
    architecture = read_architecture(path=None, from_config=family_config("llama"))
    check_compatibility(architecture, tokenizer_of(64), 128)
    check_compatibility(architecture, tokenizer_of(10), 2)


def test_both_misfits_are_reported_together(family_config: Any) -> None:
    architecture = read_architecture(path=None, from_config=family_config("llama"))
    with pytest.raises(UserError) as caught:
        check_compatibility(architecture, tokenizer_of(70), 129)
    message = str(caught.value)
    assert "data.sequence_length: 129 is more than the 128 positions" in message
    assert "ids up to 69 ('t69')" in message and "embeds 64 tokens" in message and "at least 70" in message
    assert caught.value.exit_code == 2


def test_added_tokens_count(family_config: Any) -> None:
    tokenizer = tokenizer_of(64)
    tokenizer.add_special_tokens({"pad_token": "<pad>"})
    architecture = read_architecture(path=None, from_config=family_config("llama"))
    with pytest.raises(UserError, match=r"ids up to 64 \('<pad>'\)"):
        check_compatibility(architecture, tokenizer, 16)
