"""Batches of random tokens, for tools that measure steps."""

from __future__ import annotations

import torch

from framework.config import Config
from framework.data import Batch
from framework.data.batch import NO_DOCUMENT
from framework.data.dataset import IGNORED
from framework.planner.small_models import positions_of
from framework.selection import supervised_positions


def made_up(config: Config, length: int, prompt: int, seed: int) -> Batch:
    """A micro-batch of a run: rows shorter by a token each, padded to a multiple of 8; packed ones of two documents.

    Args:
        config: of the run; its vocabulary is that of `model.from_config`.
        length: tokens of the first row.
        prompt: tokens of every row without a label, fewer than half of them where rows are packed.
        seed: of the tokens.
    """
    drawn = torch.Generator().manual_seed(seed)
    shape = (config.micro_batch_size, -(-length // 8) * 8)
    ids = torch.randint(1, config.model.from_config["vocab_size"], shape, generator=drawn)
    labels, mask = ids.clone(), torch.ones(shape, dtype=torch.int64)
    documents = torch.arange(shape[0])[:, None].expand(shape).clone()
    labels[:, :prompt] = IGNORED
    if config.data.packing:
        documents[:, shape[1] // 2 :] += shape[0]
        labels[:, shape[1] // 2] = IGNORED
        inputs = {"input_ids": ids, "labels": labels, "position_ids": positions_of(documents)}
    else:
        for row in range(shape[0]):
            for tensor, value in ((labels, IGNORED), (mask, 0), (documents, NO_DOCUMENT)):
                tensor[row, length - row :] = value
        inputs = {"input_ids": ids, "labels": labels, "attention_mask": mask}
    supervised = supervised_positions(labels, causal=True)
    return Batch(inputs, documents, supervised, int(supervised.sum()))
