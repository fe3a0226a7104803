"""The ledger: what holds memory, and when. Must not import torch."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

PHASES = ("forward", "loss", "block backward", "optimizer step", "load", "save")
"""Moments at which memory can peak, in the order in which a run meets them, but for loading, which comes first."""


WORKSPACES = "cuBLAS workspaces"
"""Name of the term for what is allocated, but no tensor."""


@dataclass(frozen=True)
class Term:
    """Something that holds memory on one rank.

    Attributes:
        name: for people, such as "optimizer state".
        bytes: that it holds.
        phases: those of `PHASES` at whose peak it is alive.
    """

    name: str
    bytes: int
    phases: frozenset[str]


@dataclass(frozen=True)
class Ledger:
    """Terms of the device's memory on the rank with most, and what the host holds for one rank.

    Attributes:
        terms: in the order in which a report lists them.
        host_bytes: of offloaded states, and of what is retained there.
    """

    terms: tuple[Term, ...]
    host_bytes: int = 0

    def total(self, phase: str) -> int:
        """Bytes of a phase's peak."""
        return sum(term.bytes for term in self.terms if phase in term.phases)

    @property
    def binding_phase(self) -> str:
        """The phase with the highest peak."""
        return max(PHASES, key=self.total)

    @property
    def peak(self) -> int:
        """Bytes of the highest peak: what the allocator counts as allocated."""
        return self.total(self.binding_phase)

    @property
    def tensors(self) -> int:
        """Bytes of tensors at the highest peak: what a simulation sees."""
        return self.peak - sum(term.bytes for term in self.terms if term.name == WORKSPACES)

    def with_workspaces(self, size: int) -> Ledger:
        """The ledger of a process in which cuBLAS has so many bytes."""
        return replace(self, terms=(*self.terms, everywhere(WORKSPACES, size))) if size else self

    def largest(self, phase: str, count: int) -> list[Term]:
        """The largest terms of a phase, the largest first."""
        alive = [term for term in self.terms if phase in term.phases and term.bytes]
        return sorted(alive, key=lambda term: term.bytes, reverse=True)[:count]

    def to_json(self) -> list[dict[str, Any]]:
        """As in a plan's JSON: `name`, `bytes`, `phases`."""
        listed = [term for term in self.terms if term.bytes]
        return [{"name": t.name, "bytes": t.bytes, "phases": [p for p in PHASES if p in t.phases]} for t in listed]


def everywhere(name: str, size: float) -> Term:
    """A term that is alive in all phases of a step and while saving."""
    return Term(name, round(size), frozenset(PHASES) - {"load"})


def during(name: str, size: float, phases: Iterable[str]) -> Term:
    """A term that is alive in some phases."""
    return Term(name, round(size), frozenset(phases))
