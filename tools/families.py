"""Tiny random models of many families, and inputs for them: what tests and `check_families.py` run on."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from transformers import (
    CONFIG_MAPPING,
    AutoModelForCausalLM,
    AutoModelForImageClassification,
    AutoModelForMaskedLM,
    AutoModelForSequenceClassification,
    PreTrainedConfig,
    PreTrainedModel,
)

VOCABULARY = 99
# Model types of families whose text model has a type of its own.
ALIASES = {"gemma3": "gemma3_text"}
AUTO = {
    "causal_lm": AutoModelForCausalLM,
    "masked_lm": AutoModelForMaskedLM,
    "sequence_classification": AutoModelForSequenceClassification,
    "image_classification": AutoModelForImageClassification,
}

# Every family gets those of these that its config knows under this name or by its own alias.
COMMON: dict[str, Any] = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "rotary_dim": 4,
    "intermediate_size": 48,
    "vocab_size": VOCABULARY,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "use_cache": False,
    # Ten times the usual: with narrow layers attention would otherwise be uniform and hide errors.
    "initializer_range": 0.2,
    "init_std": 0.2,
}
# Dropout under all its names: off, so that runs can be compared.
DROPOUTS = (
    "attention_dropout",
    "attention_probs_dropout_prob",
    "attn_pdrop",
    "classifier_dropout",
    "dropout",
    "embd_pdrop",
    "embedding_dropout",
    "hidden_dropout",
    "hidden_dropout_prob",
    "resid_pdrop",
    "residual_dropout",
)
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
MASKED = {"task": "masked_lm"}
STATE_SPACE = {"head_dim": 8, "expand": 2}
MAMBA2 = {
    "mamba_n_heads": 8,
    "mamba_d_head": 8,
    "mamba_d_state": 4,
    "mamba_n_groups": 2,
    "mamba_d_conv": 3,
    "mamba_chunk_size": 5,
}
DELTA_NET = {
    "layer_types": ["linear_attention", "full_attention"],
    "linear_num_value_heads": 4,
    "linear_num_key_heads": 2,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "linear_conv_kernel_dim": 3,
}

# Differences from COMMON, by model type; "task" is ours (default: the first of AUTO that there is).
TINY: dict[str, dict[str, Any]] = {
    "llama": {},
    "mistral": {"sliding_window": 7},
    "qwen2": {},
    "qwen3": {},
    "gemma": {},
    "gemma2": {"sliding_window": 6, "query_pre_attn_scalar": 8},
    "gemma3_text": {
        "sliding_window": 6,
        "query_pre_attn_scalar": 8,
        "layer_types": ["sliding_attention", "full_attention"],
    },
    "phi": {},
    "phi3": {},
    "olmo": {},
    "olmo2": {},
    "opt": {"ffn_dim": 48, "word_embed_proj_dim": 32},
    "gpt2": {"n_inner": 48},
    "gpt_neox": {},
    "granite": {},
    "starcoder2": {"sliding_window": None},
    "stablelm": {},
    "cohere": {},
    "glm": {"partial_rotary_factor": 0.5},
    "smollm3": {"no_rope_layers": [1, 0]},
    "falcon": {"num_kv_heads": 2, "new_decoder_architecture": True, "alibi": False, "ffn_hidden_size": 48},
    "mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "qwen2_moe": {**EXPERTS, "shared_expert_intermediate_size": 24, "decoder_sparse_step": 1},
    "qwen3_moe": {**EXPERTS, "decoder_sparse_step": 1, "mlp_only_layers": []},
    "gpt_oss": {
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
        "sliding_window": 6,
        "layer_types": ["sliding_attention", "full_attention"],
    },
    "deepseek_v3": {
        "num_hidden_layers": 3,
        "first_k_dense_replace": 1,
        "num_key_value_heads": 4,
        "n_routed_experts": 4,
        "num_experts_per_tok": 2,
        "n_shared_experts": 1,
        "n_group": 2,
        "topk_group": 1,
        "moe_intermediate_size": 24,
        "q_lora_rank": 16,
        "kv_lora_rank": 12,
        "qk_nope_head_dim": 8,
        "qk_rope_head_dim": 4,
        "v_head_dim": 8,
    },
    # Token mixing outside the attention interface, in all blocks or in some: these fall back, or where neighbouring
    # tokens are selected they are replayed from their state.
    "mamba": {"state_size": 4, "conv_kernel": 3, "expand": 2},
    "falcon_mamba": {"state_size": 4, "conv_kernel": 3, "expand": 2},
    "mamba2": {**STATE_SPACE, "num_heads": 8, "state_size": 4, "n_groups": 2, "conv_kernel": 3, "chunk_size": 5},
    "bamba": {**MAMBA2, "attn_layer_indices": [1]},
    "falcon_h1": {**MAMBA2, "mamba_d_ssm": 64},
    "granitemoehybrid": {
        **MAMBA2,
        "layer_types": ["mamba", "attention"],
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
        "shared_intermediate_size": 24,
    },
    "nemotron_h": {
        "layers_block_type": ["mamba", "attention", "mlp"],
        "mamba_num_heads": 8,
        "mamba_head_dim": 8,
        "ssm_state_size": 4,
        "n_groups": 2,
        "conv_kernel": 3,
        "chunk_size": 5,
    },
    "zamba": {
        "num_hidden_layers": 4,
        "layers_block_type": ["linear_attention", "hybrid"] * 2,
        "num_key_value_heads": 4,
        "mamba_d_state": 4,
        "mamba_d_conv": 3,
        "n_mamba_heads": 2,
    },
    "zamba2": {
        "num_hidden_layers": 4,
        "layers_block_type": ["linear_attention", "hybrid"] * 2,
        "num_key_value_heads": 4,
        "mamba_d_state": 4,
        "mamba_d_conv": 3,
        "n_mamba_heads": 8,
        "chunk_size": 5,
    },
    "lfm2": {"layer_types": ["conv", "full_attention"], "block_auto_adjust_ff_dim": False},
    "recurrent_gemma": {"block_types": ["recurrent", "attention"], "lru_width": 32, "attention_window_size": 64},
    "jamba": {
        "attn_layer_period": 2,
        "attn_layer_offset": 1,
        "expert_layer_period": 2,
        "expert_layer_offset": 1,
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "mamba_d_state": 4,
        "mamba_d_conv": 3,
        "mamba_expand": 2,
        "mamba_dt_rank": 4,
        "use_mamba_kernels": False,
    },
    "qwen3_next": {**EXPERTS, **DELTA_NET, "shared_expert_intermediate_size": 24},
    "qwen3_5_text": DELTA_NET,
    "olmo_hybrid": DELTA_NET,
    "bert": MASKED,
    "roberta": {**MASKED, "pad_token_id": 1, "bos_token_id": 0},
    "electra": {**MASKED, "embedding_size": 32},
    "modernbert": {**MASKED, "local_attention": 8, "global_attn_every_n_layers": 2},
    "deberta-v2": {**MASKED, "relative_attention": True, "pos_att_type": ["p2c", "c2p"], "position_buckets": 8},
    "vit": {"task": "image_classification", "image_size": 20, "patch_size": 4, "num_channels": 3, "num_labels": 7},
}


def tiny_config(model_type: str, **overrides: Any) -> PreTrainedConfig:
    """The family's own config class, filled with tiny sizes and without dropout.

    Args:
        model_type: as in a `config.json`; a family that `TINY` does not name gets the common sizes.
        overrides: further fields of that config.

    Raises:
        ValueError: `model_type` is unknown to the installed transformers.
    """
    model_type = ALIASES.get(model_type, model_type)
    if model_type not in CONFIG_MAPPING:
        raise ValueError(f"model_type: transformers knows no {model_type!r}")
    kind = CONFIG_MAPPING[model_type]
    own = {key: value for key, value in TINY.get(model_type, {}).items() if key != "task"}
    known = set(inspect.signature(kind).parameters) | set(kind.attribute_map)
    always = {"pad_token_id", "bos_token_id", "eos_token_id", "use_cache"}
    common = {key: value for key, value in COMMON.items() if key in known | always}
    dropouts = {key: 0.0 for key in DROPOUTS if key in known}
    return kind(**{**common, **dropouts, **own, **overrides})


def own_task(config: PreTrainedConfig) -> str:
    """The first of `AUTO` that transformers has a model for.

    Raises:
        ValueError: there is none.
    """
    for task, auto in AUTO.items():
        if type(config) in auto._model_mapping:
            return task
    raise ValueError(f"model_type: {config.model_type!r} is none of {', '.join(AUTO)}")


def build(
    model_type: str,
    *,
    task: str | None = None,
    dtype: torch.dtype = torch.float64,
    attention: str | None = None,
    seed: int = 0,
    **overrides: Any,
) -> PreTrainedModel:
    """A tiny random model in train mode; experts run one by one, since grouped products refuse float64.

    Args:
        model_type: as in a `config.json`.
        task: one of `AUTO`; default: the family's own (`TINY`, or the first there is).
        dtype: of all parameters.
        attention: the attention implementation's registered name; default: transformers' choice for the family.
        seed: of the random initialisation.
        overrides: config fields.
    """
    torch.manual_seed(seed)
    config = tiny_config(model_type, **overrides)
    task = task or TINY.get(config.model_type, {}).get("task") or own_task(config)
    model = AUTO[task].from_config(config, attn_implementation=attention)
    # Norm weights of one and biases of zero would hide an error in either.
    generator = torch.Generator().manual_seed(seed + 1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.1)
    if model._can_set_experts_implementation():
        model.set_experts_implementation("eager")
    return model.to(dtype).train()


def sample_inputs(
    model: PreTrainedModel, *, batch: int = 2, tokens: int = 24, padding: int = 5, seed: int = 0
) -> dict[str, torch.Tensor]:
    """Random inputs with labels for a model of `build`.

    Args:
        model: decides between token and pixel inputs, and whether labels are per token.
        batch: sequences or images.
        tokens: sequence length; an image's follows from the config.
        padding: padded positions at the end of the last sequence; 0 leaves the attention mask out.
        seed: of the drawn tokens.

    Returns:
        `input_ids`, `labels` (and `attention_mask`) int64 `[batch, tokens]`, about half of the labels ignored; or
        `pixel_values` in the model's dtype `[batch, channels, height, width]`; classifiers: `labels` int64 `[batch]`.
    """
    generator = torch.Generator().manual_seed(seed)
    config = model.config
    classes = torch.randint(0, config.num_labels, (batch,), generator=generator)
    if "pixel_values" in inspect.signature(model.forward).parameters:
        size = (batch, config.num_channels, config.image_size, config.image_size)
        return {"pixel_values": torch.randn(size, generator=generator).to(model.dtype), "labels": classes}
    ids = torch.randint(5, config.vocab_size, (batch, tokens), generator=generator)
    labels = ids.where(torch.rand(batch, tokens, generator=generator) < 0.5, -100)
    mask = torch.ones(batch, tokens, dtype=torch.long)
    if padding:
        mask[-1, -padding:] = 0
        ids[-1, -padding:] = config.pad_token_id
        labels[-1, -padding:] = -100
    inputs = {"input_ids": ids, "labels": labels}
    if type(model).__name__.endswith("ForSequenceClassification"):
        inputs["labels"] = classes
    return {**inputs, "attention_mask": mask} if padding else inputs
