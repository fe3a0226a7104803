"""A job of round numbers, one way to run it, and hardware: what tests of the planner's time vary."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from framework.models.products import Attention, BlockProducts, LinearLayer, ModelProducts, Products
from framework.planner.choice import Choice
from framework.planner.rates import Rates
from framework.planner.work import Job

CHOICE = Choice(
    engine="single",
    zero_stage=None,
    reshard_after_forward=True,
    replicas=1,
    offload_optimizer=False,
    offload_parameters=False,
    policy="all",
    retain_linears=False,
    kv_format="model",
    strategy="none",
    ratio=1.0,
    micro_batch_size=1,
    accumulation=1,
    ranks=1,
)

# Four blocks of a million weights without attention, which see a token each; embedding and head of half a million.
LINEARS = (LinearLayer("mlp.down", 2000, 300), LinearLayer("mlp.up", 500, 800))
BLOCKS = tuple(BlockProducts(f"block{i}", Products(10**6, 10**6), None, True, LINEARS) for i in range(4))
JOB = Job(
    products=ModelProducts(BLOCKS, Products(), Products(500_000, 500_000)),
    parameters=5_000_000,
    trainable=5_000_000,
    outside=1_000_000,
    hidden_size=1000,
    precision="fp32",
    optimizer="adamw",
    sequence_length=1000,
    labelled_share=0.25,
    kernel="sdpa",
    kernels=1,
)

RATES = Rates(
    matrix_flops=1e12,
    attention_flops=5e11,
    masked_attention_flops=5e11,
    memory_bytes=1e12,
    operator_bytes=1e12,
    link_bytes=1e9,
    host_memory_bytes=8e9,
    node_bytes=1e10,
    network_bytes=4e9,
    ranks_per_node=4,
)


def choose(**changes: Any) -> Choice:
    """A choice that differs from one GPU's plain training."""
    return replace(CHOICE, **changes)


def job(**changes: Any) -> Job:
    """A job that differs from the one above."""
    return replace(JOB, **changes)


def rates(**changes: Any) -> Rates:
    """Of hardware that differs from the one above: nodes with four ranks."""
    return replace(RATES, **changes)


def attentive() -> ModelProducts:
    """A model with every kind of attention, and a frozen block below."""
    kinds = [
        Attention(4, 8, 8),
        Attention(4, 8, 6, window=7),
        Attention(2, 8, 8, chunk=9),
        Attention(2, 8, 8, window=4, chunk=9),
        Attention(4, 8, 8, causal=False),
        Attention(4, 8, 8, causal=False, window=3),
        Attention(4, 8, 8, window=50),
        None,
    ]
    blocks = [
        BlockProducts(
            f"b{i}", Products(1000 + i, 10 + i), kind, i > 0, (LinearLayer("up", 20, 30), LinearLayer("down", 30, 10))
        )
        for i, kind in enumerate(kinds)
    ]
    return ModelProducts(tuple(blocks), Products(70, 7), Products(64 * 96, 64 * 96))
