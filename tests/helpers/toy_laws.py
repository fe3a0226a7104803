"""Laws of memory and time of a job of 64 sequences of 1024 tokens, simple enough to be checked by hand."""

from __future__ import annotations

from framework.linear_names import retains
from framework.planner.choice import Choice
from framework.planner.ledger import Ledger, during, everywhere
from framework.planner.search import Laws

MiB = 1 << 20

PARAMETERS = 1_000 * MiB
"""Elements of the model."""

FLOPS = 64.0
"""Of a forward pass over the whole batch, in seconds of one rank."""

LINEARS = {"wide": (16, 0.5), "middle": (32, 0.3), "narrow": (48, 0.2)}
"""What linear layers take in a sequence at a ratio of 1, in MiB, and their part of a forward pass."""


def retained(choice: Choice) -> list[tuple[int, float]]:
    """Of `LINEARS`, those whose outputs a choice retains."""
    return [costs for name, costs in LINEARS.items() if retains(choice.retain_linears, name)]


def memory(choice: Choice) -> Ledger:
    """States by what is sharded, activations by policy and ratio, and logits of the selected tokens."""
    shards = choice.shard_ranks
    stage = {"single": 0, "fsdp": 3}.get(choice.engine, choice.zero_stage or 0)
    weights = 2 * PARAMETERS // (shards if stage == 3 else 1)
    gradients = 2 * PARAMETERS // (shards if stage >= 2 else 1)
    optimizer = 8 * PARAMETERS // (shards if stage >= 1 else 1)
    host = optimizer if choice.offload_optimizer else 0
    tokens = choice.micro_batch_size * 1024
    full, linears = 512 * MiB, (32 + sum(size for size, _ in retained(choice))) * MiB
    if choice.policy == "all":
        kept = full * choice.micro_batch_size
    elif choice.policy == "checkpoint":
        kept = (32 * choice.micro_batch_size + 64) * MiB
    else:
        keys = {"model": 16, "int8": 8, "int4": 4}[choice.kv_format] * MiB
        kept = round(choice.micro_batch_size * (keys + linears * choice.ratio))
    if choice.placement == "host":
        # But for two of sixteen blocks.
        host, kept = host + kept, kept // 8
    gathered = 0 if choice.engine == "single" or stage < 3 else 2 * PARAMETERS // 16
    unsharded = 2 * PARAMETERS if choice.engine == "fsdp" and not choice.reshard_after_forward else 0
    return Ledger(
        (
            everywhere("weights", weights),
            everywhere("optimizer state", optimizer - host),
            during("gradients", gradients, {"block backward", "optimizer step"}),
            during("gathered weights", gathered + unsharded, {"forward", "block backward"}),
            during("saved activations", kept, {"forward", "loss", "block backward"}),
            during("logits", round(12 * 32_000 * tokens * choice.ratio), {"loss"}),
            during("optimizer temporaries", 4 * PARAMETERS // shards, {"optimizer step"}),
        ),
        host_bytes=host,
    )


def seconds(choice: Choice) -> float:
    """One forward pass, and twice that for the backward pass over selected tokens, and exchanges."""
    forward = FLOPS / choice.ranks
    backward = 2 * forward * (choice.ratio if choice.policy == "selective" else 1.0)
    again = {"all": 0.0, "checkpoint": forward}.get(
        choice.policy, forward * choice.ratio * (1 - sum(share for _, share in retained(choice)))
    )
    quantising = 0.0 if choice.kv_format == "model" else 0.02 * forward
    launches = 0.05 * choice.accumulation
    exchanged = 1.0 if choice.ranks > 1 else 0.0
    if choice.shards_weights:
        gathers = 2 if choice.reshard_after_forward else 1
        exchanged *= 1 + 0.5 * gathers * choice.accumulation * (0.5 if choice.replicas > 1 else 1)
    host = (3.0 if choice.offload_optimizer else 0.0) + (4.0 if choice.offload_parameters else 0.0)
    return forward + backward + again + quantising + launches + exchanged + host


TOY = Laws(memory, seconds, linears=tuple(LINEARS))
