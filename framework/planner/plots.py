"""Plots of a plan, with matplotlib, which is imported when one is drawn. Must not import torch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from framework.errors import UserError
from framework.planner.course import Span
from framework.planner.law import PHASE_OF_PART
from framework.planner.ledger import PHASES, Ledger
from framework.planner.search import Budget, Laws, Point
from framework.planner.space import Candidate

if TYPE_CHECKING:
    from matplotlib.axes import Axes

GIB = 1 << 30
SHOWN_TERMS = 8
LEVELS = 5
MOST_ON_A_LINEAR_AXIS = 10
BUDGET_COLOUR = "#b2182b"


@dataclass(frozen=True)
class Picture:
    """What is drawn of a plan.

    Attributes:
        chosen: the plan's point.
        spans: its step's parts in order, from `MemoryModel.spans`.
        fronts: from `frontiers`.
        budget: of a rank.
        tokens_per_step: of all ranks; None where the data has no sequence length: speed is steps a second.
        title: over all of it.
    """

    chosen: Point
    spans: Sequence[Span]
    fronts: Sequence[tuple[float, Sequence[Point]]]
    budget: Budget
    tokens_per_step: int | None
    title: str


def draw(path: Path, picture: Picture) -> list[Path]:
    """Draw memory by phase, memory in the course of a step, and what speed and memory the ratios have.

    Args:
        path: of a file, whose ending says the format, such as `.png`; or a directory, which gets a file each.
        picture: what is drawn.

    Returns:
        The files.

    Raises:
        UserError: matplotlib is not installed, or a file cannot be written.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        raise UserError('--plot: matplotlib is not installed here; pip install "selectrain[plots]"') from None

    def figure(width: float, height: float) -> Figure:
        made = Figure(figsize=(width, height), layout="constrained")
        FigureCanvasAgg(made)
        made.suptitle(picture.title)
        return made

    panels: dict[str, Callable[[Axes], None]] = {
        "memory": lambda axes: memory_by_phase(axes, picture.chosen.ledger, picture.budget),
        "timeline": lambda axes: timeline(axes, picture.spans, picture.budget),
        "frontier": lambda axes: frontier(
            axes, picture.chosen, picture.fronts, picture.budget, picture.tokens_per_step
        ),
    }
    files: dict[Path, Figure] = {}
    if path.is_dir():
        for name, panel in panels.items():
            files[path / f"{name}.png"] = alone = figure(8, 5.5)
            panel(alone.subplots())
    else:
        files[path] = together = figure(13, 10)
        places = together.subplot_mosaic([["memory", "frontier"], ["timeline", "timeline"]])
        for name, panel in panels.items():
            panel(places[name])
    for file, drawn in files.items():
        try:
            drawn.savefig(file, dpi=120)
        except (OSError, ValueError) as error:
            raise UserError(f"--plot: cannot write {file}: {error}") from None
    return [*files]


def frontiers(
    space: Sequence[Candidate], laws: Laws, labelled_share: float, levels: int = LEVELS
) -> list[tuple[float, list[Point]]]:
    """For ratios from the labelled share to 1: the points that no other one of this ratio beats in memory and speed.

    Args:
        space: from `candidates`.
        laws: of memory and time.
        labelled_share: labelled tokens / all tokens of the data.
        levels: number of ratios, evenly spaced, where any candidate's ratio is free.

    Returns:
        Ratio and points, the fastest first, for each ratio, the smallest first.
    """
    free = [each for each in space if each.lowest < each.choice.ratio]
    ratios = {each.choice.ratio for each in space}
    if free:
        lowest = max(free[0].lowest, labelled_share)
        ratios |= {lowest + (1 - lowest) * step / (levels - 1) for step in range(levels - 1)}
    fronts = []
    for ratio in sorted(ratios):
        choices = [each.at(ratio) for each in space if each.lowest <= ratio <= each.choice.ratio]
        points = [Point(choice, laws.memory(choice), laws.seconds(choice)) for choice in choices]
        front: list[Point] = []
        for point in sorted(points, key=lambda point: (point.seconds, point.ledger.peak)):
            if not front or point.ledger.peak < front[-1].ledger.peak:
                front.append(point)
        fronts.append((ratio, front))
    return fronts


def memory_by_phase(axes: Axes, ledger: Ledger, budget: Budget) -> None:
    """Stacked bars of a ledger's terms in each phase, with the budget as a line.

    Args:
        axes: to draw on.
        ledger: of the plan.
        budget: of a rank.
    """
    from matplotlib import colormaps

    phases = [phase for phase in PHASES if ledger.total(phase)]
    sizes: dict[str, list[int]] = {}
    for term in ledger.terms:
        here = sizes.setdefault(term.name, [0] * len(phases))
        sizes[term.name] = [
            size + term.bytes * (phase in term.phases) for size, phase in zip(here, phases, strict=True)
        ]
    ordered = sorted(((name, each) for name, each in sizes.items() if any(each)), key=lambda layer: -max(layer[1]))
    layers, rest = ordered[:SHOWN_TERMS], ordered[SHOWN_TERMS:]
    # What is there in all phases comes first, so that it is a band of the same height.
    layers.sort(key=lambda layer: -sum(map(bool, layer[1])))
    if rest:
        layers.append(("other", [sum(each) for each in zip(*(each for _, each in rest), strict=True)]))
    colours = colormaps["tab10"].colors  # type: ignore[attr-defined]  # of a listed colour map
    places, bottom = range(len(phases)), [0.0] * len(phases)
    for index, (name, heights_in_bytes) in enumerate(layers):
        heights = [size / GIB for size in heights_in_bytes]
        axes.bar(places, heights, bottom=bottom, width=0.7, label=name, color=colours[index % len(colours)])
        bottom = [base + height for base, height in zip(bottom, heights, strict=True)]
    for place, (phase, total) in enumerate(zip(phases, bottom, strict=True)):
        weight = "bold" if phase == ledger.binding_phase else "normal"
        axes.annotate(f"{total:.1f}", (place, total), (0, 3), textcoords="offset points", ha="center", weight=weight)
    _budget_line(axes, budget)
    axes.set_xticks(places, [phase.replace(" ", "\n") for phase in phases])
    axes.set_ylim(0, 1.12 * max(*bottom, budget.bytes / GIB))
    axes.set_ylabel("allocated, GiB per GPU")
    axes.set_title("memory by phase")
    _plain(axes)
    handles, labels = axes.get_legend_handles_labels()
    axes.legend(handles[::-1], labels[::-1], loc="upper left", bbox_to_anchor=(1.0, 1.0), frameon=False)


def timeline(axes: Axes, spans: Sequence[Span], budget: Budget) -> None:
    """What a rank holds in the course of a step, whose blocks follow each other at equal distances.

    Of several micro-batches the first two are shown; those after them are like the second.

    Args:
        axes: to draw on.
        spans: the step's parts in order.
        budget: of a rank.
    """
    places: list[float] = []
    borders: list[tuple[float, str]] = []
    end = 0.0
    for span in spans:
        phase = PHASE_OF_PART[span.part]
        if not borders or borders[-1][1] != phase:
            borders.append((end, phase))
        places.append(end + 0.5)
        end += 1
    held = [span.start / GIB for span in spans]
    peaks = [span.peak / GIB for span in spans]
    axes.fill_between(places, held, color="#4393c3", label="held", linewidth=0)
    axes.fill_between(places, held, peaks, color="#f4a582", label="for a moment, at its most", linewidth=0)
    axes.plot(places, peaks, color="black", linewidth=0.8)
    top = 1.15 * max(*peaks, budget.bytes / GIB)
    for place, _ in borders[1:]:
        axes.axvline(place, color="grey", linewidth=0.6, linestyle=":")
    ends = [*(place for place, _ in borders[1:]), end]
    shown = [(place, stop, phase) for (place, phase), stop in zip(borders, ends, strict=True)]
    axes.set_xticks(
        [(place + stop) / 2 for place, stop, _ in shown],
        [phase if stop - place > end / 10 else phase.replace(" ", "\n") for place, stop, phase in shown],
    )
    axes.tick_params(axis="x", length=0)
    highest = max(range(len(peaks)), key=peaks.__getitem__)
    axes.annotate(
        f"{peaks[highest]:.1f}",
        (places[highest], peaks[highest]),
        (0, 3),
        textcoords="offset points",
        ha="center",
        weight="bold",
    )
    _budget_line(axes, budget)
    axes.set_xlim(0, end)
    axes.set_ylim(0, top)
    axes.set_ylabel("allocated, GiB per GPU")
    axes.set_title("a step, block by block")
    _plain(axes)
    axes.legend(loc="upper left", bbox_to_anchor=(1.0, 1.0), frameon=False)


def frontier(
    axes: Axes,
    chosen: Point,
    fronts: Sequence[tuple[float, Sequence[Point]]],
    budget: Budget,
    tokens_per_step: int | None,
) -> None:
    """Peak memory over speed of the best points of each ratio, with the budget as a line and the chosen point.

    Args:
        axes: to draw on.
        chosen: the plan's point.
        fronts: from `frontiers`.
        budget: of a rank.
        tokens_per_step: of all ranks; None for steps a second.
    """
    from matplotlib import colormaps

    per_step = 1 if tokens_per_step is None else tokens_per_step
    colours = colormaps["viridis"]
    for index, (ratio, points) in enumerate(fronts):
        x = [per_step / point.seconds for point in points]
        y = [point.ledger.peak / GIB for point in points]
        name = "1 (exact)" if ratio == 1 else f"{ratio:.3g}"
        colour = colours(0.9 * index / max(1, len(fronts) - 1))
        axes.step(x, y, where="post", color=colour, linewidth=1.5, marker="o", markersize=4, label=name)
    x, y = [per_step / chosen.seconds], [chosen.ledger.peak / GIB]
    axes.plot(
        x,
        y,
        linestyle="none",
        marker="*",
        markersize=17,
        color="#f4a582",
        markeredgecolor="black",
        label=f"{'chosen' if budget.holds(chosen.ledger) else 'smallest'}: {chosen.choice.ratio:.3g}",
        zorder=5,
    )
    peaks = [point.ledger.peak for _, points in fronts for point in points]
    if max(peaks) > MOST_ON_A_LINEAR_AXIS * min(peaks):
        _logarithmic(axes)
    else:
        axes.set_ylim(0, 1.05 * max(*peaks, budget.bytes) / GIB)
    _budget_line(axes, budget, left=True)
    axes.set_xlim(0, 1.05 * max(*x, *(per_step / point.seconds for _, points in fronts for point in points)))
    axes.set_xlabel("steps a second" if tokens_per_step is None else "tokens a second")
    axes.set_ylabel("peak allocated, GiB per GPU")
    axes.set_title("the least memory for a speed, by ratio")
    _plain(axes)
    axes.legend(title="ratio", loc="upper left", bbox_to_anchor=(1.0, 1.0), frameon=False)


def _logarithmic(axes: Axes) -> None:
    """A logarithmic axis with plain numbers."""
    from matplotlib.ticker import LogLocator, NullFormatter, ScalarFormatter

    axes.set_yscale("log")
    axes.yaxis.set_major_locator(LogLocator(base=10, subs=(1.0, 2.0, 5.0)))
    axes.yaxis.set_major_formatter(ScalarFormatter())
    axes.yaxis.set_minor_formatter(NullFormatter())


def _budget_line(axes: Axes, budget: Budget, left: bool = False) -> None:
    size = budget.bytes / GIB
    axes.axhline(size, color=BUDGET_COLOUR, linestyle="--", linewidth=1.2)
    axes.annotate(
        f"budget {size:.1f}",
        (0.01 if left else 0.99, size),
        (0, 3),
        xycoords=("axes fraction", "data"),
        textcoords="offset points",
        ha="left" if left else "right",
        color=BUDGET_COLOUR,
    )


def _plain(axes: Axes) -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", alpha=0.3)
    axes.set_axisbelow(True)
