"""The model of what an engine holds for each choice."""

from __future__ import annotations

from collections.abc import Sequence
from math import ceil
from typing import Any

from framework.config import Config
from framework.planner.choice import Choice
from framework.planner.course import Holder, Place
from framework.planner.held import Weights
from framework.planner.zero import STATE, WEIGHTS, Buckets, Bytes, FlatPartitions, Offload, WholeGradients
from framework.planner.zero3 import PartitionedWeights
from framework.training.eight_bit import BLOCK, MINIMUM_SIZE
from framework.training.optimizer import CHUNK

STOCHASTIC_BYTES = 30
"""Of the temporaries of `StochasticAdamW`, for each element of a chunk: seven float32 tensors and a bfloat16 one."""

COUNTER = 4
"""Bytes of the number of steps that each tensor has."""


class Holders:
    """Of a run whose weights are known.

    Args:
        config: of the run; its precision and optimiser count.
        weights: of its model.
        buckets: of DeepSpeed's `zero_optimization` the sizes of its buffers, from `bucket_sizes`, and what a user's own
            options have beside.
        one_by_one: DeepSpeed gathers weights one by one and none ahead, as it does on CPUs.
    """

    def __init__(self, config: Config, weights: Weights, buckets: dict[str, Any], *, one_by_one: bool) -> None:
        self._precision, self._optimizer = config.optimizer.precision, config.optimizer.name
        self._weights, self._sizes, self._one_by_one = weights, buckets, one_by_one

    def of(self, choice: Choice, trace: Sequence[Place], rank: int | None = None) -> Holder | None:
        """The holder of a choice, as it is between steps; None for one whose law has no marks.

        Args:
            choice: of which engine, stage and ranks count.
            trace: the modules of a micro-batch, from `trace_of`.
            rank: that holds; None for one that holds most.
        """
        if choice.engine == "fsdp":
            return None
        stage = choice.zero_stage if choice.engine == "deepspeed" else None
        if not stage:
            bucket = None if stage is None else self._sizes["reduce_bucket_size"]
            return WholeGradients(self._weights, self.state, self.update, bucket)
        given = self._weights, self._bytes(), self.state, self.update, self._buckets(stage)
        ranks, offload = choice.shard_ranks, Offload(choice.offload_optimizer, choice.offload_parameters)
        if stage < 3:
            return FlatPartitions(*given, stage=stage, ranks=ranks, rank=rank, offload=offload)
        return PartitionedWeights(*given, ranks=ranks, trace=trace, offload=offload)

    def state(self, elements: int, itemsize: int) -> int:
        """Bytes of what the optimiser keeps for a tensor of so many elements of so many bytes."""
        return self._moments(elements, itemsize) + COUNTER

    def sharded(self, choice: Choice) -> tuple[dict[str, int], int]:
        """What each rank holds under FSDP2, where every weight and its state is shared out, and bytes on the host."""
        shards, all_weights = choice.shard_ranks, self._weights.all
        weights = sum(weight.shard(shards) * weight.itemsize for weight in all_weights)
        trained = [(weight.shard(shards), weight.itemsize) for weight in all_weights if weight.trained]
        state = sum(self.state(elements, size) for elements, size in trained)
        if choice.offload_parameters:
            gradients = sum(elements * size for elements, size in trained)
            return {WEIGHTS: self._weights.buffers}, weights + gradients + state
        return {WEIGHTS: weights + self._weights.buffers, STATE: state}, 0

    def _moments(self, elements: int, itemsize: int) -> int:
        """Two moments of what a rank has of a tensor: in 8 bits with a scale for each block, or as wide as weights."""
        if self._optimizer == "adamw_8bit" and elements >= MINIMUM_SIZE:
            return 2 * (elements + 4 * ceil(elements / BLOCK))
        wide = 4 if self._optimizer == "adamw_8bit" or self._precision != "pure_bf16" else itemsize
        return 2 * wide * elements

    def update(self, elements: int) -> int:
        """Bytes that the optimiser needs beside a tensor of so many elements while it updates it."""
        if self._optimizer == "adamw" and self._precision == "pure_bf16":
            return STOCHASTIC_BYTES * min(elements, CHUNK)
        return 0

    def largest_update(self, shards: int) -> int:
        """The same for the largest of the trained weights, of which each rank updates a part."""
        largest = max((weight.elements for weight in self._weights.all if weight.trained), default=0)
        return self.update(ceil(largest / shards))

    def _bytes(self) -> Bytes:
        pure = self._precision == "pure_bf16"
        held = 4 if self._precision == "fp32" else 2
        master = 2 if pure else 4
        return Bytes(weight=held, summed=master, master=master)

    def _buckets(self, stage: int) -> Buckets:
        sizes: dict[str, Any] = self._sizes
        return Buckets(
            reduce=sizes["reduce_bucket_size"],
            overlap=sizes.get("overlap_comm", stage >= 2),
            prefetch=sizes["stage3_prefetch_bucket_size"],
            persistence=sizes["stage3_param_persistence_threshold"],
            max_live=sizes["stage3_max_live_parameters"],
            max_reuse=sizes["stage3_max_reuse_distance"],
            sub_group=sizes["sub_group_size"],
            one_by_one=self._one_by_one,
        )
