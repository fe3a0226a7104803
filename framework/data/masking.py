"""Masked language modelling: which tokens of a document are hidden, and how.

BERT's procedure (arXiv 1810.04805, section 3.1 and its reference code): a fixed share of a document's tokens, at least
one, is to be found; of these 80 % become the mask token, 10 % another token, 10 % stay. It is dynamic (RoBERTa, arXiv
1907.11692): every draw of a document hides other tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from framework.data.batch import NO_DOCUMENT, Batch
from framework.data.dataset import IGNORED, Dataset, TokenizedDataset
from framework.errors import UserError
from framework.selection import supervised_positions

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

MASKED_SHARE = 0.8
RANDOM_SHARE = 0.1

STREAM = 1
"""Tells these draws from the selection's, which have the same seed and draw index."""


@dataclass(frozen=True)
class Masking:
    """How documents are masked.

    Attributes:
        probability: share of the tokens that are no special ones.
        seed: of the draws, together with a document's draw index.
        mask_token_id: the mask token.
        special_ids: int64 `[special]`, tokens that are never masked.
        ordinary_ids: int64 `[ordinary]`, tokens that a random one is taken from.
    """

    probability: float
    seed: int
    mask_token_id: int
    special_ids: np.ndarray
    ordinary_ids: np.ndarray

    @classmethod
    def of_tokenizer(cls, tokenizer: PreTrainedTokenizerBase, *, probability: float, seed: int) -> Masking:
        """Masking with the special tokens of a tokenizer.

        Raises:
            UserError: it has no mask token.
        """
        if tokenizer.mask_token_id is None:
            raise UserError(
                f"model.tokenizer: {tokenizer.name_or_path} has no mask token, which model.task 'masked_lm' needs; set "
                "mask_token in its tokenizer_config.json"
            )
        special = np.unique(np.asarray(tokenizer.all_special_ids, np.int64))
        every = np.unique(np.asarray([*tokenizer.get_vocab().values()], np.int64))
        ordinary = np.setdiff1d(every, special)
        return cls(probability, seed, tokenizer.mask_token_id, special, ordinary)

    def counts(self, candidates: np.ndarray) -> np.ndarray:
        """How many of so many tokens are masked; at least one."""
        return np.maximum(1, np.rint(self.probability * candidates)).astype(np.int64)

    def document(self, input_ids: np.ndarray, draw: int) -> tuple[np.ndarray, np.ndarray]:
        """Mask one document: a pure function of the seed, the draw index and the tokens.

        Drawn from raw output of a counter-based generator, which numpy keeps the same between versions and machines
        (unlike `Generator.choice`).

        Args:
            input_ids: int64 `[sequence]`.
            draw: epoch * samples + sample index.

        Returns:
            The tokens that the model sees and the labels, int64 `[sequence]` each; labels are -100 but where a token
            is to be found.
        """
        candidates = np.flatnonzero(~np.isin(input_ids, self.special_ids))
        seen, labels = input_ids.copy(), np.full_like(input_ids, IGNORED)
        if not len(candidates):
            return seen, labels
        random = np.random.Philox(np.random.SeedSequence([self.seed, draw], spawn_key=(STREAM,)))
        count = int(self.counts(np.asarray(len(candidates))))
        chosen = candidates[np.argsort(random.random_raw(len(candidates)), kind="stable")[:count]]
        labels[chosen] = input_ids[chosen]
        fate = random.random_raw(count) * 2.0**-64
        # The remainder favours some tokens by less than the size of the vocabulary / 2**64.
        strangers = self.ordinary_ids[random.random_raw(count) % np.uint64(len(self.ordinary_ids))]
        seen[chosen] = np.where(
            fate < MASKED_SHARE,
            self.mask_token_id,
            np.where(fate < MASKED_SHARE + RANDOM_SHARE, strangers, input_ids[chosen]),
        )
        return seen, labels

    def batch(self, batch: Batch) -> Batch:
        """Mask every document of a batch."""
        input_ids = batch.inputs["input_ids"].numpy().copy()
        labels = np.full_like(input_ids, IGNORED)
        documents = batch.documents.numpy()
        for row, owners in enumerate(documents):
            for draw in np.unique(owners[owners != NO_DOCUMENT]):
                place = owners == draw
                input_ids[row, place], labels[row, place] = self.document(input_ids[row, place], int(draw))
        masked = {"input_ids": torch.from_numpy(input_ids), "labels": torch.from_numpy(labels)}
        supervised = supervised_positions(masked["labels"], causal=False)
        return replace(
            batch, inputs=batch.inputs | masked, supervised=supervised, supervised_tokens=int(supervised.sum())
        )


class MaskableDataset(TokenizedDataset):
    """Documents with the tokens that may be masked as `supervised`; every draw labels a share of these."""

    def __init__(self, *arrays: np.ndarray, masking: Masking, **options: Any) -> None:
        """Take what `TokenizedDataset` takes, and how the documents will be masked."""
        super().__init__(*arrays, **options)
        self._masking = masking

    @property
    def supervised_lengths(self) -> np.ndarray:
        """Tokens of each document that a draw masks, int64 `[samples]`."""
        return self._masking.counts(super().supervised_lengths)


def maskable(dataset: TokenizedDataset, masking: Masking, option: str) -> MaskableDataset:
    """The documents that have a token to mask; the report counts what is masked.

    Args:
        dataset: `text` documents.
        masking: How they will be masked.
        option: The config key that the data comes from, for error messages.

    Raises:
        UserError: no document is left.
    """
    ordinary = ~np.isin(dataset.input_ids, masking.special_ids)
    candidates = np.add.reduceat(ordinary, dataset.offsets[:-1], dtype=np.int64)
    kept = candidates > 0
    if not kept.any():
        raise UserError(f"{option}: no document has a token that may be masked: all are special tokens")
    of_kept = np.repeat(kept, dataset.lengths)
    report = replace(
        dataset.report,
        samples=int(kept.sum()),
        unsupervised=dataset.report.unsupervised + int((~kept).sum()),
        tokens=int(of_kept.sum()),
        supervised_tokens=int(masking.counts(candidates[kept]).sum()),
    )
    return MaskableDataset(
        dataset.input_ids if kept.all() else dataset.input_ids[of_kept],  # mapped from the cache, if they can stay
        ordinary[of_kept],
        dataset.lengths[kept],
        masking=masking,
        report=report,
        name=dataset.name,
        digests=dataset.digests[kept],
        contents=dataset.contents[kept],
    )


def collate_masked(
    collate: Callable[[Dataset, Sequence], Batch], masking: Masking, dataset: Dataset, draws: Sequence
) -> Batch:
    """The batch that `collate` makes, with its documents masked."""
    return masking.batch(collate(dataset, draws))
