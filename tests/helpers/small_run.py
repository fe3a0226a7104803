"""A run small enough to repeat: a llama of some two thousand parameters on sums, as prompt and completion."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

MODEL = {
    "model_type": "llama",
    "vocab_size": 106,
    "hidden_size": 8,
    "intermediate_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 64,
    "tie_word_embeddings": True,
}


def write_sums(path: Path, start: int, count: int) -> None:
    """Prompts of different lengths and their short answers."""
    lines = []
    for number in range(start, start + count):
        left, right = number * 37 % 400, number * 11 % 90
        lines.append(json.dumps({"prompt": f"{left} + {right} = ", "completion": str(left + right)}))
    path.write_text("\n".join(lines) + "\n")


def small_run(directory: Path, tokenizer: Path) -> dict[str, Any]:
    """A valid config as JSON values.

    Args:
        directory: that gets its data, and where `run` is its run directory.
        tokenizer: of single characters.
    """
    write_sums(directory / "train.jsonl", 0, 48)
    write_sums(directory / "eval.jsonl", 100, 8)
    return {
        "run": {"output_dir": str(directory / "run"), "seed": 3},
        "model": {"from_config": MODEL, "tokenizer": str(tokenizer)},
        "data": {
            "train": str(directory / "train.jsonl"),
            "eval": str(directory / "eval.jsonl"),
            "format": "completion",
            "sequence_length": 32,
        },
        "selection": {"strategy": "supervised"},
        "retention": {"policy": "selective", "retain_linears": True},
        "optimizer": {"learning_rate": 0.01},
        "schedule": {"kind": "constant"},
        "training": {"max_steps": 6, "global_batch_size": 8, "micro_batch_size": 4, "deterministic": True},
    }
