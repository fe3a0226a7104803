"""Small models that are built like a large one, and batches for them, at sizes that have little in common."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedConfig

from framework.config import Config
from framework.data import Batch
from framework.data.batch import NO_DOCUMENT
from framework.data.dataset import IGNORED
from framework.errors import UserError
from framework.linear_names import EVERY
from framework.planner.law import BLOCKS, ENDS
from framework.selection import supervised_positions

MLP_KEYS = ("intermediate_size", "ffn_dim", "n_inner", "d_ff", "ffn_hidden_size")
"""By what names families know the width of their MLP."""

NUMBERS = {
    "bos_token_id",
    "eos_token_id",
    "pad_token_id",
    "initializer_range",
    "layer_norm_eps",
    "layer_norm_epsilon",
    "rms_norm_eps",
    "norm_eps",
    "max_window_layers",
    "pretraining_tp",
    "rope_theta",
    "factor",
    "low_freq_factor",
    "high_freq_factor",
    "original_max_position_embeddings",
    "attention_factor",
    "beta_fast",
    "beta_slow",
}
"""Keys whose values no tensor's size depends on."""

FIXED_FREQUENCIES = ("default", "linear", "llama3", "yarn")
"""Types of rotary embedding whose frequencies are made once: with them every step does the same."""

SHORTER = 3
"""Tokens by which each sequence of a batch is shorter than the one before, so that other numbers are selected."""

PROBED_RATIOS = {"supervised": 0.9, "uniform": 0.6, "bernoulli": 0.6, "suffix": 0.9}
"""Ratios below 1 of small models: with `supervised` and `suffix` above their labelled share, so that some context is
selected."""


@dataclass(frozen=True)
class Widths:
    """Widths of a small model.

    Attributes:
        heads: of the queries.
        kv_heads: of keys and values, where there are fewer and more than one; a divisor of `heads`.
        head_dim: of a head, even.
        hidden_of_head: hidden size / heads, where it need not be `head_dim`.
        mlp: of the MLP.
        vocab: rows of the embedding.
        rank: of an adapter.
        batch: sequences.
        tokens: of each of them, a multiple of 8.
        prompt: tokens of the first sequence that have no label.
        ranks: of a run that has several, for each copy of the model; the widths and the products of those that are
            widths of matrices are multiples of it.
    """

    heads: int
    kv_heads: int
    head_dim: int
    hidden_of_head: int
    mlp: int
    vocab: int
    rank: int
    batch: int
    tokens: int
    prompt: int
    ranks: int


PROBES = (
    Widths(6, 3, 24, 20, 136, 212, 4, 2, 40, 7, 2),
    Widths(4, 2, 44, 52, 184, 284, 8, 3, 56, 11, 4),
    Widths(10, 5, 40, 28, 232, 332, 12, 2, 72, 23, 2),
    Widths(6, 2, 52, 44, 296, 236, 20, 4, 48, 13, 4),
    Widths(8, 4, 12, 36, 152, 260, 16, 3, 64, 31, 2),
    Widths(12, 4, 36, 20, 248, 316, 28, 2, 88, 17, 4),
)
"""Widths between blocks, of all heads and of the MLP are multiples of 8, so that every matrix can be held in NF4."""


def values_of(hf_config: PreTrainedConfig) -> dict[str, Any]:
    """The settings of a Hugging Face config that a model is built by, as JSON values."""
    values = hf_config.to_dict()
    unused = ("transformers_version", "torch_dtype", "dtype", "_name_or_path", "architectures")
    return {name: value for name, value in values.items() if name not in unused}


class Family:
    """A model's config as what is varied in probes, and the rest.

    Attributes:
        model_type: as transformers names it.
        depth: number of blocks.

    Args:
        hf_config: of the model.

    Raises:
        UserError: it does not say what the planner asks for.
    """

    def __init__(self, hf_config: PreTrainedConfig) -> None:
        self.model_type = hf_config.model_type
        self._values = values_of(hf_config)
        self._names = dict(type(hf_config).attribute_map)
        if None in map(self._value, ("num_hidden_layers", "hidden_size", "num_attention_heads", "vocab_size")):
            raise UserError(
                f"model: the planner cannot read depth, widths and heads in the config of {hf_config.model_type}"
            )
        self.depth = int(self._value("num_hidden_layers"))
        self._mlp = next((key for key in map(self._name, MLP_KEYS) if self._values.get(key) is not None), None)
        heads = self._value("num_attention_heads")
        self._kv_heads = self._value("num_key_value_heads")
        self._grouped = self._kv_heads is not None and self._kv_heads not in (1, heads)
        self._own_head_dim = self._name("head_dim") in self._values

    def _name(self, key: str) -> str:
        return self._names.get(key, key)

    def _value(self, key: str) -> Any:
        return self._values.get(self._name(key))

    def sizes_of_model(self) -> dict[str, float]:
        """The symbols that are the model's, at its own sizes."""
        heads, hidden = self._value("num_attention_heads"), self._value("hidden_size")
        kv_heads, head_dim = self._kv_heads or heads, self._value("head_dim") or hidden // heads
        sizes = {
            "hidden": hidden,
            "heads": heads,
            "kv_heads": kv_heads,
            "head_dim": head_dim,
            "qkv": (heads + 2 * kv_heads) * head_dim,
            "vocab": self._value("vocab_size"),
            "positions": self._value("max_position_embeddings"),
        }
        if self._mlp is not None:
            sizes["mlp"] = self._values[self._mlp]
        return {symbol: float(value) for symbol, value in sizes.items() if value is not None}

    def small(self, widths: Widths) -> dict[str, Any]:
        """The config of a small model of the family, as JSON values."""
        values = copy.deepcopy(self._values)
        for name, value in values.items():
            if isinstance(value, list) and len(value) == self.depth:
                values[name] = [*value[:ENDS], value[self.depth // 2], *value[-ENDS:]]
        head = widths.hidden_of_head if self._own_head_dim else widths.head_dim
        new: dict[str, Any] = {
            "num_hidden_layers": BLOCKS,
            "hidden_size": widths.heads * head,
            "num_attention_heads": widths.heads,
            "vocab_size": widths.vocab,
            "max_position_embeddings": 100 + widths.vocab,
        }
        if self._own_head_dim:
            new["head_dim"] = widths.head_dim
        if self._kv_heads is not None:
            others = widths.heads if self._kv_heads != 1 else 1
            new["num_key_value_heads"] = widths.kv_heads if self._grouped else others
        values |= {self._name(key): value for key, value in new.items() if self._name(key) in values}
        if self._mlp is not None:
            values[self._mlp] = widths.mlp
        if values.get("pad_token_id") is not None:
            values["pad_token_id"] = 0
        return values

    def kept(self) -> dict[str, Any]:
        """What all models of this law share: the config without what probes vary, and how heads share keys."""
        first, second = self.small(PROBES[0]), self.small(PROBES[1])
        shared = {
            name: _without_numbers(value) if isinstance(value, dict) else value
            for name, value in first.items()
            if second[name] == value and name not in NUMBERS
        }
        return shared | {"keys": "some heads'" if self._grouped else "one head's" if self._kv_heads == 1 else "each's"}


def _without_numbers(values: dict[str, Any]) -> dict[str, Any]:
    kept = {key: each for key, each in values.items() if key not in NUMBERS}
    if kept.get("rope_type") in FIXED_FREQUENCIES:
        kept["rope_type"] = FIXED_FREQUENCIES[0]
    return kept


def gathers_nothing(config: Config) -> bool:
    """Whether a run's ranks have all weights each under FSDP2, which then allocates nothing to gather them into."""
    return config.sharding.engine == "fsdp" and config.described_ranks == config.sharding.replicas


def probe_config(config: Config, values: dict[str, Any], widths: Widths) -> Config:
    """A run of the small model `values` with the settings of a run that decide what a step allocates."""
    json = config.to_json()
    json["model"] |= {"path": None, "from_config": values, "tokenizer": "unused", "added_tokens": []}
    if json["model"]["adapter"] is not None and json["model"]["adapter"]["rank"] is not None:
        json["model"]["adapter"]["rank"] = widths.rank
    json["data"] |= {"sequence_length": widths.tokens}
    if config.retained_linears is True:
        # Which of them a plan retains is for the law's symbols to say.
        json["retention"]["retain_linears"] = [EVERY]
    if config.resolved_ratio not in ("labelled", 1.0):
        json["selection"]["ratio"] = PROBED_RATIOS[config.selection.strategy]
    per_copy = 1 if config.sharding.engine == "single" or gathers_nothing(config) else widths.ranks
    ranks = per_copy * config.sharding.replicas
    json["hardware"], json["cluster"] = {"gpus_per_node": ranks}, {}
    json["training"] |= {
        "global_batch_size": 2 * widths.batch * ranks,
        "micro_batch_size": widths.batch,
        "max_steps": 2,
        "epochs": None,
        "compile": False,
    }
    json["schedule"] = {}
    return Config.model_validate(json, strict=False)


def positions_of(documents: Tensor) -> Tensor:
    """Positions of packed rows, int64 `[batch, sequence]`: they restart with every document.

    Args:
        documents: int64 `[batch, sequence]`, of each token.
    """
    positions = torch.arange(documents.shape[1]).expand(documents.shape)
    begins = torch.ones_like(documents, dtype=torch.bool)
    begins[:, 1:] = documents.diff(dim=1) != 0
    return positions - torch.where(begins, positions, 0).cummax(dim=1).values


def probe_batch(widths: Widths, *, packed: bool) -> Batch:
    """A batch in which sequences have different numbers of labels and of tokens; packed ones are of two documents."""
    drawn = torch.Generator().manual_seed(widths.vocab)
    shape = (widths.batch, widths.tokens)
    ids = torch.randint(1, widths.vocab, shape, generator=drawn)
    labels, mask = ids.clone(), torch.ones(shape, dtype=torch.int64)
    documents = torch.arange(widths.batch)[:, None].expand(shape).clone()
    labels[:, 0] = IGNORED
    for row in range(widths.batch):
        labels[row, : widths.prompt + row] = IGNORED
        if packed:
            start = widths.tokens // 2
            labels[row, start], documents[row, start:] = IGNORED, widths.batch + row
        if row:
            end = widths.tokens - SHORTER * row
            labels[row, end:], mask[row, end:], documents[row, end:] = IGNORED, 0, NO_DOCUMENT
    supervised = supervised_positions(labels, causal=True)
    inputs = {"input_ids": ids, "labels": labels}
    if packed:
        inputs["position_ids"] = positions_of(documents)
    else:
        inputs["attention_mask"] = mask
    return Batch(inputs, documents, supervised, int(supervised.sum()))
