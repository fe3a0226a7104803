"""Tiny configs of several families, as a user would write them under `model.from_config`."""

from __future__ import annotations

from typing import Any

import pytest

_DECODER = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "vocab_size": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
_CONFIGS: dict[str, dict[str, Any]] = {
    "llama": {**_DECODER, "num_key_value_heads": 2, "max_position_embeddings": 128},
    "qwen2": {**_DECODER, "num_key_value_heads": 2, "max_position_embeddings": 128, "tie_word_embeddings": True},
    "bloom": {"hidden_size": 32, "n_layer": 2, "n_head": 4, "vocab_size": 64},
    "gpt2": {
        "n_embd": 32,
        "n_layer": 2,
        "n_head": 4,
        "n_positions": 96,
        "vocab_size": 64,
        "bos_token_id": 1,
        "eos_token_id": 2,
    },
    "mixtral": {**_DECODER, "num_key_value_heads": 2, "num_local_experts": 4, "num_experts_per_tok": 2},
    "bert": {**_DECODER, "max_position_embeddings": 80},
    "roberta": {**_DECODER, "max_position_embeddings": 66, "pad_token_id": 1, "bos_token_id": 0},
    "vit": {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "image_size": 16,
        "patch_size": 8,
    },
}


@pytest.fixture
def family_config() -> Any:
    """A function from a family and changes to a `model.from_config` value."""

    def build(family: str, **changes: Any) -> dict[str, Any]:
        return {"model_type": family, **_CONFIGS[family], **changes}

    return build
