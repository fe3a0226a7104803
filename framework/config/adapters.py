"""What each adapter method of PEFT takes, by the names of this config and of PEFT's own; does not import PEFT.

A method belongs here if a block with it still maps each token's row by itself (attention apart), takes no further
inputs and needs no call beside forward, backward and the optimiser's step. The others are named with the reason.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal


@dataclass(frozen=True)
class AdapterMethod:
    """A method, and PEFT's names for what this config has keys of its own for.

    Attributes:
        peft_type: PEFT's name of the method (`peft.PeftType`).
        rank: the option that `rank` sets; None if the method has no rank.
        alpha: the option that `alpha` sets; None if the method has none.
        dropout: the option that `dropout` sets; None if the method has none.
        instead_of_rank: an option with a default of its own that stands for the rank, and is 0 where a rank is given.
        targets: modules without `target_modules`: all linear ones but the head, all norms, those that PEFT knows for
            the family, or the token embedding.
        fixed: options that make the method what it is.
        refused: options of this method that cannot be set, with the reason.
    """

    peft_type: str
    rank: str | None = "r"
    alpha: str | None = None
    dropout: str | None = None
    instead_of_rank: str | None = None
    targets: Literal["linear", "norms", "family", "embedding"] = "linear"
    fixed: Mapping[str, Any] = field(default_factory=dict)
    refused: Mapping[str, str] = field(default_factory=dict)


ADAPTER_METHODS: dict[str, AdapterMethod] = {
    "lora": AdapterMethod("LORA", alpha="lora_alpha", dropout="lora_dropout"),
    "dora": AdapterMethod("LORA", alpha="lora_alpha", dropout="lora_dropout", fixed={"use_dora": True}),
    "ia3": AdapterMethod("IA3", rank=None, targets="family"),
    "loha": AdapterMethod("LOHA", alpha="alpha"),
    "lokr": AdapterMethod("LOKR", alpha="alpha"),
    "vera": AdapterMethod("VERA", dropout="vera_dropout"),
    "randlora": AdapterMethod("RANDLORA", alpha="randlora_alpha", dropout="randlora_dropout"),
    "oft": AdapterMethod(
        "OFT", instead_of_rank="oft_block_size", refused={"module_dropout": "PEFT 0.21 takes it and never applies it"}
    ),
    "boft": AdapterMethod("BOFT", rank=None, dropout="boft_dropout"),
    "hra": AdapterMethod("HRA"),
    "fourierft": AdapterMethod("FOURIERFT", rank=None),
    "ln_tuning": AdapterMethod("LN_TUNING", rank=None, targets="norms"),
    "shira": AdapterMethod("SHIRA"),
    "miss": AdapterMethod("MISS", dropout="miss_dropout"),
    "trainable_tokens": AdapterMethod("TRAINABLE_TOKENS", rank=None, targets="embedding"),
    "beft": AdapterMethod("BEFT", rank=None),
    "c3a": AdapterMethod("C3A", rank=None),
    "deft": AdapterMethod("DEFT", dropout="deft_dropout"),
    "delora": AdapterMethod("DELORA", dropout="module_dropout"),
    "glora": AdapterMethod("GLORA"),
    "gralora": AdapterMethod("GRALORA", alpha="alpha", dropout="gralora_dropout"),
    "hira": AdapterMethod("HIRA", dropout="hira_dropout"),
    "osf": AdapterMethod("OSF", rank=None),
    "peanut": AdapterMethod("PEANUT"),
    "psoft": AdapterMethod("PSOFT", alpha="psoft_alpha", dropout="psoft_dropout"),
    "pvera": AdapterMethod("PVERA", dropout="pvera_dropout"),
    "road": AdapterMethod("ROAD", rank=None),
    "supertuning": AdapterMethod("SUPERTUNING", rank=None),
    "tinylora": AdapterMethod("TINYLORA", dropout="tinylora_dropout"),
    "unilora": AdapterMethod("UNILORA", dropout="unilora_dropout"),
    "vblora": AdapterMethod("VBLORA", dropout="vblora_dropout"),
    "waveft": AdapterMethod("WAVEFT", rank=None),
}

TRAINS_TOKEN_ROWS = ("lora", "dora", "trainable_tokens")
"""Methods that can train single rows of an embedding."""

CALLS_ITS_LAYERS = (
    *("lora", "ia3", "vera", "randlora", "oft", "boft", "fourierft", "ln_tuning", "miss", "trainable_tokens", "beft"),
    *("c3a", "gralora", "pvera", "road", "vblora", "waveft"),
)
"""Methods that call the layers they adapt and never compute with their weights, which may be quantised then."""

_READING_OPTIONS: dict[str, str | tuple[str, ...]] = {
    "use_dora": "true",
    "init_lora_weights": ("pissa", "olora"),
    "init_weights": "bat",
}

_ADDS_TOKENS = "it puts trained tokens before the text, which moves every position and label"
REFUSED_METHODS: dict[str, str] = {
    **dict.fromkeys(("prompt_tuning", "p_tuning", "multitask_prompt_tuning", "cpt"), _ADDS_TOKENS),
    "prefix_tuning": "it puts trained keys and values before the text, which a block cannot retain or replay",
    "cartridge": "it puts trained keys and values before the text, which a block cannot retain or replay",
    "adaption_prompt": "it replaces the attention modules by its own, outside of transformers' attention interface",
    "shadow": "it replaces the hidden states between blocks by a pair of states of its own",
    "adalora": "it needs a call after every step that moves ranks by the gradients (update_and_allocate); use lora",
    "adamss": "it needs scikit-learn and a call after every step that moves ranks by the gradients; use lora",
    "lily": "it averages its routing over all tokens of a batch, so a text's loss depends on what it is batched with",
    "poly": "it needs the task of every sample as a further input",
    "xlora": "it mixes adapters that are trained already",
    "frod": "it starts from a joint decomposition of all weights, which no dry run can describe",
    "bone": 'PEFT calls it "miss"',
    "rslora": 'use "lora" with options {"use_rslora": true}',
    "pissa": 'use "lora" with options {"init_lora_weights": "pissa"}',
    "olora": 'use "lora" with options {"init_lora_weights": "olora"}',
    "qlora": 'use "lora" on a quantised model',
}

_NEEDS_DATA = "it needs a pass over data before training"
_NEEDS_LOSS = "it adds a term to the loss that PEFT leaves to the training loop"
REFUSED_OPTIONS: dict[str, str] = {
    "target_modules": "set model.adapter.target_modules",
    "modules_to_save": "set model.adapter.modules_to_save",
    **dict.fromkeys(("peft_type", "auto_mapping", "peft_version"), "model.adapter.kind says it"),
    "task_type": "model.task says it",
    **dict.fromkeys(("base_model_name_or_path", "revision"), "model.path and model.revision say it"),
    "inference_mode": "it would train nothing",
    "fan_in_fan_out": "it is read from the model's layers",
    "ensure_weight_tying": "tied embeddings always stay tied",
    "layer_replication": "it changes the number of blocks",
    "alora_invocation_tokens": "it needs further inputs with every batch",
    "velora_config": "it replaces gradients by approximations from statistics of the batch",
    "generator_seed": "the state of a generator of its own is not saved with a checkpoint",
    "arrow_config": "it routes between adapters that are trained already",
    **dict.fromkeys(("eva_config", "corda_config", "lora_ga_config"), _NEEDS_DATA),
    **dict.fromkeys(("monteclora_config", "kasa_config"), _NEEDS_LOSS),
    **dict.fromkeys(("loftq_config", "use_qalora", "qalora_group_size"), "it is for quantised weights"),
    **dict.fromkeys(("megatron_config", "megatron_core", "runtime_config"), "it is for another engine"),
}
REFUSED_INITS: dict[str, str] = {
    **dict.fromkeys(("eva", "corda", "lora_ga"), _NEEDS_DATA),
    "loftq": "it is for quantised weights",
    "mica": "the matrix that it freezes is not saved with a checkpoint, and differs between machines",
}


def kind_problem(kind: str) -> str | None:
    """Why a method cannot be used, or None if it can."""
    if kind in ADAPTER_METHODS:
        return None
    if kind in REFUSED_METHODS:
        return f'"{kind}" is not supported: {REFUSED_METHODS[kind]}'
    close = difflib.get_close_matches(kind, ADAPTER_METHODS, n=2)
    hint = f"did you mean {' or '.join(close)}?" if close else f"those known are {', '.join(ADAPTER_METHODS)}"
    return f'"{kind}" is no adapter method, {hint}'


def packed_problem(kind: str, options: Mapping[str, Any]) -> tuple[str, str] | None:
    """Why a method cannot adapt quantised layers: (key of the adapter, what is wrong), or None if it can."""
    if kind not in CALLS_ITS_LAYERS:
        return "kind", f'"{kind}" computes with the weights of its layers; use one of {", ".join(CALLS_ITS_LAYERS)}'
    for name, beginnings in _READING_OPTIONS.items():
        if str(options.get(name)).lower().startswith(beginnings):
            return f"options.{name}", "with this value it computes with the weights of its layers; leave it out"
    return None


def option_problems(kind: str, options: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """Options of a method that this config has another place for, or that cannot work: (name, what is wrong)."""
    method = ADAPTER_METHODS[kind]
    own = {name: key for key in ("rank", "alpha", "dropout") if (name := getattr(method, key)) is not None}
    refused = {**REFUSED_OPTIONS, **method.refused}
    for name, value in options.items():
        if name in own:
            yield name, f"set model.adapter.{own[name]}"
        elif name in method.fixed:
            yield name, f'kind "{kind}" says it'
        elif name in refused:
            yield name, f"cannot be set: {refused[name]}"
        elif name == "init_lora_weights" and str(value).lower() in REFUSED_INITS:
            yield name, f'"{value}" is not supported: {REFUSED_INITS[str(value).lower()]}'
