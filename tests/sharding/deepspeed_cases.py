"""What the tests of the DeepSpeed engine train, and the plain loop of torch that they compare with."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple
from unittest import mock

import peft
import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from framework.retention import apply_checkpointing
from framework.selection import Selection
from framework.sharding.fragments import Fragment
from framework.token_selection import enable_token_selection, fixed_selection
from framework.training import fused_loss
from framework.training.loss import evaluation_loss, exact_loss
from framework.training.optimizer import StochasticAdamW

RANKS, ACCUMULATION, CLIP = 2, 2, 0.7
CHUNK_ROWS = 3
"""Rows whose logits exist at one time, so that there are several chunks."""
SEQUENCES, TOKENS, PROMPT = 2, 16, 6
SUPERVISED = RANKS * ACCUMULATION * SEQUENCES * (TOKENS - PROMPT)
CONFIG = dict(
    vocab_size=48,
    hidden_size=32,
    intermediate_size=40,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=64,
    use_cache=False,
    attn_implementation="sdpa",
)


@dataclass(frozen=True)
class Case:
    """A run: the model, how blocks keep what they need, and the learning rate."""

    policy: str = "all"
    adapter: bool = False
    tied: bool = True
    steps: int = 3
    rate: float = 2e-3
    precision: str = "fp32"
    layers: int = 2
    zero: dict[str, Any] = field(default_factory=dict)

    def build(self) -> nn.Module:
        """The model, the same weights at every call."""
        torch.manual_seed(0)
        model: nn.Module = LlamaForCausalLM(
            LlamaConfig(**CONFIG, num_hidden_layers=self.layers, tie_word_embeddings=self.tied)
        )
        if self.precision == "pure_bf16":
            model = model.bfloat16()
        if self.adapter:
            options = peft.LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False)
            model = peft.get_peft_model(model, options)
        inner = model.get_base_model() if self.adapter else model
        if self.policy == "checkpoint":
            apply_checkpointing(inner)
        elif self.policy == "selective":
            enable_token_selection(model, strategy="supervised", retain_linears=True, kv_format="int8", fused_loss=True)
        return model.train()

    def loss(self, model: nn.Module, step: int, micro: int, rank: int) -> Tensor:
        """A micro-batch's share of the window's loss; all tokens but the prompt's have labels."""
        inputs = batch(step, micro, rank)
        if self.policy != "selective":
            return exact_loss(model, inputs, SUPERVISED)
        positions = torch.arange(PROMPT - 1, TOKENS - 1).expand(SEQUENCES, -1)
        with fixed_selection(model, Selection.of_positions(positions)):
            return model(**inputs, num_items_in_batch=SUPERVISED).loss


def batch(step: int, micro: int, rank: int) -> dict[str, Tensor]:
    """The same window however many ranks share it."""
    drawn = torch.Generator().manual_seed(step)
    ids = torch.randint(CONFIG["vocab_size"], (RANKS * ACCUMULATION, SEQUENCES, TOKENS), generator=drawn)
    ids = ids[rank * ACCUMULATION + micro]
    labels = ids.clone()
    labels[:, :PROMPT] = -100
    return {"input_ids": ids, "labels": labels}


def groups(model: nn.Module) -> list[dict[str, Any]]:
    """Two groups, of different weight decay and scale of the learning rate."""
    trained = [p for p in model.parameters() if p.requires_grad]
    matrices, vectors = ([p for p in trained if (p.dim() > 1) == wide] for wide in (True, False))
    both = [
        {"params": matrices, "weight_decay": 0.1, "learning_rate_scale": 1.0},
        {"params": vectors, "weight_decay": 0.0, "learning_rate_scale": 0.5},
    ]
    return [group for group in both if group["params"]]


def adamw(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(groups(model), lr=1.0, betas=(0.9, 0.95), eps=1e-8, fused=True)


def stochastic(model: nn.Module) -> torch.optim.Optimizer:
    return StochasticAdamW(groups(model), lr=1.0, betas=(0.9, 0.95), eps=1e-8, seed=0)


def options(stage: int, case: Case, ranks: int) -> dict[str, Any]:
    """DeepSpeed's JSON with buckets that hold a part of the model, and stage 3's threshold below its matrices."""
    pure = case.precision == "pure_bf16"
    bf16 = {"enabled": stage > 0 and case.precision in ("pure_bf16", "fp32_master"), "check_grad_overflow": False}
    if bf16["enabled"]:
        bf16 |= {"bf16_master_weights_and_grads": pure, "bf16_optimizer_states": pure}
    fp16 = {"loss_scale": 0.0, "initial_scale_power": 10, "loss_scale_window": 2, "hysteresis": 1, "min_loss_scale": 1}
    sizes = {
        "reduce_bucket_size": 4096,
        "allgather_bucket_size": 4096,
        "stage3_prefetch_bucket_size": 4096,
        "stage3_param_persistence_threshold": 40,
        "stage3_max_live_parameters": 20000,
        "stage3_max_reuse_distance": 4000,
        "sub_group_size": 4000,
    }
    accumulation = RANKS * ACCUMULATION // ranks
    made = {
        "train_batch_size": SEQUENCES * accumulation * ranks,
        "train_micro_batch_size_per_gpu": SEQUENCES,
        "gradient_accumulation_steps": accumulation,
        "zero_optimization": {"stage": stage, "overlap_comm": stage >= 2, **sizes, **case.zero},
        "bf16": bf16 | {"bf16_master_weights_and_grads": pure, "bf16_optimizer_states": pure}
        if bf16["enabled"]
        else bf16,
        "fp16": {"enabled": stage > 0 and case.precision == "fp16", **fp16},
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "steps_per_print": 1 << 31,
        "timers": {"throughput": {"enabled": False, "synchronized": False}},
    }
    if stage == 3 and case.precision != "fp32":
        made["data_types"] = {"grad_accum_dtype": "bf16" if pure else "fp32"}
    return made


class Reference(NamedTuple):
    """What an ordinary loop in float32 gives."""

    results: list[tuple[float, float]]
    """Loss and norm of each step."""
    weights: dict[str, Tensor]
    """The trained ones, flat."""
    evaluated: float
    """The evaluation before the last step."""


def evaluation(model: nn.Module) -> float:
    """The loss of a batch, whose logits are formed in several chunks."""
    model.eval()
    loss = evaluation_loss(model, batch(77, 0, 0), chunks=3).loss.item()
    model.train()
    return loss


@mock.patch.object(fused_loss, "CHUNK_ROWS", CHUNK_ROWS)
def reference(case: Case) -> Reference:
    """A case in one process."""
    model = case.build()
    optimizer = adamw(model)
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    results = []
    evaluated = 0.0
    for step in range(case.steps):
        evaluated = evaluation(model)
        total = 0.0
        for index in range(RANKS * ACCUMULATION):
            loss = case.loss(model, step, index % ACCUMULATION, index // ACCUMULATION)
            loss.backward()
            total += loss.item()
        norm = torch.nn.utils.clip_grad_norm_(trained.values(), CLIP).item()
        for group in optimizer.param_groups:
            group["lr"] = case.rate * group["learning_rate_scale"]
        optimizer.step()
        optimizer.zero_grad()
        results.append((total, norm))
    return Reference(results, {name: p.detach().flatten() for name, p in trained.items()}, evaluated)


class Memory:
    """Fragments of all ranks put together: `StoredTensors` of whole tensors."""

    def __init__(self, fragments: Iterable[Fragment]) -> None:
        self.tensors: dict[str, Tensor] = {}
        self.shapes: dict[str, tuple[int, ...]] = {}
        self._seen: dict[str, Tensor] = {}
        for fragment in fragments:
            size = math.prod(fragment.shape)
            whole = self.tensors.setdefault(fragment.name, torch.zeros(size, dtype=fragment.values.dtype))
            seen = self._seen.setdefault(fragment.name, torch.zeros(size, dtype=torch.int32))
            part = slice(fragment.start, fragment.start + len(fragment.values))
            whole[part], self.shapes[fragment.name] = fragment.values, fragment.shape
            seen[part] += 1
        self.tiled = all(bool((seen == 1).all()) for seen in self._seen.values())

    def __str__(self) -> str:
        return "memory"

    def names(self) -> Iterator[str]:
        return iter(self.tensors)

    def shape(self, name: str) -> tuple[int, ...]:
        return self.shapes[name]

    def dtype(self, name: str) -> torch.dtype:
        return self.tensors[name].dtype

    def read(self, name: str, start: int = 0, count: int | None = None) -> Tensor:
        return self.tensors[name][start : None if count is None else start + count]

    def equals(self, other: Memory) -> bool:
        same_names = self.shapes == other.shapes
        return same_names and all(torch.equal(value, other.tensors[name]) for name, value in self.tensors.items())
