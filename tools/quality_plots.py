"""The picture of the quality benchmark: one panel a task, one line an arm."""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from quality_bench import Cell, best_cells

if TYPE_CHECKING:
    from matplotlib.axes import Axes

COLOURS = ("#2166ac", "#f4a582", "#b2182b", "#4d9221", "#762a83")
TITLES = {
    "text": "text: loss after equal time",
    "retrieval": "retrieval from random weights",
    "transfer": "retrieval from a start that can",
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
    figure = Figure(figsize=(6.2 * len(shown), 4.6), layout="constrained")
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
    """Means and deviations over seeds, and each seed."""
    _points(axes, rows, lambda cell: cell["loss"], 0.0, COLOURS[0], filled=True)
    for place, row in enumerate(rows.values()):
        axes.plot([cell["loss"] for cell in row], [place] * len(row), ".", color="grey", markersize=4)
    axes.set_xlabel("nats per answer token, mean ± standard deviation over seeds")


def _accuracies(axes: Axes, rows: dict[str, list[Cell]]) -> None:
    """Of each kind of document, after equal steps (filled) and equal time (hollow)."""
    kinds = list(next(iter(rows.values()))[0]["equal_steps"])
    for index, kind in enumerate(kinds):
        shift = 0.22 * (index - (len(kinds) - 1) / 2)
        for when, filled in (("equal_steps", True), ("equal_time", False)):
            label = f"{kind}, {when.replace('_', ' ')}"

            def value(cell: Cell, when: str = when, kind: str = kind) -> float:
                return cell[when][kind]

            _points(axes, rows, value, shift, COLOURS[index], filled=filled, label=label)
    axes.set_xlim(0, 1.03)
    axes.set_xlabel("share of right answers, mean ± standard deviation over seeds")
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.14), ncols=len(kinds), fontsize="small", frameon=False)


def _points(
    axes: Axes,
    rows: dict[str, list[Cell]],
    value: Callable[[Cell], float],
    shift: float,
    colour: str,
    *,
    filled: bool,
    label: str | None = None,
) -> None:
    values = [[value(cell) for cell in row] for row in rows.values()]
    axes.errorbar(
        [statistics.mean(each) for each in values],
        [place + shift for place in range(len(values))],
        xerr=[statistics.stdev(each) if len(each) > 1 else 0.0 for each in values],
        fmt="o" if filled else "D",
        markersize=5,
        markerfacecolor=colour if filled else "white",
        color=colour,
        elinewidth=1,
        label=label,
    )
