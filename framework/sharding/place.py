"""Where a launcher put this process, and whether a run can take place there. Must not import torch."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from framework.errors import UserError

if TYPE_CHECKING:
    import torch

    from framework.config import Config


@dataclass(frozen=True)
class Place:
    """A process among those of a launch. Both `torchrun` and `deepspeed` say it in environment variables.

    Attributes:
        rank: of this process among all.
        world_size: number of processes.
        local_rank: of this process on its machine, which is the index of its device.
        local_world_size: number of processes on its machine.
        is_launched: a launcher says so.
    """

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0
    local_world_size: int = 1
    is_launched: bool = False

    @classmethod
    def of_environment(cls, environment: Mapping[str, str] = os.environ) -> Place:
        """The place that a launcher gave; that of a single process without one."""
        world_size = int(environment.get("WORLD_SIZE", "1"))
        # torchrun's name, then deepspeed's.
        local_world_size = environment.get("LOCAL_WORLD_SIZE", environment.get("LOCAL_SIZE", world_size))
        return cls(
            rank=int(environment.get("RANK", "0")),
            world_size=world_size,
            local_rank=int(environment.get("LOCAL_RANK", "0")),
            local_world_size=int(local_world_size),
            is_launched="WORLD_SIZE" in environment,
        )

    def device(self) -> torch.device:
        """This process's CUDA device, or the CPU where there is none.

        Raises:
            UserError: there are fewer devices than processes on this machine.
        """
        import torch

        if not torch.cuda.is_available():
            return torch.device("cpu")
        if self.local_rank >= torch.cuda.device_count():
            raise UserError(
                f"the launcher started {self.local_world_size} processes on this machine, which has "
                f"{torch.cuda.device_count()} CUDA devices; start one for each (--num_gpus for deepspeed, "
                "--nproc-per-node for torchrun)"
            )
        return torch.device("cuda", self.local_rank)


def check_ranks(config: Config, ranks: int) -> None:
    """Check that a run can be split over so many ranks; what its config leaves open can be anything.

    Raises:
        UserError: it cannot; all reasons are named.
    """
    sharding, training = config.sharding, config.training
    if sharding.engine == "single" and ranks > 1:
        raise UserError(
            f"sharding.engine: 'single' runs in one process, but the launcher started {ranks} (WORLD_SIZE); set "
            "sharding.engine to 'fsdp' or 'deepspeed', or start one process: --num_gpus 1 for deepspeed, "
            "--nproc-per-node 1 for torchrun"
        )
    problems = []
    if training.global_batch_size % _batch_unit(config, ranks):
        size = training.micro_batch_size
        product = f"ranks = {ranks}" if size == "auto" else f"training.micro_batch_size x ranks = {size} x {ranks}"
        problems.append(
            f"training.global_batch_size: {training.global_batch_size} is no multiple of {product}; the nearest are "
            f"{_nearest_batches(config, ranks)}"
        )
    if ranks % sharding.replicas:
        problems.append(f"sharding.replicas: {sharding.replicas} copies cannot share {ranks} ranks evenly")
    if problems:
        raise UserError("\n".join(problems))


def _batch_unit(config: Config, ranks: int) -> int:
    """Sequences that all ranks together take at a time, at the least."""
    return ranks if config.training.micro_batch_size == "auto" else config.micro_batch_size * ranks


def _nearest_batches(config: Config, ranks: int) -> str:
    unit = _batch_unit(config, ranks)
    below = config.training.global_batch_size // unit * unit
    return " and ".join(str(size) for size in (below, below + unit) if size)
