"""What ranks exchange, and what goes between host and device, in seconds. Must not import torch.

Volumes are those of rings (Patarasuk and Yuan 2009, "Bandwidth optimal all-reduce algorithms for clusters of
workstations"): of S bytes a rank among n sends (n - 1) / n S in an all-gather or a reduce-scatter, twice as much in an
all-reduce. ZeRO's are those of arXiv 1910.02054, section 7, with three differences of what is installed:

- DeepSpeed 0.19's stages 1 and 2 all-reduce a bucket of gradients and keep their part (`average_tensor` with its
  default `use_multi_rank_bucket_allreduce`), so that they send twice what the paper says.
- They reduce after every micro-batch, but for stage 1 in float32 or bfloat16 without a master (`FlatPartitions`).
- A block that is recomputed is gathered once for that and its backward pass: FSDP2's pre-backward hook does it, and
  stage 3's prefetching keeps what its trace needs again (`PartitionedParameterCoordinator.__params_to_release`).

Buckets are taken to hold a block each (`bucket_sizes`), so that there are as many exchanges as blocks, one for the
embedding and one for the head.
"""

from __future__ import annotations

from framework.planner.choice import Choice
from framework.planner.rates import Rates
from framework.planner.work import Job
from framework.sharding.precision import PRECISIONS


class Transfers:
    """Seconds of one rank's exchanges and host copies, by what they can go on beside.

    Args:
        job: what is trained.
        compute_bytes: of an element of the weights in a pass.
        choice: how it is run.
        rates: of the hardware.

    Attributes:
        forward, backward: exchanges behind these passes of a micro-batch.
        forward_copies, backward_copies: host copies behind these.
        after_backward, copies_after_backward: once a micro-batch, waited for.
        once, copies_once: once a step, waited for.
        gather_traffic, backward_traffic: bytes of the device's memory in a micro-batch's passes: what is gathered is
            read and written once more, for weights lie elsewhere than buffers, and so is what is reduced.
    """

    def __init__(self, job: Job, compute_bytes: int, choice: Choice, rates: Rates) -> None:
        self.forward = self.backward = self.after_backward = self.once = 0.0
        self.forward_copies = self.backward_copies = self.copies_after_backward = self.copies_once = 0.0
        self.gather_traffic = self.backward_traffic = 0.0
        self._job, self._choice, self._rates = job, choice, rates
        self._width, self._weight_bytes = compute_bytes, PRECISIONS[job.precision].weight_bytes
        self._shards = holders(choice)
        # Of one exchange of the whole model.
        self._latency = (len(job.products.blocks) + 2) * rates.latency_seconds
        self._ring = self._ring_of_shards()
        if choice.shards_weights:
            self._gather()
        if choice.engine == "fsdp":
            self._reduce_in_fsdp()
        elif choice.engine == "deepspeed":
            self._reduce_in_deepspeed()
        if choice.ranks > 1:
            # The loss and the norm, which every engine sums up and waits for.
            self.once += rates.latency_seconds
        if choice.offload_optimizer:
            self._offload()

    def _ring_of_shards(self) -> float:
        """Seconds per byte of an all-gather or reduce-scatter over the ranks that share a copy of the model."""
        ranks, per_node = self._choice.shard_ranks, self._rates.ranks_per_node
        if ranks <= per_node:
            # Copies that do not divide a node lie across two.
            neighbours = ranks if self._choice.ranks <= per_node or per_node % ranks == 0 else max(1, ranks // 2)
        else:
            neighbours = per_node
        return _ring(ranks, neighbours, self._choice, self._rates)

    def _gather(self) -> None:
        """Sharded weights, before each use. Embedding and head stay from the forward pass to the backward pass."""
        job, choice, rates = self._job, self._choice, self._rates
        blocks = (job.parameters - job.outside - job.quantized) * self._width + job.quantized_bytes
        everything = blocks + job.outside * self._width
        again = blocks if choice.reshard_after_forward else 0
        if self._shards > 1:
            self.forward = everything * self._ring + self._latency
            self.backward = again * self._ring + (self._latency if again else 0.0)
            self.gather_traffic, self.backward_traffic = 2 * everything, 2 * again
        if choice.offload_parameters:
            # FSDP2 casts on the device what it held in the optimiser's precision.
            factor = self._weight_bytes / self._width if choice.engine == "fsdp" else 1
            per_byte = factor / self._shards / rates.link_bytes
            self.forward_copies, self.backward_copies = everything * per_byte, again * per_byte

    def _reduce_in_fsdp(self) -> None:
        """Gradients in float32 after every micro-batch: over the shards, then over the copies of the model."""
        job, choice, rates = self._job, self._choice, self._rates
        if self._shards > 1:
            self.backward += 4 * job.trainable * self._ring + self._latency
            self.backward_traffic += (self._width + 4) * job.trainable
        if choice.replicas > 1:
            neighbours = choice.replicas
            if choice.ranks > rates.ranks_per_node:
                neighbours = max(1, rates.ranks_per_node // self._shards)
            ring = _ring(choice.replicas, neighbours, choice, rates)
            self.backward += 2 * 4 * job.trainable / self._shards * ring + self._latency

    def _reduce_in_deepspeed(self) -> None:
        job, choice = self._job, self._choice
        if choice.ranks == 1:
            return
        copied = 2 * self._width * job.trainable
        if choice.zero_stage == 0:
            # In float32 whatever the precision: `communication_data_type` without 16-bit training of its own.
            self.once += 2 * 4 * job.trainable * self._ring + self._latency
            return
        if choice.zero_stage == 3:
            self.backward += self._width * job.trainable * self._ring + self._latency
            self.backward_traffic += copied
            return
        reduced = 2 * self._width * job.trainable * self._ring + self._latency
        if choice.zero_stage == 2:
            self.backward += reduced
            self.backward_traffic += copied
        elif reduces_once(choice, job.precision):
            self.once += reduced
        else:
            self.after_backward += reduced
        self.once += self._width * job.trainable * self._ring + self._latency

    def _offload(self) -> None:
        """Gradients to the host after every micro-batch, in the optimiser's precision; weights back once a step."""
        job, choice, rates = self._job, self._choice, self._rates
        held = job.trainable / self._shards
        gradients = self._weight_bytes * held / rates.link_bytes
        if choice.zero_stage == 1:
            self.copies_after_backward += gradients
        else:
            # Stage 3 fetches what it adds to and brings it back.
            self.backward_copies += gradients * (2 if choice.zero_stage == 3 else 1)
        if not choice.offload_parameters:
            self.copies_once += self._width * held / rates.link_bytes


def holders(choice: Choice) -> int:
    """Number of ranks that share the optimiser's state."""
    if choice.engine == "fsdp":
        return choice.shard_ranks
    return choice.ranks if choice.zero_stage else 1


def reduces_once(choice: Choice, precision: str) -> bool:
    """Whether gradients are summed up whole over micro-batches, and exchanged once a step if at all.

    Args:
        choice: how a job is run.
        precision: the config's `optimizer.precision`.
    """
    if choice.zero_stage == 1:
        return precision in ("fp32", "pure_bf16") and not choice.offload_optimizer
    return choice.engine == "single" or choice.zero_stage == 0


def _ring(ranks: int, neighbours: int, choice: Choice, rates: Rates) -> float:
    """Seconds per byte of an all-gather or reduce-scatter.

    Args:
        ranks: that take part.
        neighbours: of these on one node. The node's other ranks do the same at the same time, and share the network.
        choice: says how many ranks there are.
        rates: of the hardware.
    """
    rate = rates.node_bytes
    if ranks > neighbours:
        rate = min(rate, rates.network_bytes * neighbours / min(choice.ranks, rates.ranks_per_node))
    return (ranks - 1) / ranks / rate
