"""How the device's allocator is set up. Must not import torch."""

from __future__ import annotations

import os

VARIABLES = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_HIP_ALLOC_CONF")
"""Environment variables that torch takes the allocator's settings from."""

GROWING = "expandable_segments:True"


def grow_segments() -> None:
    """Let the allocator's segments grow, so that little more is reserved than allocated, whatever sizes come.

    Steps differ in tokens and selected rows, so that fixed segments are often a little too small for the next tensor.
    An environment that has settings is left as it is. It counts for a process that has not used its device yet.
    """
    if not any(name in os.environ for name in VARIABLES):
        os.environ["PYTORCH_ALLOC_CONF"] = GROWING
