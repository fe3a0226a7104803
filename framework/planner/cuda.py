"""What CUDA adds to, or has otherwise than, the tensors that a step shows on the CPU. Must not import torch.

Everything here is in `torch.cuda.memory_allocated`, as cuBLAS' workspaces are (`assumptions.workspace_bytes`). Context,
kernels' code and NCCL's buffers are not.
"""

from __future__ import annotations

ROUNDING = 512
"""Bytes that the caching allocator rounds a tensor up to (`kMinBlockSize`, c10/cuda/CUDACachingAllocator.cpp)."""

SMALL = 2**20
"""Bytes of the largest tensor of the allocator's small pool, and of the largest rest of a large block that is not split
off but counted with the tensor (`kSmallSize`)."""

SEGMENT = 2**21
"""Tensors above `LARGE` get segments of their own, of a multiple of this (`kRoundLarge`)."""

LARGE = 10 * 2**20
"""See `SEGMENT` (`kMinLargeAlloc`)."""

MASK_BYTES = 1
"""Of an element that goes through dropout: CUDA keeps a bool (`native_dropout`), the CPU keeps a factor in the input's
dtype."""

STATISTIC_BYTES = 4
"""Of a token and a head: the float32 log-sum-exp that flash attention keeps, on the CPU too."""


def rounded(size: int) -> int:
    """Bytes that the allocator counts for a tensor that is cut from a larger block."""
    return -(-size // ROUNDING) * ROUNDING


def pinned_bytes(size: int) -> int:
    """Bytes of the host that torch takes for a pinned tensor (ATen/core/CachingHostAllocator.h)."""
    return 1 << (size - 1).bit_length() if size else 0


def block_bytes(size: int) -> int:
    """Bytes that it counts for a tensor that gets a new segment of its own."""
    if size <= LARGE:
        return rounded(size)
    segment = -(-size // SEGMENT) * SEGMENT
    return segment if segment - rounded(size) <= SMALL else rounded(size)
