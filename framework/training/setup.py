"""What is set up before the first step, apart from model and engine: data, determinism, the longest batch."""

from __future__ import annotations

import math
import os
import random
from collections.abc import Callable, Iterator
from functools import partial

import numpy as np
import torch
from peft import PeftModel
from transformers import PreTrainedModel

from framework.checkpoint import capture_random_state, restore_random_state
from framework.config import Config, data_sources
from framework.data import Batch, Loader, TokenizedDataset, evaluation_batches, load_dataset, load_tokenizer
from framework.errors import UserError
from framework.models import check_compatibility, load_model, read_architecture
from framework.sharding.protocol import Engine
from framework.training.objective import Objective
from framework.training.progress import Reporter


def load_data(config: Config, reporter: Reporter) -> tuple[TokenizedDataset, TokenizedDataset | None, int]:
    """The training set, the evaluation set and the padding token; what became of the records is reported.

    Raises:
        UserError: see `load_dataset` and `load_tokenizer`; or the model and the tokenizer do not go together.
    """
    tokenizer = load_tokenizer(tokenizer_source(config))
    model = config.model
    architecture = read_architecture(
        path=model.path, from_config=model.from_config, task=model.task, attention=model.attention
    )
    check_compatibility(architecture, tokenizer, config.data.sequence_length)
    load = partial(
        load_dataset,
        tokenizer=tokenizer,
        sequence_length=config.data.sequence_length,
        format=config.data.format,
        overlong=config.data.overlong,
        train_on=config.data.train_on,
    )
    train_data = load(data_sources(config.data.train), option="data.train")
    reporter.line(f"data.train: {train_data.report.summary()}")
    eval_data = None
    if config.data.eval is not None:
        eval_data = load(data_sources(config.data.eval), option="data.eval")
        reporter.line(f"data.eval: {eval_data.report.summary()}")
    return train_data, eval_data, tokenizer.pad_token_id


def tokenizer_source(config: Config) -> str:
    """Directory or hub name of the tokenizer.

    Raises:
        UserError: the config names none.
    """
    source = config.model.tokenizer or config.model.path
    if source is None:
        raise UserError("model.tokenizer: missing, and there is no model.path to take it from")
    return source


def make_loaders(
    config: Config, train_data: TokenizedDataset, pad_token_id: int
) -> tuple[Loader, Callable[..., Iterator[Batch]]]:
    """The training loader, and `evaluation_batches` with the config's options, a data set still to be given."""
    shape = {
        "sequence_length": config.data.sequence_length,
        "packing": config.data.packing,
        "micro_batch_size": config.training.micro_batch_size,
        "pad_token_id": pad_token_id,
    }
    loader = Loader(train_data, global_batch_size=config.training.global_batch_size, seed=config.run.seed, **shape)
    return loader, partial(evaluation_batches, **shape)


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


def configured_model(config: Config) -> PreTrainedModel | PeftModel:
    """The model that a config describes, with its adapter, on the CPU. Raises as `framework.models.load_model` does."""
    return load_model(
        path=config.model.path,
        from_config=config.model.from_config,
        task=config.model.task,
        dtype=getattr(torch, config.weights_dtype),
        attention=config.model.attention,
        seed=config.run.seed,
        adapter=config.model.adapter,
    )


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
