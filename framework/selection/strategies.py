"""Strategies: from labels and documents to a selection.

A draw depends on (seed, document index) alone, never on the rank, the micro-batch or what was drawn before, so the
same samples get the same selection however a batch is split, and after a resume.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from framework.selection.selection import Selection

LABELLED = "labelled"


@dataclass(frozen=True)
class Document:
    """What a strategy sees of one document: `supervised` bool `[tokens]`, the wanted ratio, its random generator."""

    supervised: NDArray[np.bool_]
    ratio: float | str
    random: np.random.Generator
    forced_ends: bool

    @property
    def tokens(self) -> int:
        """Number of tokens."""
        return len(self.supervised)


Draw = tuple[NDArray[np.bool_], NDArray[np.float32]]  # selected [tokens], inclusion probability [tokens]
Strategy = Callable[[Document], Draw]


def _without_replacement(document: Document, candidates: NDArray[np.int64], count: int) -> Draw:
    """Select `count` of `candidates`, each subset equally likely."""
    selected = np.zeros(document.tokens, dtype=np.bool_)
    probability = np.zeros(document.tokens, dtype=np.float32)
    if len(candidates):
        selected[document.random.choice(candidates, size=count, replace=False)] = True
        probability[candidates] = count / len(candidates)
    return selected, probability


def _supervised(document: Document) -> Draw:
    """Every labelled position, and a uniform share of the context so that the total reaches the ratio."""
    labelled = document.supervised
    wanted = 0 if isinstance(document.ratio, str) else round(document.ratio * document.tokens) - int(labelled.sum())
    context = np.flatnonzero(~labelled)
    selected, probability = _without_replacement(document, context, max(0, min(wanted, len(context))))
    return selected | labelled, np.where(labelled, np.float32(1), probability)


def _uniform(document: Document) -> Draw:
    """A fixed count of positions without replacement, the source's token sampling (TokenTune, arXiv 2501.18824)."""
    assert not isinstance(document.ratio, str)
    count = max(1, round(document.ratio * document.tokens))
    if not document.forced_ends:
        return _without_replacement(document, np.arange(document.tokens), count)
    ends = np.unique([0, document.tokens - 1])
    between = np.arange(1, document.tokens - 1)
    selected, probability = _without_replacement(document, between, max(0, min(count - len(ends), len(between))))
    selected[ends], probability[ends] = True, 1
    return selected, probability


def _bernoulli(document: Document) -> Draw:
    """Every position independently, with the ratio as its probability."""
    assert not isinstance(document.ratio, str)
    probability = np.full(document.tokens, document.ratio, dtype=np.float32)
    return document.random.random(document.tokens) < document.ratio, probability


def _suffix(document: Document) -> Draw:
    """A contiguous end. It is no draw, so no weights make up for the labels before it: what is trained is biased."""
    assert not isinstance(document.ratio, str)
    count = max(1, round(document.ratio * document.tokens))
    selected = np.arange(document.tokens) >= document.tokens - count
    return selected, np.ones(document.tokens, dtype=np.float32)


STRATEGIES: dict[str, Strategy] = {
    "supervised": _supervised,
    "uniform": _uniform,
    "bernoulli": _bernoulli,
    "suffix": _suffix,
}

NORMALIZATIONS = ("supervised", "selected")
"""The weighted sum over all supervised tokens, or the mean over the selected ones of them."""


def selects_runs(strategy: str, ratio: float | str) -> bool:
    """Whether a strategy selects contiguous tokens wherever the labelled ones are contiguous.

    A property of the options: it does not depend on a batch.
    """
    return strategy == "suffix" or ratio == LABELLED or ratio == 1


def normalization_of(strategy: str) -> str:
    """The normalization of a strategy where none is asked for; `suffix` goes with `selected` alone."""
    return "selected" if strategy == "suffix" else "supervised"


def check_options(strategy: str, ratio: float | str, tokentune: bool = False, normalization: str | None = None) -> None:
    """Refuse combinations that have no meaning.

    Raises:
        ValueError: unknown strategy or normalization; a ratio that is not a number in (0, 1]; `"labelled"` with another
            strategy than `supervised`; `tokentune` with another strategy than `uniform`; the normalization
            `supervised` with the strategy `suffix`.
    """
    if strategy not in STRATEGIES:
        raise ValueError(f"selection.strategy: {strategy!r} is none of {', '.join(STRATEGIES)}")
    if isinstance(ratio, str):
        if ratio != LABELLED or strategy != "supervised":
            raise ValueError(
                f"selection.ratio: {ratio!r} does not go with strategy {strategy!r}; give a number in (0, 1]"
            )
    elif not 0 < ratio <= 1:
        raise ValueError(f"selection.ratio: {ratio} is not in (0, 1]")
    if tokentune and strategy != "uniform":
        raise ValueError(f"selection.tokentune: only the strategy 'uniform' has it, not {strategy!r}")
    if normalization not in (None, *NORMALIZATIONS):
        raise ValueError(f"selection.normalization: {normalization!r} is none of {', '.join(NORMALIZATIONS)}")
    if normalization == "supervised" and strategy == "suffix":
        raise ValueError(
            "selection.normalization: 'supervised' makes up for labels that are left out by chance, and the strategy "
            "'suffix' leaves the same ones out for certain: use 'selected', which is its default"
        )


def select(
    *, strategy: str, ratio: float | str, supervised: Tensor, documents: Tensor, seed: int, tokentune: bool = False
) -> Selection:
    """Draw the selection of one batch.

    Args:
        strategy: `supervised`, `uniform`, `bernoulli` or `suffix`.
        ratio: selected tokens over non-padding tokens, in (0, 1], counted per document; or `"labelled"` (strategy
            `supervised`: labelled positions only).
        supervised: bool `[batch, sequence]`, positions whose prediction enters the loss.
        documents: int64 `[batch, sequence]`, index of the document that each token belongs to, -1 for padding; the
            tokens of a document are contiguous.
        seed: seeds the draws together with the document index.
        tokentune: with `uniform`, select the first and the last position of every document, within the count.

    Returns:
        The selection, on the CPU or wherever `documents` is. A batch without any selected token gives fillers only.

    Raises:
        ValueError: see `check_options`.
    """
    check_options(strategy, ratio, tokentune)
    draw = STRATEGIES[strategy]
    owner, labelled = documents.cpu().numpy(), (supervised & (documents >= 0)).cpu().numpy()
    selected = np.zeros(owner.shape, dtype=np.bool_)
    probability = np.ones(owner.shape, dtype=np.float32)
    for row in range(owner.shape[0]):
        bounds = np.flatnonzero(np.diff(owner[row], prepend=-2, append=-2))
        for start, stop in itertools.pairwise(bounds):
            index = int(owner[row, start])
            if index < 0:
                continue
            random = np.random.Generator(np.random.Philox(np.random.SeedSequence([seed, index])))
            document = Document(labelled[row, start:stop], ratio, random, tokentune)
            selected[row, start:stop], probability[row, start:stop] = draw(document)
    chosen = Selection.of_mask(torch.from_numpy(selected), torch.from_numpy(probability))
    return chosen.to(documents.device)
