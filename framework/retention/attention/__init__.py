"""Attention of blocks that are recorded and replayed."""

from framework.retention.attention.interface import KERNELS, Kernel, register_attention, selective_name

__all__ = ["KERNELS", "Kernel", "register_attention", "selective_name"]
