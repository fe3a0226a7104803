"""The arms of the quality benchmark: one model, one kind of data, different ways to spend the same time."""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from bench_step import build_model
from torch import nn

from framework.config import Config
from framework.data import Loader, TokenizedDataset, evaluation_batches
from framework.training.loss import evaluation_loss
from framework.training.objective import Objective
from framework.training.optimizer import optimizer_factory
from framework.training.schedule import learning_rate


@dataclass(frozen=True)
class Arm:
    """One way to train.

    Attributes:
        name: as printed.
        policy: `all`, `checkpoint` or `selective` (with retained linears).
        strategy: of the selection.
        ratio: of the selection.
        sequences: share of the batch's sequences in each step.
        correction: of the selection.
    """

    name: str
    policy: str = "all"
    strategy: str = "none"
    ratio: float | str | None = None
    sequences: float = 1.0
    correction: float = 0.0


def selective(name: str, strategy: str, ratio: float | str, correction: float = 0.0) -> Arm:
    """An arm that selects tokens; arguments as for `Arm`."""
    return Arm(name, "selective", strategy, ratio, correction=correction)


ORDINARY = Arm("ordinary")
LABELLED = selective("supervised, labelled", "supervised", "labelled")


@dataclass(frozen=True)
class Sizes:
    """Model and batch.

    Attributes:
        hidden: width; heads are 32 wide, a quarter of them for keys and values, the MLP is 8/3 as wide.
        depth: blocks.
        vocabulary: of the tokenizer.
        batch: sequences of a whole step.
        sequence: tokens of a packed sequence.
        pad_token_id: of the tokenizer.
    """

    hidden: int
    depth: int
    vocabulary: int
    batch: int
    sequence: int
    pad_token_id: int

    def config(self) -> dict[str, object]:
        """The Hugging Face config of the model, without its depth."""
        heads = self.hidden // 32
        return {
            "model_type": "llama",
            "hidden_size": self.hidden,
            "num_attention_heads": heads,
            "num_key_value_heads": max(1, heads // 4),
            "intermediate_size": -(-self.hidden * 8 // 3 // 32) * 32,
            "vocab_size": self.vocabulary,
            "max_position_embeddings": self.sequence,
            "tie_word_embeddings": True,
        }

    def model(self, seed: int) -> nn.Module:
        """A random model in train mode."""
        device = torch.device("cpu")
        return build_model(self.config(), depth=self.depth, dtype=torch.float32, device=device, seed=seed)


class Training:
    """A model in the course of its training by one arm.

    Args:
        model: plain; changed in place.
        arm: how.
        sizes: of the batch.
        data: packed, drawn anew in every epoch.
        seed: of the order and the selection.

    Attributes:
        tokens: of the steps taken, padding left out.
        selected_tokens: of these, with gradient.
        labels: that entered the loss.
    """

    def __init__(self, model: nn.Module, arm: Arm, sizes: Sizes, data: TokenizedDataset, seed: int) -> None:
        batch = max(1, round(arm.sequences * sizes.batch))
        self.model = model
        config = _config(arm, sizes, batch, seed)
        self.objective = Objective(model, config, torch.device("cpu"))
        self.optimizer = optimizer_factory(config)(model)
        self.loader = Loader(
            data,
            sequence_length=sizes.sequence,
            packing=True,
            global_batch_size=batch,
            micro_batch_size=batch,
            seed=seed,
            pad_token_id=sizes.pad_token_id,
        )
        self.labels = self.selected_tokens = self.tokens = 0

    def step(self, rate: float) -> float:
        """Take a step at this learning rate; its seconds."""
        start = time.perf_counter()
        (batch,) = self.loader.next_window()
        selection = self.objective.select(batch)
        count = max(1, self.objective.denominator(batch, selection))
        self.objective.loss(self.model, batch, selection, count).backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        seconds = time.perf_counter() - start
        self.tokens += batch.tokens
        if selection is None:
            self.selected_tokens += batch.tokens
            self.labels += batch.supervised_tokens
        else:
            self.selected_tokens += selection.selected_tokens
            self.labels += int((batch.supervised & selection.mask(batch.supervised.shape[1])).sum())
        return seconds

    def run(self, steps: int, peak: float, *, kind: str = "cosine", warmup: int | None = None) -> Iterator[int]:
        """Take all steps of a schedule; yields the number of each after it.

        Args:
            steps: to take.
            peak: learning rate.
            kind: `cosine`, down to a hundredth of the peak, or `constant`, whose course does not depend on `steps`.
            warmup: steps of the rise; None for a tenth of all.
        """
        rise = steps // 10 if warmup is None else warmup
        for step in range(1, steps + 1):
            self.step(learning_rate(step, peak=peak, kind=kind, warmup_steps=rise, max_steps=steps, final_ratio=0.01))
            yield step


def _config(arm: Arm, sizes: Sizes, batch: int, seed: int) -> Config:
    """The run that the arm stands for; the model and the data are given apart."""
    sections: dict[str, Any] = {
        "run": {"output_dir": "unused", "seed": seed},
        "model": {"from_config": {"model_type": "llama"}},
        "data": {"train": "unused", "sequence_length": sizes.sequence, "packing": True},
        "selection": {"strategy": arm.strategy, "ratio": arm.ratio, "correction": arm.correction},
        "retention": {"policy": arm.policy, "retain_linears": arm.policy == "selective"},
        "optimizer": {"learning_rate": 1.0},
        "training": {"max_steps": 1, "global_batch_size": batch, "micro_batch_size": batch},
    }
    return Config.model_validate(sections)


def evaluate(model: nn.Module, data: TokenizedDataset, sizes: Sizes) -> float:
    """Mean loss of the labelled tokens, in nats."""
    model.eval()
    total, count = 0.0, 0
    batches = evaluation_batches(
        data, sequence_length=sizes.sequence, micro_batch_size=32, pad_token_id=sizes.pad_token_id
    )
    for batch in batches:
        loss, tokens, _ = evaluation_loss(model, batch.inputs)
        total += float(loss)
        count += tokens
    model.train()
    return total / count


def step_seconds(arms: Sequence[Arm], sizes: Sizes, data: TokenizedDataset, *, rounds: int) -> dict[str, float]:
    """Median seconds of each arm's step; the arms take turns, two further rounds come first and do not count."""
    trainings = [Training(sizes.model(0), arm, sizes, data, seed=0) for arm in arms]
    taken: dict[str, list[float]] = {arm.name: [] for arm in arms}
    for turn in range(rounds + 2):
        for arm, training in zip(arms, trainings, strict=True):
            seconds = training.step(rate=0.0)
            if turn >= 2:
                taken[arm.name].append(seconds)
    return {name: statistics.median(values) for name, values in taken.items()}
