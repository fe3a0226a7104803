"""A step of a run as it will be, recorded at full size without computing it: the ledger's check."""

from __future__ import annotations

import time
from dataclasses import dataclass
from math import ceil
from typing import Any

import torch
from transformers import PreTrainedConfig

from framework.config import Config
from framework.data import Batch
from framework.data.batch import NO_DOCUMENT
from framework.data.dataset import IGNORED
from framework.errors import UserError
from framework.models.configured import base_config, tokenizer_source
from framework.planner.fake_ranks import first_of
from framework.planner.known_trials import known_trials
from framework.planner.law import BLOCKS, PHASE_OF_PART
from framework.planner.recording import Recording, record_step
from framework.planner.small_models import Family, positions_of, values_of
from framework.planner.uncomputed import Uncomputed
from framework.selection import supervised_positions

SIMULATED_MICRO_BATCHES = 2
"""Of a step: those after the second allocate what the second does."""


@dataclass(frozen=True)
class Simulated:
    """What the first rank of a run holds.

    Attributes:
        start: bytes of weights, buffers and the optimiser's state.
        peaks: the most bytes that are live in each phase of a step, `start` included.
        seconds: that the simulation took.
    """

    start: int
    peaks: dict[str, int]
    seconds: float

    @property
    def peak(self) -> int:
        """Bytes of the highest peak."""
        return max(self.peaks.values())

    def to_json(self) -> dict[str, Any]:
        """As JSON values."""
        return {"start": self.start, "peaks": self.peaks, "seconds": self.seconds}


def simulate(config: Config, ranks: int, labelled_share: float) -> Simulated:
    """Record a step of a run at its real size, of which nothing large is computed.

    The process must not be a rank of anything, and should see no accelerator. Rows are full but for one token of
    padding where they are not packed, and of each row the last tokens are labelled.

    Args:
        config: of the run, without open keys; its weights are not read.
        ranks: number of processes.
        labelled_share: labelled tokens / all tokens of the data.

    Raises:
        UserError: the task has no batches that could be made up; the model has too few blocks, or some that can be
            selective and some that cannot.
    """
    if config.model.task != "causal_lm" or config.data.sequence_length is None:
        raise UserError(f"model.task: only causal_lm can be simulated, not {config.model.task}")
    begun = time.perf_counter()
    hf_config = _described(config)
    family = Family(hf_config)
    if family.depth < BLOCKS:
        raise UserError(f"model: only models of at least {BLOCKS} blocks can be simulated, not of {family.depth}")
    full = _without_files(config, values_of(hf_config), ranks)
    vocabulary = hf_config.get_text_config().vocab_size
    batch = _batch(full, vocabulary, labelled_share)
    count = min(full.gradient_accumulation(ranks), SIMULATED_MICRO_BATCHES)
    known = known_trials(config, family)
    alone = full.sharding.engine == "single"
    with torch.random.fork_rng(devices=()), known, Uncomputed(), first_of(ranks, connected=not alone) as connected:
        recording = record_step(full, batch, connected, count)
    return Simulated(recording.start, phase_peaks(recording), time.perf_counter() - begun)


def phase_peaks(recording: Recording) -> dict[str, int]:
    """The most bytes that were live in each phase of a recorded step."""
    live, peaks = recording.start, dict.fromkeys(PHASE_OF_PART.values(), 0)
    for part in recording.parts:
        phase = PHASE_OF_PART[part.name]
        peaks[phase] = max(peaks[phase], live)
        for change in part.changes:
            live += change
            peaks[phase] = max(peaks[phase], live)
    return peaks


def _described(config: Config) -> PreTrainedConfig:
    """The Hugging Face config of a run's model; as in planning, from `model.from_config` where that has it."""
    if config.model.from_config is not None:
        config = config.model_copy(update={"model": config.model.model_copy(update={"path": None})})
    return base_config(config)


def _without_files(config: Config, values: dict[str, Any], ranks: int) -> Config:
    """The same run from random weights, on so many ranks."""
    json = config.to_json()
    tokenizer = tokenizer_source(config) if config.model.added_tokens else "unused"
    json["model"] |= {"path": None, "from_config": values, "tokenizer": tokenizer}
    json["hardware"], json["cluster"] = {"gpus_per_node": ranks}, {}
    # Operators are counted one by one.
    json["training"] |= {"compile": False}
    return Config.model_validate(json, strict=False)


def _batch(config: Config, vocabulary: int, labelled_share: float) -> Batch:
    """A micro-batch of full rows, of which the last tokens are labelled; packed ones are of two documents each."""
    length = config.data.sequence_length
    assert length is not None
    shape = (config.micro_batch_size, length)
    ids = torch.randint(1, vocabulary, shape, generator=torch.Generator().manual_seed(0))
    labels = torch.full(shape, IGNORED)
    # A row's first token is no label: nothing predicts it.
    labelled = min(ceil(labelled_share * length), length - 1)
    labels[:, length - labelled :] = ids[:, length - labelled :]
    documents = torch.arange(shape[0])[:, None].expand(shape).clone()
    if config.data.packing:
        documents[:, length // 2 :] += shape[0]
        labels[:, length // 2] = IGNORED
        # As in almost every batch: where rows have as many selected tokens each, none is padded.
        labels[1:2, -1] = IGNORED
        further = {"position_ids": positions_of(documents)}
    else:
        # As in almost every batch: without padding there would be no mask.
        mask = torch.ones(shape, dtype=torch.int64)
        mask[-1, -1], labels[-1, -1], documents[-1, -1] = 0, IGNORED, NO_DOCUMENT
        further = {"attention_mask": mask}
    supervised = supervised_positions(labels, causal=True)
    return Batch({"input_ids": ids, "labels": labels, **further}, documents, supervised, int(supervised.sum()))
