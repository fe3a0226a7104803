"""From plans of a job to their picture."""

from __future__ import annotations

from pathlib import Path

from framework.errors import UserError
from framework.planner.planning import Planned, PlannedJob
from framework.planner.plots import Picture, draw, frontiers
from framework.planner.profile import Profile
from framework.planner.report import words


def draw_plan(path: str, job: PlannedJob, planned: Planned, profile: Profile) -> list[Path]:
    """Draw the chosen plan, or where nothing fits the one that takes least.

    Args:
        path: a file, or a directory, which is there or is named with a slash at its end.
        job: that was planned.
        planned: for it.
        profile: of the machine.

    Returns:
        The files.

    Raises:
        UserError: matplotlib is not installed, or a file cannot be written.
    """
    cluster, place = planned.cluster, Path(path)
    if path.endswith("/"):
        try:
            place.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"--plot: cannot make {path}: {error}") from None
    space = job.recorded(job.space(cluster.ranks, cluster.nodes))
    laws = job.laws(cluster, profile)
    point = planned.found.points[0] if planned.plans else job.smallest(space, laws)
    length = job.config.data.sequence_length
    picture = Picture(
        chosen=point,
        spans=job.memory.spans(point.choice),
        fronts=frontiers(space, laws, job.labelled_share),
        budget=planned.budget,
        tokens_per_step=None if length is None else job.config.training.global_batch_size * length,
        title=f"{words(point.choice)}, ratio {point.choice.ratio:.3g}" + ("" if planned.plans else ": does not fit"),
    )
    return draw(place, picture)
