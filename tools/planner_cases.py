"""The runs that `check_planner.py` measures: random ones, and the config of each."""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Any

from parity_cases import ARMS, ENGINES, SINGLE

FAMILIES = ("llama", "mistral", "qwen2", "qwen3", "olmo2", "gpt2", "phi3", "granite")
SHARDED = (*(name for name in ENGINES if name != "FSDP2 hybrid"), "FSDP2 unsharded")
OPTIMIZERS = {
    "fp32": {"precision": "fp32"},
    "fp32_master": {"precision": "fp32_master"},
    "pure_bf16": {"precision": "pure_bf16"},
    "8-bit": {"precision": "fp32_master", "name": "adamw_8bit"},
}


@dataclass(frozen=True)
class Case:
    """One run.

    Attributes:
        family: model type.
        heads: of the queries.
        kv_heads: of keys and values, where the family has its own number of them.
        head_dim: of a head.
        mlp: width of the MLP.
        vocab: rows of the embedding.
        blocks: depth.
        length: tokens of every row before padding, no multiple of 8.
        prompt: tokens of them without a label.
        batch: rows of a micro-batch.
        accumulation: micro-batches of a step.
        engine: a key of `ENGINES`, `SINGLE`, or "FSDP2 unsharded".
        ranks: number of processes.
        arm: a key of `ARMS`.
        rank: of LoRA; None for full fine-tuning.
        optimizer: a key of `OPTIMIZERS`.
        placement: of what is retained.
    """

    family: str
    heads: int
    kv_heads: int
    head_dim: int
    mlp: int
    vocab: int
    blocks: int
    length: int
    prompt: int
    batch: int
    accumulation: int
    engine: str
    ranks: int
    arm: str
    rank: int | None
    optimizer: str
    placement: str = "device"

    @property
    def retention(self) -> str:
        """The arm in words, with the placement."""
        return self.arm if self.placement == "device" else f"{self.arm}, on the host"

    def model(self) -> dict[str, Any]:
        """The model's config."""
        hidden = self.heads * self.head_dim
        if self.family == "gpt2":
            return {
                "model_type": "gpt2",
                "n_embd": hidden,
                "n_layer": self.blocks,
                "n_head": self.heads,
                "n_inner": self.mlp,
                "vocab_size": self.vocab,
                "n_positions": 256,
                "resid_pdrop": 0.0,
                "embd_pdrop": 0.0,
                "attn_pdrop": 0.0,
            }
        values = {
            "model_type": self.family,
            "hidden_size": hidden,
            "intermediate_size": self.mlp,
            "num_hidden_layers": self.blocks,
            "num_attention_heads": self.heads,
            "num_key_value_heads": self.kv_heads,
            "vocab_size": self.vocab,
            "max_position_embeddings": 256,
            "pad_token_id": 0,
        }
        return values | ({"head_dim": self.head_dim} if self.family == "qwen3" else {})

    def config(self) -> dict[str, Any]:
        """Its config as JSON values; rows are made up, so that it names no data."""
        sharding = {"engine": "fsdp", "reshard_after_forward": False}
        if self.engine != "FSDP2 unsharded":
            sharding = ENGINES.get(self.engine, {"engine": "single"})
        adapter = None if self.rank is None else {"kind": "lora", "rank": self.rank, "alpha": 8}
        arm = ARMS[self.arm]
        return {
            "run": {"output_dir": "unused"},
            "model": {"from_config": self.model(), "tokenizer": "unused", "adapter": adapter},
            "data": {"train": "unused", "sequence_length": 128},
            **arm,
            "retention": arm["retention"] | {"placement": self.placement},
            "sharding": sharding | {"timeout_seconds": 300},
            "optimizer": {"learning_rate": 1e-4} | OPTIMIZERS[self.optimizer],
            "hardware": {"gpus_per_node": self.ranks},
            "training": {
                "max_steps": 2,
                "global_batch_size": self.batch * self.accumulation * self.ranks,
                "micro_batch_size": self.batch,
            },
        }


ON_HOST = (
    Case("llama", 8, 4, 24, 304, 416, 9, 67, 21, 3, 2, SINGLE, 1, "supervised, linears", 4, "fp32_master", "host"),
    Case("qwen3", 6, 2, 16, 256, 640, 7, 45, 30, 2, 2, "FSDP2", 2, "supervised, int8", None, "pure_bf16", "host"),
    Case("gpt2", 4, 2, 32, 480, 352, 6, 93, 11, 2, 1, "ZeRO 3", 2, "uniform .25", None, "fp32_master", "host"),
)
"""Runs that retain on the host, beside the random ones."""


def random_cases(count: int, seed: int, engines: tuple[str, ...] = (SINGLE, *SHARDED)) -> list[Case]:
    """So many cases; the same for the same seed. A third of them is in one process.

    Args:
        count: of the cases.
        seed: of the draws.
        engines: to draw from.
    """
    draw = random.Random(seed)
    return [_drawn(draw, SINGLE if number % 3 == 0 else draw.choice(engines[1:])) for number in range(count)]


def _drawn(draw: random.Random, engine: str) -> Case:
    kv_heads = draw.choice((2, 4))
    length = draw.choice([n for n in range(19, 120) if n % 8])
    return Case(
        family=draw.choice(FAMILIES),
        heads=kv_heads * draw.choice((2, 3)),
        kv_heads=kv_heads,
        head_dim=draw.choice((16, 24, 32)),
        mlp=16 * draw.randint(8, 40),
        vocab=16 * draw.randint(20, 80),
        blocks=draw.randint(4, 10),
        length=length,
        prompt=draw.randint(1, length - 4),
        batch=draw.randint(1, 4),
        accumulation=draw.randint(1, 3),
        engine=engine,
        ranks=1 if engine == SINGLE else draw.choice((2, 4)),
        arm=draw.choice(tuple(ARMS)),
        rank=draw.choice((None, None, 4, 8)),
        optimizer=draw.choice(tuple(OPTIMIZERS)),
    )
