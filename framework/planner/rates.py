"""What a cluster achieves, in plain numbers. Must not import torch."""

from __future__ import annotations

from dataclasses import dataclass

from framework.config import Config
from framework.errors import UserError
from framework.planner.hardware import Cluster
from framework.planner.profile import Profile
from framework.sharding.precision import PRECISIONS

COLLECTIVE_SECONDS = 20e-6
"""Before the first byte of a collective: an assumption, what NCCL needs within a machine."""

MASKED_KERNELS = ("sdpa", "eager")
"""Attention that is given a mask where rows are padded, as almost all batches have some, or of several documents;
selective blocks need one for `eager` only."""

HOST_MEMORY = 100e9
"""Bytes a second of a host's memory: an assumption, half of eight channels of DDR4-3200."""


@dataclass(frozen=True)
class Rates:
    """What the hardware achieves, not what it could at best.

    Attributes:
        matrix_flops: floating-point operations a second of products, in the dtype that computes.
        attention_flops: the same of attention of selective blocks, which take no mask.
        masked_attention_flops: the same of attention of others.
        memory_bytes: bytes a second that is read and written in the device's memory, by updates and copies.
        operator_bytes: the same of the operators of blocks and loss.
        link_bytes: bytes a second between a device and its host, in one direction.
        host_memory_bytes: bytes a second in the memory of a node's host, which its ranks share.
        node_bytes: bytes a second that a rank sends in a collective inside a node.
        network_bytes: bytes a second that a node sends to others in a collective, which its ranks share.
        ranks_per_node: ranks on a full node.
        latency_seconds: of a collective, before the first byte.
        kernel_seconds: that the host needs to issue an operator.
    """

    matrix_flops: float
    attention_flops: float
    masked_attention_flops: float
    memory_bytes: float
    operator_bytes: float
    link_bytes: float
    host_memory_bytes: float
    node_bytes: float
    network_bytes: float
    ranks_per_node: int
    latency_seconds: float = 0.0
    kernel_seconds: float = 0.0


def rates_of(config: Config, cluster: Cluster, profile: Profile) -> Rates:
    """What a cluster achieves on a run."""
    device, kernel = cluster.device, config.model.attention
    name = PRECISIONS[config.optimizer.precision].autocast or config.weights_dtype
    peak = device.peak(name)
    if peak is None:
        raise UserError(f"optimizer.precision: {device.name} does not multiply {name}")
    masked, unmasked = profile.masked_attention_efficiency, profile.attention_efficiency
    return Rates(
        matrix_flops=peak * profile.matrix_efficiency[name],
        attention_flops=peak * (unmasked if kernel != "eager" else masked),
        masked_attention_flops=peak * (masked if kernel in MASKED_KERNELS else unmasked),
        memory_bytes=device.memory_bandwidth * profile.memory_efficiency,
        operator_bytes=device.memory_bandwidth * profile.operator_efficiency,
        link_bytes=min(profile.host_to_device, profile.device_to_host),
        host_memory_bytes=HOST_MEMORY,
        node_bytes=min(profile.all_gather, profile.reduce_scatter),
        network_bytes=cluster.network,
        ranks_per_node=cluster.gpus_per_node,
        latency_seconds=COLLECTIVE_SECONDS,
        kernel_seconds=profile.kernel_seconds,
    )
