"""What the planner has found, for people. Must not import torch."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass

from rich.console import Console
from rich.table import Table
from rich.text import Text

from framework.planner.changes import Change, MoreRanks
from framework.planner.choice import Choice
from framework.planner.ledger import Ledger
from framework.planner.plan import Plan, as_set
from framework.planner.search import Budget, Found

GIB = 1 << 30
NAMED_TERMS = 4
LISTED_CHANGES = 8


@dataclass(frozen=True)
class Report:
    """What a report says.

    Attributes:
        found: by the search.
        plans: of its points, the chosen one first.
        budget: of a rank.
        ranks: number of processes.
        nodes: number of machines.
        labelled_share: labelled tokens / all tokens of the data.
        launch: the command that runs the chosen plan.
        smallest: ledger of the plan that takes least, where nothing fits.
        changes: that would make the job fit, where nothing fits.
        more_ranks: the fewest on which it would; None if it does on none that were tried.
    """

    found: Found
    plans: Sequence[Plan]
    budget: Budget
    ranks: int
    nodes: int
    labelled_share: float
    launch: str | None = None
    smallest: Ledger | None = None
    changes: Sequence[Change] = ()
    more_ranks: MoreRanks | None = None

    def print(self, console: Console) -> None:
        """Print the report; tables take the console's width."""
        console.print(Text(self.headline()), highlight=False)
        if self.plans:
            console.print()
            console.print(self._table())
            console.print()
            for title, text in self._chosen():
                _paragraph(console, title, text)
        else:
            console.print()
            for title, text in self._why_not():
                _paragraph(console, title, text)
            if self.changes:
                console.print(Text("\nIt would fit with one of:", style="bold"))
                console.print(self._changes())
            if self.more_ranks is not None:
                more = self.more_ranks
                where = f"{more.ranks} GPUs" + (f" on {more.nodes} machines" if more.nodes > 1 else "")
                console.print()
                text = f"{where}, with {words(more.point.choice)}: {more.point.seconds:.3g} s a step"
                _paragraph(console, "fewest GPUs", text)
        missed = self.found.missed
        if missed is not None:
            over = self.budget.demand(missed.ledger) - self.budget.bytes
            _paragraph(
                console,
                "just missed",
                f"{words(missed.choice)}, ratio {missed.choice.ratio:.4g}: {missed.seconds:.3g} s a step, "
                f"{gib(over)} over the budget",
            )
        if self.plans and self.launch is not None:
            # Not wrapped, so that it can be copied.
            console.print(Text("\nlaunch", style="bold"))
            console.print(Text(self.launch), soft_wrap=True)

    def headline(self) -> str:
        """One line: for what was planned."""
        where = f"{self.ranks} GPU{'s' if self.ranks > 1 else ''}"
        if self.nodes > 1:
            where += f" on {self.nodes} machines"
        objective = self.found.objective
        if objective == "balanced":
            objective += f", at most {self.found.max_slowdown:g} x the fastest"
        return f"{where}, {gib(self.budget.bytes)} each; {objective}"

    def _table(self) -> Table:
        table = Table(box=None, padding=(0, 2, 0, 0), header_style="bold")
        table.add_column("")
        table.add_column("engine")
        table.add_column("retention")
        for name in ("ratio", "batch", "peak\nGiB", "step\ns", "tokens/s"):
            table.add_column(name, justify="right", no_wrap=True, vertical="top")
        for number, plan in enumerate(self.plans, start=1):
            choice, point = plan.point.choice, plan.point
            rate = plan.tokens_per_second
            table.add_row(
                str(number),
                sharding_words(choice),
                retention_words(choice),
                "exact" if plan.fidelity == "exact" else f"{choice.ratio:.4f}",
                f"{choice.micro_batch_size} x {choice.accumulation}",
                f"{point.ledger.peak / GIB:.1f}",
                f"{point.seconds:.3g}",
                "" if rate is None else f"{rate:,.0f}",
                style="bold green" if number == 1 else "",
            )
        return table

    def _chosen(self) -> list[tuple[str, str]]:
        plan = self.plans[0]
        ledger, slowdown = plan.point.ledger, self.found.slowdown(plan.point)
        speed = f"{slowdown:.2f} x the step time of the fastest permitted plan with unlimited memory"
        if not self.found.within_bound:
            speed += f"; nothing that fits is within {self.found.max_slowdown:g} x, so this is the fastest that does"
        reserved = "" if plan.reserved_bytes is None else f", {gib(plan.reserved_bytes)} reserved"
        host = f", {gib(ledger.host_bytes)} of the host" if ledger.host_bytes else ""
        lines = [
            ("chosen", f"{fidelity_words(plan, self.labelled_share)}; {speed}"),
            *(("warning", text) for text in plan.warnings),
            ("memory", f"{gib(ledger.peak)} allocated of {gib(self.budget.bytes)}{reserved}{host}"),
            ("peak in", f"{ledger.binding_phase}: {largest_words(ledger)}"),
        ]
        lines.append(("options", json.dumps(plan.engine_options)))
        return lines

    def _why_not(self) -> list[tuple[str, str]]:
        if self.smallest is None:
            return [("nothing fits", "no plan that the config permits stays within the budget")]
        demand, phase = self.budget.demand(self.smallest), self.smallest.binding_phase
        host, most = self.smallest.host_bytes, self.budget.host_bytes
        on_host = f", and {gib(host)} of the host, of which {gib(most)} are its" if most is not None and host else ""
        return [
            ("nothing fits", f"the smallest permitted plan takes {gib(demand)}{on_host}"),
            ("peak in", f"{phase}: {largest_words(self.smallest)}"),
        ]

    def _changes(self) -> Table:
        table = Table(box=None, padding=(0, 2, 0, 0), header_style="bold")
        table.add_column("change")
        table.add_column("result")
        for name in ("slowdown", "peak\nGiB", "step\ns"):
            table.add_column(name, justify="right", no_wrap=True, vertical="top")
        for change in self.changes[:LISTED_CHANGES]:
            table.add_row(
                "\n".join(f"{key} {as_set(value)}" for key, value in change.overrides.items()),
                "same" if change.same_result else "another",
                f"{change.slowdown:.2f} x",
                f"{change.point.ledger.peak / GIB:.1f}",
                f"{change.point.seconds:.3g}",
            )
        return table


def words(choice: Choice) -> str:
    """A choice in a few words."""
    batch = f"batch {choice.micro_batch_size} x {choice.accumulation}"
    return f"{sharding_words(choice)}, {retention_words(choice)}, {batch}"


def sharding_words(choice: Choice) -> str:
    """Such as "FSDP2, 2 copies"."""
    parts = [{"single": "single", "fsdp": "FSDP2"}.get(choice.engine, f"ZeRO {choice.zero_stage}")]
    if not choice.reshard_after_forward:
        parts.append("weights kept")
    if choice.replicas > 1:
        parts.append(f"{choice.replicas} copies")
    if choice.offload_parameters:
        parts.append("offload")
    elif choice.offload_optimizer:
        parts.append("offload optimizer")
    return ", ".join(parts)


def retention_words(choice: Choice) -> str:
    """Such as "selective, linears, int8, on the host", or "selective, down_proj+o_proj"."""
    parts = [choice.policy]
    if linears := choice.retain_linears:
        parts.append("linears" if isinstance(linears, bool) else "+".join(linears))
    if choice.kv_format != "model":
        parts.append(choice.kv_format)
    if choice.placement == "host":
        parts.append("on the host")
    return ", ".join(parts)


def fidelity_words(plan: Plan, labelled_share: float) -> str:
    """The class of a plan's gradient and what it means."""
    ratio = plan.point.choice.ratio
    if plan.fidelity == "exact":
        return "exact: the gradient of all tokens"
    if plan.fidelity == "context detached":
        if ratio == labelled_share:
            return f"context detached: the labelled tokens ({labelled_share:.1%}) alone get gradient"
        context = (ratio - labelled_share) / (1 - labelled_share)
        return (
            f"context detached: all labelled tokens ({labelled_share:.1%}) and {context:.1%} of the others get gradient"
        )
    return f"tokens dropped: {ratio:.1%} of the tokens get gradient, and labels of others are left out"


def largest_words(ledger: Ledger) -> str:
    """The largest terms of the phase with the peak: "logits 25.2 GiB, weights 13.1 GiB, …"."""
    phase = ledger.binding_phase
    largest = ledger.largest(phase, NAMED_TERMS)
    named = [f"{term.name} {gib(term.bytes)}" for term in largest]
    rest = ledger.total(phase) - sum(term.bytes for term in largest)
    return ", ".join([*named, f"other {gib(rest)}"] if rest else named)


def gib(size: float) -> str:
    """Bytes in GiB, such as "25.2 GiB"; small ones in MiB."""
    return f"{size / GIB:.1f} GiB" if abs(size) >= GIB / 10 else f"{size / (1 << 20):.1f} MiB"


def _paragraph(console: Console, title: str, text: str) -> None:
    """A title and its text, which is wrapped beside it."""
    grid = Table.grid(padding=(0, 2))
    grid.add_column(width=12, style="bold")
    grid.add_column(overflow="fold")
    grid.add_row(title, Text(text))
    console.print(grid)
