"""What a plan was made for, and so where it holds. Must not import torch."""

from __future__ import annotations

from dataclasses import dataclass

from framework.planner.hardware import Cluster


@dataclass(frozen=True)
class MadeFor:
    """What the plan of a launch was made for.

    Attributes:
        ranks: processes.
        nodes: machines.
        device: name of the accelerators.
        budget_bytes: that the allocator may take on each.
    """

    ranks: int
    nodes: int
    device: str
    budget_bytes: int

    @classmethod
    def of(cls, cluster: Cluster) -> MadeFor:
        """What a plan for a cluster is made for."""
        return cls(cluster.ranks, cluster.nodes, cluster.device.name, cluster.budget_bytes)

    def differences(self, other: MadeFor) -> list[str]:
        """What is another one in `other`, in words: `2 ranks -> 4 ranks`."""
        pairs = zip(self._words(), other._words(), strict=True)
        return [f"{own} -> {others}" for own, others in pairs if own != others]

    def _words(self) -> tuple[str, ...]:
        return f"{self.ranks} ranks", f"{self.nodes} machines", self.device, f"{self.budget_bytes:,} bytes"
