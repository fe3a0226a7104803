"""Several sources as one data set: their mixture, their split, and what is reported about each."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from framework.config import SourceConfig
from framework.data.dataset import Dataset, JoinedDataset, Subset, TokenizedDataset
from framework.data.mixture import LEAST_SHARE, shares_of
from framework.errors import UserError


def load_sources(
    sources: Sequence[SourceConfig], load: Callable[[SourceConfig], TokenizedDataset]
) -> TokenizedDataset | JoinedDataset:
    """The data sets of all sources as one; a mixture if the sources have weights.

    Args:
        sources: With a weight each, or none with one.
        load: Reads one source.

    Raises:
        UserError: Sources cannot be read, or have a weight by which they are never drawn; all their problems together.
    """
    parts, problems = [], []
    for source in sources:
        try:
            parts.append(load(source))
        except UserError as error:
            problems.append(str(error))
    if problems:
        raise UserError("\n".join(problems))
    weights = [source.weight for source in sources if source.weight is not None]
    if len(parts) == 1:
        return parts[0]
    if not weights:
        return JoinedDataset(parts)
    shares = shares_of(weights)
    problems = [
        f"data.train: the weight {source.weight} of {source.path} is so small beside the others that no sample of it "
        "would ever be drawn: raise it, or leave the source out"
        for source, share in zip(sources, shares, strict=True)
        if share < LEAST_SHARE
    ]
    if problems:
        raise UserError("\n".join(problems))
    return JoinedDataset(parts, shares=shares)


def hold_out(data: Dataset, fraction: float) -> tuple[Dataset, Dataset]:
    """Split into training and evaluation data.

    A sample's side is decided by the hash of the text that it was made from: equal ones are on the same side, and
    neither further data nor another order, tokenizer or sequence length moves a sample to the other.

    Args:
        data: All samples; of a mixture, each source is split and the shares stay those of the training side.
        fraction: Share of different samples that are held out, in (0, 1), give or take chance.

    Returns:
        The training and the evaluation data.

    Raises:
        UserError: A source has no sample left for training, or none at all was held out.
    """
    limit = np.uint64(fraction * 2.0**64)
    sides = [
        (Subset(part, np.flatnonzero(held)), Subset(part, np.flatnonzero(~held)))
        for part, held in ((part, part.contents < limit) for part in data.parts)
    ]
    evaluation = [held for held, _ in sides if len(held)]
    training = [kept for _, kept in sides]
    for kept in training:
        if not len(kept):
            raise UserError(f"data.eval_fraction: {fraction} leaves no sample of {kept.name} to train on: lower it")
    if not evaluation:
        raise UserError(
            f"data.eval_fraction: {fraction} of {len(data)} samples holds none out: raise it, or give data.eval"
        )
    return _joined(training, data.shares), _joined(evaluation, None)


def _joined(parts: Sequence[Dataset], shares: np.ndarray | None) -> Dataset:
    return parts[0] if len(parts) == 1 else JoinedDataset(parts, shares=shares)


def source_lines(data: Dataset) -> list[str]:
    """What a log says of each source of a data set of several: counts, and its shares of what is drawn."""
    if len(data.parts) == 1:
        return []
    sizes = np.array([len(part) for part in data.parts])
    shares = sizes / sizes.sum() if data.shares is None else data.shares
    tokens = shares * [part.report.tokens / len(part) for part in data.parts]
    lines = [
        f"{part.name}: {part.report.summary()}; {share:.1%} of the samples drawn"
        for part, share in zip(data.parts, shares, strict=True)
    ]
    if not tokens.any():  # images: the model says how many they have
        return lines
    return [f"{line}, {share:.1%} of their tokens" for line, share in zip(lines, tokens / tokens.sum(), strict=True)]


def epochs_line(data: Dataset, drawn: float) -> str:
    """How often the samples of each source are drawn in a run.

    Args:
        data: The training set.
        drawn: Samples that the run draws.
    """
    epochs = drawn / len(data)
    if data.shares is None:
        return f"{epochs:.2f} epochs"
    each = [
        f"{epochs * share * len(data) / len(part):.2f} of {part.name}"
        for part, share in zip(data.parts, data.shares, strict=True)
    ]
    return f"epochs: {', '.join(each)}"
