"""Predicted peaks against those of real steps: random small models, engines, ranks, retention, adapters, optimisers.

    python tools/check_planner.py --output docs/planner.md

Real processes on the CPU (gloo). Laws come from recorded steps of other models: of five blocks, other widths and other
lengths; none is recorded of a case that is scored. Measured is the rank with most, by the same dispatch-mode tracker
that `logging.track_cpu_memory` turns on.
"""

from __future__ import annotations

import argparse
import json
import shlex
import statistics
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path

from parity_cases import SINGLE
from planner_cases import ON_HOST, Case, random_cases
from torchrun import launch

from framework.config import Config
from framework.planner.choice import Choice
from framework.planner.planning import PlannedJob, learn

WORKER = Path(__file__).with_name("planner_worker.py")
LIMITS = {True: (0.005, 0.015), False: (0.01, 0.03)}
"""Of the median and of the 95th percentile of the errors: in one process, in several."""


@dataclass(frozen=True)
class Scored:
    """A case with its peaks in bytes on the rank with most; `reason` says why nothing is predicted."""

    case: Case
    measured: int
    predicted: int | None
    reason: str = ""

    @property
    def error(self) -> float:
        """Predicted / measured - 1."""
        assert self.predicted is not None
        return self.predicted / self.measured - 1


def score(
    cases: Sequence[Case], start: Callable[..., None] = launch, say: Callable[[str], None] = print
) -> list[Scored]:
    """Measure and predict.

    Args:
        cases: any.
        start: starts a script on so many ranks.
        say: is told what takes time.
    """
    measured = _measured(cases, start)
    predicted = {}
    for family, members in groupby(sorted(cases, key=lambda case: case.family), key=lambda case: case.family):
        jobs = {case: _job(case) for case in members}
        say(f"{family}: {len(jobs)} cases")
        learn([(job, job.space(case.ranks, 1)) for case, job in jobs.items()], say)
        for case, job in jobs.items():
            predicted[case] = _predicted(case, job, measured[case][1])
    return [Scored(case, measured[case][0], *predicted[case]) for case in cases]


def _measured(cases: Sequence[Case], start: Callable[..., None]) -> dict[Case, tuple[int, dict[str, float]]]:
    """Of each case the peak of the rank with most, and the sizes of its micro-batch."""
    found = {}
    with tempfile.TemporaryDirectory() as directory:
        path, output = Path(directory, "cases.json"), Path(directory, "found.json")
        for ranks in sorted({case.ranks for case in cases}):
            own = [case for case in cases if case.ranks == ranks]
            listed = [{"config": case.config(), "length": case.length, "prompt": case.prompt} for case in own]
            path.write_text(json.dumps(listed))
            start(ranks, WORKER, path, output)
            for case, per_rank in zip(own, json.loads(output.read_text()), strict=True):
                most = max(per_rank, key=lambda rank: rank["peak"])
                found[case] = most["peak"], most["sizes"]
    return found


def _job(case: Case) -> PlannedJob:
    config = Config.model_validate_json(json.dumps(case.config()))
    return PlannedJob(config, 1.0, lambda line: None, one_by_one=True)


def _predicted(case: Case, job: PlannedJob, sizes: dict[str, float]) -> tuple[int | None, str]:
    space = job.space(case.ranks, 1)
    if not job.recorded(space):
        return None, "; ".join(job.missing(space))
    choice = Choice.of(job.config, case.ranks, 1.0)
    return job.memory.at(choice, job.memory.sizes(choice) | sizes).peak, ""


def quantile(values: Sequence[float], share: float) -> float:
    """The smallest value that at least this share of all is not above."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, max(0, -int(-share * len(ordered) // 1) - 1))]


def summary(scored: Sequence[Scored]) -> list[tuple[str, int, float, float, float, bool]]:
    """For one process and for several: number of cases, median, 95th percentile and maximum of the errors, and fit."""
    rows = []
    for single, (middle, high) in LIMITS.items():
        errors = [abs(s.error) for s in scored if s.predicted is not None and (s.case.engine == SINGLE) == single]
        if errors:
            median, most = statistics.median(errors), quantile(errors, 0.95)
            name = "one process" if single else "several"
            rows.append((name, len(errors), median, most, max(errors), median <= middle and most <= high))
    return rows


def document(scored: Sequence[Scored], command: str) -> str:
    """Markdown: the summary, and every case."""
    lines = [
        "# Predicted and measured peaks",
        "",
        f"Written by `{command}`: random small models on the CPU, real processes, the rank with most. Errors are "
        "predicted / measured - 1.",
        "",
        "| processes | cases | median | 95th percentile | largest |",
        "| --- | --- | --- | --- | --- |",
    ]
    lines += [f"| {row[0]} | {row[1]} | {row[2]:.3%} | {row[3]:.3%} | {row[4]:.3%} |" for row in summary(scored)]
    columns = ("model", "batch", "engine", "ranks", "selection and retention", "trained", "optimizer")
    lines += ["", f"| {' | '.join(columns)} | measured, MiB | error |", "| --- " * (len(columns) + 2) + "|"]
    for each in scored:
        case = each.case
        cells = (
            f"{case.family} {case.blocks} x {case.heads * case.head_dim}",
            f"{case.accumulation} x {case.batch} x {case.length}",
            case.engine,
            str(case.ranks),
            case.retention,
            "all" if case.rank is None else f"LoRA {case.rank}",
            case.optimizer,
            f"{each.measured / 2**20:.2f}",
            each.reason if each.predicted is None else f"{each.error:+.3%}",
        )
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def draw(scored: Sequence[Scored], path: Path) -> None:
    """A scatter plot of predicted against measured peaks, and of the errors."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4.5), layout="constrained")
    FigureCanvasAgg(figure)
    peaks, errors = figure.subplots(1, 2)
    for engine, members in groupby(sorted(scored, key=lambda s: s.case.engine), key=lambda s: s.case.engine):
        known = [each for each in members if each.predicted is not None]
        measured = [each.measured / 2**20 for each in known]
        peaks.scatter(measured, [(each.predicted or 0) / 2**20 for each in known], s=14, label=engine)
        errors.scatter(measured, [100 * each.error for each in known], s=14, label=engine)
    ends = [min(each.measured for each in scored) / 2**20, max(each.measured for each in scored) / 2**20]
    peaks.plot(ends, ends, color="grey", linewidth=0.6)
    errors.axhline(0, color="grey", linewidth=0.6)
    peaks.set(xscale="log", yscale="log", xlabel="measured, MiB", ylabel="predicted, MiB", title="peak of a step")
    errors.set(xscale="log", xlabel="measured, MiB", ylabel="error, %", title="predicted / measured - 1")
    peaks.legend(frameon=False)
    figure.savefig(path, dpi=120)


def main() -> None:
    """Score, print and write; ends with 1 if a limit is missed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", type=int, default=66, help="how many random ones (66)")
    parser.add_argument("--seed", type=int, default=0, help="of the draws (0)")
    parser.add_argument("--output", type=Path, help="file for the table; the plot is beside it, as PNG")
    arguments = parser.parse_args()
    scored = score([*random_cases(arguments.cases, arguments.seed), *ON_HOST])
    text = document(scored, f"python tools/check_planner.py {shlex.join(sys.argv[1:])}".strip())
    print(text)
    if arguments.output:
        arguments.output.parent.mkdir(parents=True, exist_ok=True)
        arguments.output.write_text(text, encoding="utf-8")
        draw(scored, arguments.output.with_suffix(".png"))
    sys.exit(0 if all(row[-1] for row in summary(scored)) else 1)


if __name__ == "__main__":
    main()
