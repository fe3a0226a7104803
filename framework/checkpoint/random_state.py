"""The random generators of a process: Python's, numpy's, and torch's on the CPU and on its CUDA device."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import torch

from framework.sharding.ranks import Ranks


def capture_random_state() -> dict[str, Any]:
    """The state of every generator, as tensors and plain values that `torch.load(weights_only=True)` accepts."""
    algorithm, keys, position, has_gauss, cached_gaussian = np.random.get_state(legacy=True)
    return {
        "python": random.getstate(),
        "numpy": {
            "algorithm": algorithm,
            "keys": torch.from_numpy(np.asarray(keys).astype(np.int64)),
            "position": int(position),
            "has_gauss": int(has_gauss),
            "cached_gaussian": float(cached_gaussian),
        },
        "torch": torch.get_rng_state(),
        "cuda": [torch.cuda.get_rng_state()] if torch.cuda.is_available() else [],
    }


def restore_random_state(state: dict[str, Any]) -> None:
    """Put every generator back.

    Args:
        state: From `capture_random_state`. Without a CUDA device, the state of one is left out.
    """
    version, internal, gauss = state["python"]
    random.setstate((version, tuple(internal), gauss))
    numpy_state = state["numpy"]
    np.random.set_state(
        (
            numpy_state["algorithm"],
            numpy_state["keys"].numpy().astype(np.uint32),
            numpy_state["position"],
            numpy_state["has_gauss"],
            numpy_state["cached_gaussian"],
        )
    )
    torch.set_rng_state(state["torch"])
    if state["cuda"] and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"][0])


def seed_generators(seed: int, step: int = 0, rank: int = 0) -> None:
    """Seed every generator with a number of its own for each triple, so that ranks draw differently."""
    entropy = np.random.SeedSequence((seed % 2**64, step, rank))
    number = int(entropy.generate_state(1, np.uint64)[0])
    random.seed(number)
    np.random.seed(number % 2**32)
    torch.manual_seed(number)


def resume_random_state(saved: list[dict[str, Any]], ranks: Ranks, *, seed: int, step: int) -> bool:
    """Put this rank's generators back, or seed them anew where other ranks saved than resume.

    Then dropout, and whatever else draws from them, draws other numbers than the run would have without the stop.

    Args:
        saved: `capture_random_state` of every rank that saved, by rank.
        ranks: of this run.
        seed: of the run.
        step: that it resumes from.

    Returns:
        Whether they are back.
    """
    if len(saved) != ranks.world_size:
        seed_generators(seed, step, ranks.rank)
        return False
    restore_random_state(saved[ranks.rank])
    return True
