"""Sizing upward: what would be chosen on one accelerator of a kind, on two, on four, and so on."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from rich.table import Table

from framework.errors import UserError
from framework.planner.advice import GPUS_PER_NODE
from framework.planner.changes import COUNTS, in_several
from framework.planner.hardware import Cluster
from framework.planner.planning import Planned, PlannedJob, learn
from framework.planner.profile import Profile
from framework.planner.report import GIB, retention_words, sharding_words


@dataclass(frozen=True)
class Size:
    """A number of accelerators.

    Attributes:
        ranks: how many.
        job: that is planned, which on several may take other engines; None where the batch cannot be split over so
            many, or no engine is known there.
        planned: for them; None likewise.
    """

    ranks: int
    job: PlannedJob | None
    planned: Planned | None

    @property
    def fits(self) -> bool:
        """Whether any plan does."""
        return self.planned is not None and bool(self.planned.plans)

    def to_json(self) -> dict[str, Any]:
        """Number of accelerators and machines, whether a plan fits, and which is chosen."""
        if self.planned is None:
            return {"gpus": self.ranks, "nodes": None, "fits": False, "budget_bytes": None, "chosen": None}
        listed = self.planned.to_json()
        return {"gpus": self.ranks, "nodes": self.planned.cluster.nodes} | {
            key: listed[key] for key in ("fits", "budget_bytes", "chosen")
        }


def sizes(
    job: PlannedJob,
    cluster_of: Callable[[int, int], Cluster],
    profile: Profile,
    say: Callable[[str], None],
    counts: Iterable[int] = COUNTS,
) -> list[Size]:
    """The plans on each number of accelerators. A job that is for one process may take any engine on several.

    Args:
        job: to plan for.
        cluster_of: number of machines, accelerators of each -> the cluster.
        profile: of the accelerators.
        say: is told what takes time.
        counts: of accelerators, rising; from `GPUS_PER_NODE` on they are on several machines.

    Raises:
        UserError: nothing can be chosen from on any number of them.
        RunError: a law cannot be recorded.
    """
    several = job.with_config(in_several(job.config))
    spaces: dict[int, list[Any]] = {}
    reasons: list[str] = []
    jobs = {count: job if count == 1 else several for count in counts}
    for count, its_job in jobs.items():
        try:
            spaces[count] = its_job.space(count, _nodes(count))
        except UserError as error:
            reasons.append(str(error))
    if not spaces:
        raise UserError(reasons[0])
    learn([(jobs[count], space) for count, space in spaces.items()], say)
    found = []
    for count, its_job in jobs.items():
        if count in spaces and its_job.recorded(spaces[count]):
            cluster = cluster_of(_nodes(count), count // _nodes(count))
            found.append(Size(count, its_job, its_job.plan(cluster, profile)))
        else:
            found.append(Size(count, None, None))
    return found


def fewest(found: Sequence[Size]) -> Size:
    """The smallest of those on which a plan fits; the largest that could be planned for, if none does.

    Raises:
        UserError: none could be planned for.
    """
    planned = [size for size in found if size.planned is not None]
    if not planned:
        raise UserError("sharding.engine: the planner knows no engine that the config permits")
    return next((size for size in planned if size.fits), planned[-1])


def sizes_table(found: Sequence[Size]) -> Table:
    """What is chosen on each number of accelerators."""
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="bold")
    table.add_column("GPUs", justify="right")
    for name in ("engine", "retention"):
        table.add_column(name)
    for name in ("ratio", "batch", "peak\nGiB", "step\ns", "tokens/s"):
        table.add_column(name, justify="right", no_wrap=True, vertical="top")
    best = fewest(found)
    for size in found:
        style = "bold green" if size is best and size.fits else ""
        if size.planned is None:
            table.add_row(str(size.ranks), "cannot be planned")
        elif not size.fits:
            least = size.planned.smallest
            peak = "" if least is None else f"{least.peak / GIB:.1f}"
            table.add_row(str(size.ranks), "nothing fits", "", "", "", peak)
        else:
            plan = size.planned.plans[0]
            choice, rate = plan.point.choice, plan.tokens_per_second
            table.add_row(
                str(size.ranks),
                sharding_words(choice),
                retention_words(choice),
                "exact" if plan.fidelity == "exact" else f"{choice.ratio:.4f}",
                f"{choice.micro_batch_size} x {choice.accumulation}",
                f"{plan.point.ledger.peak / GIB:.1f}",
                f"{plan.point.seconds:.3g}",
                "" if rate is None else f"{rate:,.0f}",
                style=style,
            )
    return table


def _nodes(count: int) -> int:
    return -(-count // GPUS_PER_NODE)
