"""The runs that `check_parity.py` compares: what varies, in which combinations, and the config of each."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

ENGINES: dict[str, dict[str, Any]] = {
    "ZeRO 0": {"engine": "deepspeed", "zero_stage": 0},
    "ZeRO 1": {"engine": "deepspeed", "zero_stage": 1},
    "ZeRO 2": {"engine": "deepspeed", "zero_stage": 2},
    "ZeRO 3": {"engine": "deepspeed", "zero_stage": 3},
    "FSDP2": {"engine": "fsdp"},
    "FSDP2 hybrid": {"engine": "fsdp", "replicas": 2},
}
SINGLE = "single"

ARMS: dict[str, dict[str, Any]] = {
    "all": {"retention": {"policy": "all"}},
    "checkpoint": {"retention": {"policy": "checkpoint"}},
    "exact replay": {"retention": {"policy": "selective"}},
    "supervised": {"selection": {"strategy": "supervised"}, "retention": {"policy": "selective"}},
    "supervised, linears": {
        "selection": {"strategy": "supervised"},
        "retention": {"policy": "selective", "retain_linears": True},
    },
    "supervised, int8": {
        "selection": {"strategy": "supervised"},
        "retention": {"policy": "selective", "kv_format": "int8"},
    },
    "uniform .25": {
        "selection": {"strategy": "uniform", "ratio": 0.25},
        "retention": {"policy": "selective", "retain_linears": True},
    },
}

ADAPTERS: dict[str, dict[str, Any] | None] = {"full": None, "LoRA": {"kind": "lora", "rank": 4, "alpha": 8}}

RANKS = (1, 2, 4)
ACCUMULATION = (1, 4)
GLOBAL_BATCH = 16

MODEL = {
    "model_type": "llama",
    "vocab_size": 300,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 96,
    # Wide enough that attention is not uniform, which would hide errors.
    "initializer_range": 0.1,
}


@dataclass(frozen=True)
class Case:
    """One run.

    Attributes:
        engine: a key of `ENGINES`, or `SINGLE`.
        ranks: number of processes.
        accumulation: micro-batches of a step on each of them.
        arm: a key of `ARMS`.
        adapter: a key of `ADAPTERS`.
        precision: as `optimizer.precision`.
    """

    engine: str
    ranks: int
    accumulation: int
    arm: str
    adapter: str
    precision: str = "fp32"

    @property
    def name(self) -> str:
        """That a directory can have."""
        return "-".join(str(value).replace(" ", "_").replace(",", "") for value in asdict(self).values())

    def baseline(self) -> Case:
        """The same training in one process, one micro-batch a step."""
        return replace(self, engine=SINGLE, ranks=1, accumulation=1)

    def config(self, directory: Path, steps: int) -> dict[str, Any]:
        """Its config as JSON values; `directory` holds data and tokenizer, and gets the run."""
        return {
            "run": {"output_dir": str(directory / "runs" / self.name), "seed": 11},
            "model": {
                "from_config": MODEL,
                "tokenizer": str(directory / "tokenizer"),
                "adapter": ADAPTERS[self.adapter],
            },
            "data": {"train": str(directory / "train.jsonl"), "sequence_length": 96, "cache_dir": None},
            **ARMS[self.arm],
            "sharding": ENGINES.get(self.engine, {"engine": "single"}) | {"timeout_seconds": 120},
            "optimizer": {"learning_rate": 0.003, "weight_decay": 0.1, "precision": self.precision},
            "schedule": {"kind": "cosine", "warmup_steps": 3},
            "training": {
                "max_steps": steps,
                "global_batch_size": GLOBAL_BATCH,
                "micro_batch_size": GLOBAL_BATCH // (self.ranks * self.accumulation),
                # Below the norms that occur, so that clipping is at work.
                "max_grad_norm": 0.5,
            },
        }


def whole_matrix() -> list[Case]:
    """Every combination, but for copies that one rank cannot have."""
    # Two ranks first, which the cover then prefers among equals.
    combined = itertools.product(ENGINES, sorted(RANKS, key=lambda ranks: abs(ranks - 2)), ACCUMULATION, ARMS, ADAPTERS)
    return [case for values in combined if _is_possible(case := Case(*values))]


def pairwise_cover(cases: Sequence[Case] | None = None) -> list[Case]:
    """Cases such that any two values of two settings that some case combines meet in at least one of these.

    Greedy: always the case with most pairs that were not seen yet, of equals the one with the least work.
    """
    left = list(whole_matrix() if cases is None else cases)
    unseen = {pair for case in left for pair in _pairs(case)}
    chosen = []
    while unseen:
        best = max(left, key=lambda case: (len(unseen & _pairs(case)), -max(case.ranks, 2) * case.accumulation))
        chosen.append(best)
        unseen -= _pairs(best)
    return chosen


def _pairs(case: Case) -> set[tuple[Any, ...]]:
    return {*itertools.combinations(asdict(case).items(), 2)}


def _is_possible(case: Case) -> bool:
    return case.ranks % ENGINES[case.engine].get("replicas", 1) == 0
