"""The runs that `check_gpu.py` measures on one accelerator: real sizes of real families, weights drawn at random."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

_DECODER = {"max_position_embeddings": 8192, "pad_token_id": 0}


def _sizes(model_type: str, hidden: int, mlp: int, blocks: int, heads: tuple[int, int], vocab: int, **more: Any) -> Any:
    return (
        _DECODER
        | {
            "model_type": model_type,
            "hidden_size": hidden,
            "intermediate_size": mlp,
            "num_hidden_layers": blocks,
            "num_attention_heads": heads[0],
            "num_key_value_heads": heads[1],
            "vocab_size": vocab,
        }
        | more
    )


MODELS = {
    "Llama-3.2-1B": _sizes("llama", 2048, 8192, 16, (32, 8), 128256, tie_word_embeddings=True),
    "Llama-3.2-3B": _sizes("llama", 3072, 8192, 28, (24, 8), 128256, tie_word_embeddings=True),
    "Llama-3-8B": _sizes("llama", 4096, 14336, 32, (32, 8), 128256),
    "Mistral-7B": _sizes("mistral", 4096, 14336, 32, (32, 8), 32768, sliding_window=None),
    "Qwen2.5-7B": _sizes("qwen2", 3584, 18944, 28, (28, 4), 152064),
    "Qwen3-1.7B": _sizes("qwen3", 2048, 6144, 28, (16, 8), 151936, head_dim=128, tie_word_embeddings=True),
    "OLMo-2-1B": _sizes("olmo2", 2048, 8192, 16, (16, 16), 100352),
}
"""As in the config files of these models on the Hugging Face hub, by name."""

LORA = {"kind": "lora", "rank": 16, "alpha": 32, "dropout": 0.05}
TUNING: dict[str, dict[str, Any]] = {
    "full": {},
    "LoRA": {"adapter": LORA},
    "NF4 LoRA": {"adapter": LORA, "quantization": "nf4"},
}
SUPERVISED = {"strategy": "supervised"}
ARMS: dict[str, dict[str, Any]] = {
    "all": {"retention": {"policy": "all"}},
    "checkpoint": {"retention": {"policy": "checkpoint"}},
    "selective": {"retention": {"policy": "selective"}, "selection": SUPERVISED},
    "selective int8": {"retention": {"policy": "selective", "kv_format": "int8"}, "selection": SUPERVISED},
    "selective linears": {"retention": {"policy": "selective", "retain_linears": True}, "selection": SUPERVISED},
    "selective linears host": {
        "retention": {"policy": "selective", "retain_linears": True, "placement": "host"},
        "selection": SUPERVISED,
    },
}


@dataclass(frozen=True)
class GpuCase:
    """One run on one accelerator.

    Attributes:
        model: a key of `MODELS`.
        tuning: a key of `TUNING`.
        arm: a key of `ARMS`.
        batch: rows of a micro-batch.
        length: tokens of a row.
        precision: as in the config.
        optimizer: its name.
        packing: rows are of two documents each.
        accumulation: micro-batches of a step.
    """

    model: str
    tuning: str
    arm: str
    batch: int
    length: int
    precision: str = "pure_bf16"
    optimizer: str = "adamw"
    packing: bool = False
    accumulation: int = 1

    @property
    def prompt(self) -> int:
        """Tokens of a row that have no label: three of four."""
        return 3 * self.length // 4

    def config(self) -> dict[str, Any]:
        """The config as JSON values; rows are made up, so that it names no data."""
        return {
            "run": {"output_dir": "unused"},
            "model": {"from_config": MODELS[self.model], "tokenizer": "unused"} | TUNING[self.tuning],
            "data": {"train": "unused", "sequence_length": self.length, "packing": self.packing},
            **ARMS[self.arm],
            "sharding": {"engine": "single"},
            "optimizer": {"learning_rate": 1e-5, "precision": self.precision, "name": self.optimizer},
            "training": {
                "max_steps": 2,
                "global_batch_size": self.batch * self.accumulation,
                "micro_batch_size": self.batch,
            },
        }


CASES = (
    GpuCase("Llama-3.2-1B", "full", "all", 1, 4096, precision="fp32_master"),
    GpuCase("Llama-3.2-1B", "full", "checkpoint", 2, 4096, precision="fp32_master"),
    GpuCase("Llama-3.2-1B", "full", "selective", 2, 4096, precision="fp32_master"),
    GpuCase("OLMo-2-1B", "full", "selective linears", 4, 2048),
    GpuCase("Qwen3-1.7B", "full", "all", 2, 2048, packing=True),
    GpuCase("Llama-3.2-3B", "full", "selective", 2, 4096, precision="fp32_master", optimizer="adamw_8bit"),
    GpuCase("Llama-3-8B", "full", "checkpoint", 1, 2048),
    GpuCase("Llama-3-8B", "LoRA", "all", 1, 4096),
    GpuCase("Llama-3-8B", "LoRA", "selective int8", 2, 8192),
    GpuCase("Llama-3-8B", "LoRA", "selective linears host", 2, 8192),
    GpuCase("Mistral-7B", "LoRA", "selective", 2, 4096, packing=True),
    GpuCase("Llama-3-8B", "NF4 LoRA", "checkpoint", 1, 8192),
    GpuCase("Qwen2.5-7B", "NF4 LoRA", "selective", 2, 4096),
)

NEIGHBOURS = tuple(
    GpuCase("Llama-3.2-1B", "LoRA", arm, batch, 4096, accumulation=4 // batch)
    for arm, batch in (
        ("selective", 1),
        ("selective", 2),
        ("selective", 4),
        ("selective linears", 1),
        ("selective linears", 2),
        ("selective linears", 4),
        ("checkpoint", 4),
        ("all", 1),
    )
)
"""Ways to run one job, of which a planner has to choose."""
