"""The data of the retrieval tasks: pairs of keys and values, filler, then some of the keys, whose values are asked.

    begin  k3 v1  k0 v7  k5 v2  k6 v7   f f f … f   k5 v2  k0 v7
           pairs, whose keys differ     gap         questions; their values carry the labels

Everything is drawn at random, so there is nothing to learn by heart: the answer is in the prompt, `gap` tokens of
filler and more before the question, and nowhere else.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from quality_arms import Sizes
from torch import nn
from torch.nn.functional import cross_entropy

from framework.data import DataReport, TokenizedDataset

PAD, BEGIN = 0, 1
KEYS = {"same": range(2, 6), "half": range(4, 8), "new": range(6, 10)}
"""The starting point's keys, two of them and two new ones, new ones alone."""
VALUES = range(10, 18)
FILLER = range(18, 26)
VOCABULARY = 26
PAIRS = 4
QUESTIONS = 2
EVALUATED_AT_ONCE = 64


@dataclass(frozen=True)
class Documents:
    """Documents of one length.

    Attributes:
        ids: int32 `[documents, tokens]`.
        labelled: bool `[documents, tokens]`, the answers.
    """

    ids: np.ndarray
    labelled: np.ndarray


def length(gap: int) -> int:
    """Tokens of a document."""
    return 1 + 2 * PAIRS + gap + 2 * QUESTIONS


def draw(gap: int, count: int, *, seed: int, keys: str = "same") -> Documents:
    """Documents with this many tokens of filler between the last pair and the first question.

    Args:
        gap: tokens of filler.
        count: documents.
        seed: of the draws, together with the other arguments.
        keys: of `KEYS`.
    """
    random = np.random.default_rng([seed, gap, count, list(KEYS).index(keys)])
    key = random.permuted(np.tile(np.array(KEYS[keys]), (count, 1)), axis=1)[:, :PAIRS]
    value = random.choice(VALUES, (count, PAIRS))
    asked = random.permuted(np.tile(np.arange(PAIRS), (count, 1)), axis=1)[:, :QUESTIONS]
    pairs = np.stack([key, value], axis=2)
    questions = np.take_along_axis(pairs, asked[:, :, None], axis=1)
    begin, filler = np.full((count, 1), BEGIN), random.choice(FILLER, (count, gap))
    parts = [begin, pairs.reshape(count, -1), filler, questions.reshape(count, -1)]
    ids = np.concatenate(parts, axis=1).astype(np.int32)
    labelled = np.zeros(ids.shape, dtype=bool)
    labelled[:, -2 * QUESTIONS + 1 :: 2] = True
    return Documents(ids, labelled)


def joined(parts: Sequence[Documents]) -> TokenizedDataset:
    """One data set of several lots of documents."""
    ids = np.concatenate([part.ids.ravel() for part in parts])
    labelled = np.concatenate([part.labelled.ravel() for part in parts])
    lengths = np.concatenate([np.full(len(part.ids), part.ids.shape[1]) for part in parts])
    report = DataReport(samples=len(lengths), tokens=len(ids), supervised_tokens=int(labelled.sum()))
    return TokenizedDataset(ids, labelled, lengths, report)


@torch.no_grad()
def answers(model: nn.Module, documents: Documents) -> tuple[float, float]:
    """Share of the answers that are the most probable token of all, and their mean loss in nats.

    Args:
        model: causal, in train mode, which it stays in.
        documents: to ask it.
    """
    model.eval()
    right, loss, count = 0, 0.0, 0
    for start in range(0, len(documents.ids), EVALUATED_AT_ONCE):
        ids = torch.from_numpy(documents.ids[start : start + EVALUATED_AT_ONCE]).long()
        labelled = torch.from_numpy(documents.labelled[start : start + EVALUATED_AT_ONCE])[:, 1:]
        logits, targets = model(ids).logits[:, :-1][labelled], ids[:, 1:][labelled]
        right += int((logits.argmax(-1) == targets).sum())
        loss += float(cross_entropy(logits, targets, reduction="sum"))
        count += len(targets)
    model.train()
    return right / count, loss / count


class RetrievalSizes(Sizes):
    """A model of the retrieval tasks: as many key heads as query heads, an MLP as wide as the hidden state.

    The weights start five times larger than usual and queries and keys have biases, with which a model of two blocks
    finds out how to retrieve within some hundred steps.
    """

    def config(self) -> dict[str, object]:
        """Of the model."""
        heads = self.hidden // 32
        shape = {"num_attention_heads": heads, "num_key_value_heads": heads, "intermediate_size": self.hidden}
        return super().config() | shape | {"model_type": "qwen2", "initializer_range": 0.1}
