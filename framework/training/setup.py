"""What is set up before the first step, apart from model and engine: data, determinism, the longest batch."""

from __future__ import annotations

import math
import os
import random
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import numpy as np
import torch
from peft import PeftModel
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from framework.checkpoint import capture_random_state, restore_random_state
from framework.config import Config, SourceConfig, data_sources
from framework.data import (
    Batch,
    Dataset,
    Loader,
    TokenCache,
    TokenizedDataset,
    default_cache_directory,
    epochs_line,
    evaluation_batches,
    hold_out,
    load_dataset,
    load_sources,
    load_tokenizer,
    source_lines,
)
from framework.errors import UserError
from framework.models import check_compatibility, load_model, read_architecture
from framework.sharding.protocol import Engine
from framework.training.objective import Objective
from framework.training.progress import Reporter


def load_data(config: Config, reporter: Reporter) -> tuple[Dataset, Dataset | None, int]:
    """The training set, the evaluation set and the padding token; what became of the records is reported.

    Raises:
        UserError: see `load_datasets` and `load_tokenizer`; or the model and the tokenizer do not go together.
    """
    tokenizer = load_tokenizer(tokenizer_source(config))
    model = config.model
    architecture = read_architecture(
        path=model.path, from_config=model.from_config, task=model.task, attention=model.attention
    )
    check_compatibility(architecture, tokenizer, config.data.sequence_length)
    train_data, eval_data = load_datasets(config, tokenizer)
    for line in (train_data.report.summary(), *source_lines(train_data)):
        reporter.line(f"data.train: {line}")
    if eval_data is not None:
        reporter.line(f"data.eval: {eval_data.report.summary()}")
    return train_data, eval_data, tokenizer.pad_token_id


def load_datasets(config: Config, tokenizer: PreTrainedTokenizerBase) -> tuple[Dataset, Dataset | None]:
    """The training set and the evaluation set that a config describes; the latter is None if there is none.

    Raises:
        UserError: see `load_dataset` and `hold_out`.
    """
    cache_dir = config.data.cache_dir
    cache = None
    if cache_dir is not None:
        directory = default_cache_directory() if cache_dir == "auto" else Path(cache_dir).expanduser()
        cache = TokenCache(directory, tokenizer)

    def load(source: SourceConfig, option: str) -> TokenizedDataset:
        return load_dataset(
            source,
            tokenizer=tokenizer,
            sequence_length=config.data.sequence_length,
            format=config.data.format,
            overlong=config.data.overlong,
            train_on=config.data.train_on,
            option=option,
            cache=cache,
        )

    train_data = load_sources(data_sources(config.data.train), partial(load, option="data.train"))
    if config.data.eval_fraction is not None:
        return hold_out(train_data, config.data.eval_fraction)
    if config.data.eval is None:
        return train_data, None
    return train_data, load_sources(data_sources(config.data.eval), partial(load, option="data.eval"))


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
    config: Config, train_data: Dataset, pad_token_id: int
) -> tuple[Loader, Callable[..., Iterator[Batch]]]:
    """The training loader, and `evaluation_batches` with the config's options, a data set still to be given."""
    options = {
        "sequence_length": config.data.sequence_length,
        "packing": config.data.packing,
        "micro_batch_size": config.training.micro_batch_size,
        "pad_token_id": pad_token_id,
        "workers": config.data.workers,
        "pin_memory": torch.cuda.is_available(),
    }
    loader = Loader(train_data, global_batch_size=config.training.global_batch_size, seed=config.run.seed, **options)
    return loader, partial(evaluation_batches, **options)


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
