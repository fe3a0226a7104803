"""Who holds what."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from framework.config.sections.base import Auto, Count, Section


class ShardingConfig(Section):
    """Who holds what."""

    engine: Literal["single", "deepspeed", "fsdp"] | Auto = "single"
    """`single`: one process holds everything. `deepspeed`: ZeRO. `fsdp`: PyTorch's FSDP2. "auto": the planner chooses,
    and with it whichever of the three keys below is not given, and offloading if neither of its keys is."""

    zero_stage: Annotated[int, Field(ge=0, le=3)] | Auto | None = None
    """With `deepspeed`: what the ranks hold a part of each: nothing (0), the optimiser's state (1), gradients too (2),
    weights too (3). "auto": the planner chooses. Null: 3."""

    reshard_after_forward: bool = True
    """With `fsdp`: free a block's gathered weights after its forward pass and gather them again for its backward pass,
    as ZeRO stage 3 does. False keeps them until then: one gathering less, as many bytes more as the weights have."""

    replicas: Count = 1
    """With `fsdp`: number of copies of the model (hybrid sharding). Each is sharded over neighbouring ranks, and the
    copies exchange gradients only: with the number of machines, weights never cross the network. 1: one copy over all
    ranks."""

    offload_optimizer: bool = False
    """Keep the optimiser's state in the host's memory and update there. `fsdp` does it together with
    `offload_parameters`."""

    offload_parameters: bool = False
    """Keep sharded weights in the host's memory between uses. With `deepspeed` it needs `zero_stage` 3."""

    timeout_seconds: Count = 600
    """How long a rank waits for the others in one exchange before it gives up with an error."""

    @property
    def offloads(self) -> bool:
        """Whether anything is in the host's memory."""
        return self.offload_optimizer or self.offload_parameters
