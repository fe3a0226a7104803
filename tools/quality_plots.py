"""The picture of the quality benchmark: one panel a task, one line an arm."""

from __future__ import annotations

import json
import statistics
from pathlib import Path
from typing import TYPE_CHECKING

from quality_bench import Cell, best_cells

if TYPE_CHECKING:
    from matplotlib.axes import Axes

COLOURS = ("#2166ac", "#d6872c", "#b2182b", "#4d9221", "#762a83")
TITLES = {
    "text": "text: loss after equal time",
    "retrieval": "retrieval: from random weights",
    "transfer": "transfer: from a start that retrieves",
}


def draw(output: Path, path: Path) -> None:
    """Draw the finished arms of each task beside each other.

    Args:
        output: folder of the tasks' files; tasks without a file are left out.
        path: of the picture, whose ending says the format, such as `.png`.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    files = {task: output / f"{task}.json" for task in TITLES}
    shown = {task: best_cells(json.loads(file.read_text())) for task, file in files.items() if file.exists()}
    figure = Figure(figsize=(5.8 * len(shown), 5.4), layout="constrained")
    FigureCanvasAgg(figure)
    for (task, rows), axes in zip(shown.items(), figure.subplots(1, len(shown), squeeze=False)[0], strict=True):
        (_losses if task == "text" else _accuracies)(axes, rows)
        axes.set_title(TITLES[task])
        axes.set_yticks(range(len(rows)), list(rows))
        axes.invert_yaxis()
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(axis="x", alpha=0.3)
    figure.savefig(path, dpi=120)


def _losses(axes: Axes, rows: dict[str, list[Cell]]) -> None:
    """Differences to the first arm's with the same seed: means and deviations over seeds, and each seed."""
    first = {cell["seed"]: cell["loss"] for cell in next(iter(rows.values()))}
    losses = [[cell["loss"] - first[cell["seed"]] for cell in row] for row in rows.values()]
    deviations = [statistics.stdev(each) if len(each) > 1 else 0.0 for each in losses]
    means, places = [statistics.mean(each) for each in losses], range(len(losses))
    axes.errorbar(means, places, xerr=deviations, fmt="o", markersize=6, color=COLOURS[0], elinewidth=1)
    for place, each in enumerate(losses):
        axes.plot(each, [place] * len(each), ".", color="black", markersize=4, zorder=3)
    axes.set_xlabel(f"nats above {next(iter(rows))}: mean, standard deviation, seeds")


def _accuracies(axes: Axes, rows: dict[str, list[Cell]]) -> None:
    """Each seed's for each kind of document, after equal steps (filled) and equal time (hollow)."""
    kinds = list(next(iter(rows.values()))[0]["equal_steps"])
    for index, kind in enumerate(kinds):
        shift = 0.24 * (index - (len(kinds) - 1) / 2)
        for when, filled in (("equal_steps", True), ("equal_time", False)):
            points = [(cell[when][kind], place + shift) for place, row in enumerate(rows.values()) for cell in row]
            axes.plot(
                *zip(*points, strict=True),
                linestyle="none",
                marker="o" if filled else "D",
                markersize=5 if filled else 4,
                markerfacecolor=COLOURS[index] if filled else "none",
                color=COLOURS[index],
                label=f"{kind}, {when.replace('_', ' ')}",
            )
    axes.set_xlim(0, 1.03)
    axes.set_xlabel("share of right answers, each seed")
    axes.legend(loc="upper center", bbox_to_anchor=(0.3, -0.1), ncols=2, fontsize="small", frameon=False)
