"""One way to run a job: everything that a plan decides. Must not import torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from framework.config import Config
from framework.linear_names import Retained

Fidelity = Literal["exact", "context detached", "tokens dropped"]

FIDELITIES: tuple[Fidelity, ...] = ("exact", "context detached", "tokens dropped")
"""Classes of what the gradient is, the most faithful first."""

COARSE = {"int4": 0.1}
"""What keys and values in a format cost of the ratio, see `Choice.faithful_ratio`."""


@dataclass(frozen=True)
class Choice:
    """A point of the search; the names are those of the config's keys.

    Attributes:
        engine: `single`, `deepspeed` or `fsdp`.
        zero_stage: 0 to 3 with `deepspeed`; None with the others.
        reshard_after_forward: as with `fsdp`; True with the others.
        replicas: as with `fsdp`; 1 with the others.
        offload_optimizer: the optimiser's state is on the host.
        offload_parameters: weights are on the host between uses.
        policy: `all`, `checkpoint` or `selective`.
        retain_linears: as with `selective`: all, none, or those of these names.
        kv_format: as with `selective`.
        strategy: of the selection.
        ratio: selected tokens / all tokens, as a number; 1 for an exact gradient.
        micro_batch_size: sequences of a forward and backward pass on one rank.
        accumulation: micro-batches of a step on one rank.
        ranks: number of processes.
        placement: of what is retained with `selective`.
    """

    engine: str
    zero_stage: int | None
    reshard_after_forward: bool
    replicas: int
    offload_optimizer: bool
    offload_parameters: bool
    policy: str
    retain_linears: Retained
    kv_format: str
    strategy: str
    ratio: float
    micro_batch_size: int
    accumulation: int
    ranks: int
    placement: str = "device"

    @property
    def shard_ranks(self) -> int:
        """Number of ranks that share one copy of the model."""
        return self.ranks // self.replicas

    @property
    def shards_weights(self) -> bool:
        """Whether no rank holds the whole model."""
        return self.engine == "fsdp" or self.zero_stage == 3

    @property
    def faithful_ratio(self) -> float:
        """The ratio, less what coarse keys and values take from it.

        int4 changes the gradient by .06 to .08 (int8: .003 to .005); leaving tokens out biases it by .3 at half of them
        and .6 at a tenth. As much as two more hundredths of the tokens make up for that, near all of them a tenth. Rows
        that are replayed are not rounded: with a ratio of 1 that is all of them.
        """
        return self.ratio - (COARSE.get(self.kv_format, 0.0) if self.ratio < 1.0 else 0.0)

    def fidelity(self, labelled_share: float) -> Fidelity:
        """What the gradient is.

        Args:
            labelled_share: labelled tokens / all tokens of the data.
        """
        if self.strategy == "none" or self.ratio >= 1.0:
            return "exact"
        if self.strategy == "supervised" and self.ratio >= labelled_share:
            return "context detached"
        return "tokens dropped"

    @classmethod
    def of(cls, config: Config, ranks: int, labelled_share: float) -> Choice:
        """What a config without open ends chooses.

        Args:
            config: of the run.
            ranks: number of processes.
            labelled_share: labelled tokens / all tokens of the data.
        """
        sharding, retention, ratio = config.sharding, config.retention, config.resolved_ratio
        return cls(
            engine=sharding.engine,
            zero_stage=config.zero_stage if sharding.engine == "deepspeed" else None,
            reshard_after_forward=sharding.reshard_after_forward,
            replicas=sharding.replicas,
            offload_optimizer=sharding.offload_optimizer,
            offload_parameters=sharding.offload_parameters,
            policy=retention.policy,
            retain_linears=config.retained_linears,
            kv_format=retention.kv_format,
            strategy=config.selection.strategy,
            ratio=labelled_share if ratio == "labelled" else ratio,
            micro_batch_size=config.micro_batch_size,
            accumulation=config.gradient_accumulation(ranks),
            ranks=ranks,
            placement=retention.placement,
        )


def labels_in_loss(choice: Choice, labelled_share: float) -> float:
    """Tokens that are labelled and selected / all tokens.

    Args:
        choice: says what is selected.
        labelled_share: labelled tokens / all tokens of the data; they are taken to be the last of their document.
    """
    if choice.strategy in ("none", "supervised"):
        return labelled_share
    return min(labelled_share, choice.ratio) if choice.strategy == "suffix" else labelled_share * choice.ratio
