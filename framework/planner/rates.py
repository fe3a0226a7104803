"""What a cluster achieves, in plain numbers. Must not import torch."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Rates:
    """What the hardware achieves, not what it could at best.

    Attributes:
        matrix_flops: floating-point operations a second of products, in the dtype that computes.
        attention_flops: the same of attention.
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
    memory_bytes: float
    operator_bytes: float
    link_bytes: float
    host_memory_bytes: float
    node_bytes: float
    network_bytes: float
    ranks_per_node: int
    latency_seconds: float = 0.0
    kernel_seconds: float = 0.0
