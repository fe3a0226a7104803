"""The two kinds of text of the quality benchmark, from the embedded default data.

The starting point is trained on every token of the `describe` pairs (signature, then description). Fine-tuning is on
the `signature` pairs (a short answer after a long prompt), with labels on the answers only; of these, the pairs whose
answer is about a quarter of their tokens.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from framework.data import DataReport, TokenizedDataset, load_dataset, load_tokenizer

ANSWER_SHARES = (0.15, 0.4)  # answer tokens over all tokens of a pair; the pairs within have .25 on average
HELD_OUT = 200  # training pairs on which learning rates are compared


@dataclass(frozen=True)
class QualityData:
    """Tokenised data sets; `tuning` is held out of the training file, `report` is the evaluation file."""

    start: TokenizedDataset
    train: TokenizedDataset
    tuning: TokenizedDataset
    report: TokenizedDataset
    vocabulary: int
    pad_token_id: int


def subset(dataset: TokenizedDataset, indices: Iterable[int]) -> TokenizedDataset:
    """The samples at these indices."""
    ranges = [slice(dataset.offsets[index], dataset.offsets[index + 1]) for index in indices]
    ids = np.concatenate([dataset.input_ids[reach] for reach in ranges])
    supervised = np.concatenate([dataset.supervised[reach] for reach in ranges])
    report = DataReport(samples=len(ranges), tokens=len(ids), supervised_tokens=int(supervised.sum()))
    return TokenizedDataset(ids, supervised, np.array([reach.stop - reach.start for reach in ranges]), report)


def within_shares(dataset: TokenizedDataset) -> list[int]:
    """Indices of the samples whose labelled share is within `ANSWER_SHARES`."""
    share = np.add.reduceat(dataset.supervised.astype(np.int64), dataset.offsets[:-1]) / dataset.lengths
    return np.flatnonzero((share >= ANSWER_SHARES[0]) & (share <= ANSWER_SHARES[1])).tolist()


def prepare(source: Path, work: Path, *, sequence_length: int) -> QualityData:
    """Read, split and tokenise.

    Args:
        source: what `tools/make_default_data.py` made.
        work: an existing folder for the files of each kind.
        sequence_length: longer pairs are left out.
    """
    tokenizer = load_tokenizer(str(source / "tokenizer"))
    for name in ("train", "eval"):
        signature, describe = [], []
        for line in (source / f"{name}.jsonl").read_text().splitlines():
            record = json.loads(line)
            if record["task"] == "signature":
                signature.append(line)
            else:
                describe.append(json.dumps({"text": "\n\n".join(turn["content"] for turn in record["messages"])}))
        (work / f"{name}-signature.jsonl").write_text("\n".join(signature) + "\n")
        (work / f"{name}-describe.jsonl").write_text("\n".join(describe) + "\n")

    def load(name: str) -> TokenizedDataset:
        return load_dataset(work / f"{name}.jsonl", tokenizer=tokenizer, sequence_length=sequence_length)

    pairs, evaluation = load("train-signature"), load("eval-signature")
    fitting = within_shares(pairs)
    assert tokenizer.pad_token_id is not None
    return QualityData(
        start=load("train-describe"),
        train=subset(pairs, fitting[:-HELD_OUT]),
        tuning=subset(pairs, fitting[-HELD_OUT:]),
        report=subset(evaluation, within_shares(evaluation)),
        vocabulary=len(tokenizer),
        pad_token_id=tokenizer.pad_token_id,
    )
