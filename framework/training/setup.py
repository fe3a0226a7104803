"""What is set up before the first step: loaders, the model, determinism, the longest batch."""

from __future__ import annotations

import math
import os
import random
from collections.abc import Callable, Iterator
from functools import partial

import numpy as np
import torch

from framework.checkpoint import capture_random_state, restore_random_state
from framework.config import Config
from framework.data import Batch, Collate, Dataset, Loader, epochs_line, evaluation_batches
from framework.sharding.protocol import Engine
from framework.training.memory import CpuMemoryTracker
from framework.training.objective import Objective
from framework.training.progress import Reporter


def make_loaders(
    config: Config,
    train_data: Dataset,
    pad_token_id: int | None,
    *,
    collate: Collate | None = None,
    evaluation_collate: Collate | None = None,
) -> tuple[Loader, Callable[..., Iterator[Batch]]]:
    """The training loader, and `evaluation_batches` with the config's options, a data set still to be given.

    Args:
        config: Of the run.
        train_data: The training set.
        pad_token_id: What fills rows up; None for images.
        collate: Makes training batches; a causal language model's by default.
        evaluation_collate: Makes evaluation batches; a causal language model's by default.
    """
    options = {
        "sequence_length": config.data.sequence_length,
        "packing": config.data.packing,
        "micro_batch_size": config.training.micro_batch_size,
        "pad_token_id": pad_token_id,
        "workers": config.data.workers,
        "pin_memory": torch.cuda.is_available(),
    }
    loader = Loader(
        train_data,
        global_batch_size=config.training.global_batch_size,
        seed=config.run.seed,
        collate=collate,
        **options,
    )
    return loader, partial(evaluation_batches, collate=evaluation_collate, **options)


def report_epochs(config: Config, loader: Loader, reporter: Reporter) -> None:
    """Say how often the run draws the samples of each source; with packing an estimate from the current epoch."""
    steps, batch = config.training.max_steps, config.training.global_batch_size
    line = epochs_line(loader.dataset, steps * batch * loader.samples_per_sequence)
    reporter.line(f"data.train: {steps} steps of {batch} sequences are {line}")


def in_steps(config: Config, loader: Loader, reporter: Reporter) -> Config:
    """The same run with `training.epochs` as the number of steps in which `loader` makes so many passes."""
    epochs = config.training.epochs
    whole = int(epochs)
    sequences = sum(len(loader.sequences(epoch)) for epoch in range(whole))
    if epochs > whole:
        sequences += math.ceil((epochs - whole) * len(loader.sequences(whole)))
    steps = math.ceil(sequences / config.training.global_batch_size)
    reporter.line(f"training.epochs: {epochs:g} epochs are {sequences:,} sequences, {steps:,} steps")
    return config.with_max_steps(steps)


def seed_everything(seed: int) -> None:
    """Seed what draws without a seed of its own, such as dropout."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def use_deterministic_kernels() -> None:
    """Make torch choose kernels that give the same bits every time, or raise where it has none.

    cuBLAS needs its workspace fixed before the first product (https://docs.nvidia.com/cuda/cublas, "Results
    reproducibility").
    """
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True)
    torch.backends.cudnn.deterministic = True
    torch.backends.cudnn.benchmark = False


def warm_up(engine: Engine, objective: Objective, longest: Batch) -> None:
    """Run the longest batch forward and backward, so that a lack of memory shows before hours have passed.

    Does nothing on the CPU, where memory fails late and slowly anyway. Gradients and random states are as before.
    """
    if engine.device.type != "cuda":
        return
    states = capture_random_state()
    selection = objective.select(longest)
    count = max(1, objective.denominator(longest, selection))
    with engine.autocast():
        loss = objective.loss(engine.model, longest, selection, count)
    engine.backward(loss)
    engine.discard_gradients()
    restore_random_state(states)


def cpu_tracker(config: Config, engine: Engine) -> CpuMemoryTracker | None:
    """The counter of live tensor bytes, if it is asked for and the device has none of its own."""
    if not config.logging.track_cpu_memory or engine.device.type != "cpu":
        return None
    tracker = CpuMemoryTracker()
    tracker.track(tensor for tensors in engine.held() for tensor in tensors)
    return tracker
