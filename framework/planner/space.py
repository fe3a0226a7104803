"""Every way to run a job that its config permits. Must not import torch."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import product
from typing import Any

from framework.config import Config
from framework.errors import UserError
from framework.linear_names import Retained
from framework.planner.choice import Choice
from framework.planner.overrides import OFFLOAD, is_open, overrides, with_overrides

ENGINES = ("single", "fsdp", "deepspeed")
"""The simplest first: one process, what PyTorch brings along, a package of its own."""

POLICIES = ("all", "checkpoint", "selective")

KV_FORMATS = ("model", "int8")
"""Those that are chosen among. "int4" changes the gradient twenty times as much as "int8", and "recompute" computes
more than it saves where heads share keys: both are for configs that name them."""

OFFLOADS = ((False, False), (True, True))
"""What is on the host with FSDP2 where that is open: optimiser and weights."""

OFFLOADS_OF_STAGE = (
    ((False, False),),
    ((False, False), (True, False)),
    ((False, False), (True, False)),
    ((False, False), (True, False), (True, True)),
)
"""The same with each ZeRO stage."""

PLACEMENTS = ("device", "host")
"""Where retained tensors are, where that is open."""

SMALLEST_RATIO = 1e-3
"""Below it a free ratio is not sought: a sequence of a few thousand tokens would select a handful."""


@dataclass(frozen=True)
class Candidate:
    """Choices that differ in nothing but the ratio.

    Attributes:
        choice: with the largest ratio.
        lowest: the smallest ratio; the same where the ratio is fixed.
    """

    choice: Choice
    lowest: float

    def at(self, ratio: float) -> Choice:
        """The choice with a ratio."""
        return self.choice if ratio == self.choice.ratio else replace(self.choice, ratio=ratio)


def candidates(
    config: Config, *, ranks: int, nodes: int, labelled_share: float, linears: Sequence[str] = ()
) -> list[Candidate]:
    """All candidates of a config: what it gives is fixed, what is open (see `is_open`) takes every value.

    A free ratio goes from `SMALLEST_RATIO`, or with the strategy `supervised`, which
    selects every labelled token whatever the ratio, from the labelled share, to 1, which is exact. What the config's
    rules refuse is left out.

    Args:
        config: of the run.
        ranks: number of processes.
        nodes: number of machines that they are on.
        labelled_share: labelled tokens / all tokens of the data.
        linears: names of linear layers; where that is open, the first ones up to any of them may be retained.

    Returns:
        The candidates, the simplest first: by engine as in `ENGINES`, by ZeRO stage, by what is on the host, by policy
        as in `POLICIES`, by micro-batch, the largest first.

    Raises:
        UserError: there is none; says why.
    """
    splits = _batch_splits(config, ranks)
    found: list[Candidate] = []
    retentions = _retentions(config, labelled_share, linears)
    for sharding, (lowest, retention) in product(_shardings(config, ranks, nodes), retentions):
        alike = [
            Candidate(
                Choice(
                    **sharding,
                    **retention,
                    strategy=config.selection.strategy,
                    micro_batch_size=micro_batch_size,
                    accumulation=accumulation,
                    ranks=ranks,
                ),
                lowest,
            )
            for micro_batch_size, accumulation in splits
        ]
        # One stands for all: rules ask of a micro-batch only that it divides the batch, and a ratio of 1 breaks none
        # that a lower one keeps.
        values = overrides(config, alike[0].at(lowest), labelled_share)
        if with_overrides(config, values) is not None:
            found += alike
    if not found:
        raise UserError(
            f'sharding.engine: nothing that the config permits runs on {ranks} ranks: set sharding.engine to "auto"'
        )
    return found


def _batch_splits(config: Config, ranks: int) -> list[tuple[int, int]]:
    """Micro-batch and accumulation on each rank, the largest micro-batch first."""
    per_rank, rest = divmod(config.training.global_batch_size, ranks)
    if not rest:
        sizes = [size for size in range(per_rank, 0, -1) if per_rank % size == 0]
        if not is_open(config, "training.micro_batch_size"):
            sizes = [size for size in sizes if size == config.micro_batch_size]
        if sizes:
            return [(size, per_rank // size) for size in sizes]
    unit = ranks if is_open(config, "training.micro_batch_size") else ranks * config.micro_batch_size
    raise UserError(
        f"training.global_batch_size: {config.training.global_batch_size} is no multiple of {unit}, which is the "
        f"number of ranks{'' if unit == ranks else ' times training.micro_batch_size'}"
    )


def _shardings(config: Config, ranks: int, nodes: int) -> Iterator[dict[str, Any]]:
    """Fields of a choice that say who holds what; the rules have not seen them."""
    given = config.sharding
    fixed = given.offload_optimizer, given.offload_parameters
    free = is_open(config, "sharding.offload_optimizer")
    whole = {"zero_stage": None, "reshard_after_forward": True, "replicas": 1}
    for engine in ENGINES if given.engine == "auto" else (given.engine,):
        if engine == "single":
            if ranks == 1:
                yield {"engine": engine} | _offload(fixed) | whole
        elif engine == "deepspeed":
            stages = range(4) if is_open(config, "sharding.zero_stage") else [_stage(config)]
            for stage in stages:
                for offload in OFFLOADS_OF_STAGE[stage] if free else (fixed,):
                    yield {"engine": engine} | _offload(offload) | whole | {"zero_stage": stage}
        else:
            reshard = (True, False) if is_open(config, "sharding.reshard_after_forward") else ()
            replicas = (1, nodes) if is_open(config, "sharding.replicas") else ()
            for reshards, copies in product(
                reshard or (given.reshard_after_forward,), dict.fromkeys(replicas or (given.replicas,))
            ):
                if ranks % copies == 0:
                    fsdp = {"zero_stage": None, "reshard_after_forward": reshards, "replicas": copies}
                    # Weights that are kept on the device between passes need not be on the host.
                    for offload in OFFLOADS if free and reshards else (fixed,):
                        yield {"engine": engine} | _offload(offload) | fsdp


def _offload(optimizer_and_parameters: tuple[bool, bool]) -> dict[str, Any]:
    return dict(zip(OFFLOAD, optimizer_and_parameters, strict=True))


def _stage(config: Config) -> int:
    stage = config.sharding.zero_stage
    return stage if isinstance(stage, int) else 3


def _retentions(config: Config, labelled_share: float, names: Sequence[str]) -> Iterator[tuple[float, dict[str, Any]]]:
    """The lowest ratio, and fields of a choice that say what is kept for which rows; the rules have not seen them."""
    given = config.retention
    for policy in POLICIES if given.policy == "auto" else (given.policy,):
        selective = policy == "selective"
        linears = _linears(config, names if selective else None)
        formats = KV_FORMATS if selective and is_open(config, "retention.kv_format") else ()
        lowest, highest = _ratios(config, policy, labelled_share)
        placements: tuple[str, ...] = (given.placement,)
        if is_open(config, "retention.placement"):
            placements = PLACEMENTS if selective else PLACEMENTS[:1]
        # An open format has its default in the config.
        for retain, kv_format, placement in product(linears, formats or (given.kv_format,), placements):
            kept = {"retain_linears": retain, "kv_format": kv_format, "placement": placement}
            yield lowest, {"policy": policy, **kept, "ratio": highest}


def _linears(config: Config, names: Sequence[str] | None) -> Sequence[Retained]:
    """Of which linear layers outputs can be retained, the fewest first; names are None where of none."""
    if not is_open(config, "retention.retain_linears"):
        return [config.retained_linears]
    if names is None:
        return [False]
    return [False, *(tuple(names[:count]) for count in range(1, len(names))), True]


def _ratios(config: Config, policy: str, labelled_share: float) -> tuple[float, float]:
    """The lowest and the highest ratio."""
    supervised = config.selection.strategy == "supervised"
    if not is_open(config, "selection.ratio"):
        ratio = config.resolved_ratio
        fixed = labelled_share if isinstance(ratio, str) else max(ratio, labelled_share if supervised else 0.0)
        return fixed, fixed
    if policy != "selective":
        return 1.0, 1.0
    return labelled_share if supervised else SMALLEST_RATIO, 1.0
