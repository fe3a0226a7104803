"""Plots show the figures of the ledger and of the search."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from matplotlib.figure import Figure
from open_job import open_job
from toy_laws import TOY, MiB

from framework.config.sections import PlannerConfig
from framework.errors import UserError
from framework.planner.course import Span
from framework.planner.ledger import PHASES, Ledger, during, everywhere
from framework.planner.plots import Picture, draw, frontier, frontiers, memory_by_phase, timeline
from framework.planner.search import Budget, Point, search
from framework.planner.space import Candidate, candidates

SHARE = 0.25
GIB = 1 << 30
BUDGET = Budget(4_000 * MiB)


@pytest.fixture(scope="module")
def space() -> list[Candidate]:
    return candidates(open_job(), ranks=8, nodes=2, labelled_share=SHARE)


@pytest.fixture(scope="module")
def chosen(space: list[Candidate]) -> Point:
    return search(space, TOY, BUDGET, PlannerConfig(), labelled_share=SHARE).points[0]


def test_fronts_are_what_nothing_beats(space: list[Candidate]) -> None:
    fronts = frontiers(space, TOY, SHARE, levels=4)
    assert [ratio for ratio, _ in fronts] == pytest.approx([0.25, 0.5, 0.75, 1.0])
    for ratio, front in fronts:
        choices = [each.at(ratio) for each in space if each.lowest <= ratio <= each.choice.ratio]
        for choice in choices:
            peak, seconds = TOY.memory(choice).peak, TOY.seconds(choice)
            assert any(point.ledger.peak <= peak and point.seconds <= seconds for point in front)
        for point in front:
            others = [each for each in front if each != point]
            assert not any(each.ledger.peak <= point.ledger.peak and each.seconds <= point.seconds for each in others)


def test_a_fixed_ratio_has_one_front() -> None:
    fixed = candidates(open_job(selection__ratio=0.4), ranks=8, nodes=1, labelled_share=SHARE)
    assert [ratio for ratio, _ in frontiers(fixed, TOY, SHARE)] == [0.4]


def test_bars_add_up_to_the_phases(chosen: Point) -> None:
    axes = Figure().subplots()
    memory_by_phase(axes, chosen.ledger, BUDGET)
    phases = [phase for phase in PHASES if chosen.ledger.total(phase)]
    heights = [sum(bar[index].get_height() for bar in axes.containers) for index in range(len(phases))]
    assert heights == pytest.approx([chosen.ledger.total(phase) / GIB for phase in phases])
    assert [line.get_ydata()[0] for line in axes.lines] == [BUDGET.bytes / GIB]


def test_what_has_one_name_is_one_layer() -> None:
    ledger = Ledger((everywhere("held", 4 * GIB), during("kept", GIB, {"loss"}), during("kept", 2 * GIB, {"forward"})))
    axes = Figure().subplots()
    memory_by_phase(axes, ledger, BUDGET)
    layers = {bars.get_label(): [bar.get_height() for bar in bars] for bars in axes.containers}
    assert layers == {"held": [4, 4, 4, 4, 4], "kept": [2, 1, 0, 0, 0]}


def test_the_chosen_point_is_where_it_belongs(space: list[Candidate], chosen: Point) -> None:
    axes = Figure().subplots()
    frontier(axes, chosen, frontiers(space, TOY, SHARE), BUDGET, 65536)
    (star,) = [line for line in axes.lines if line.get_marker() == "*"]
    assert (star.get_xdata()[0], star.get_ydata()[0]) == (65536 / chosen.seconds, chosen.ledger.peak / GIB)


SPANS = [
    Span(part, start * GIB, (start + 0.5) * GIB)
    for part, start in [
        ("inputs", 1),
        ("forward first", 1),
        ("forward second", 2),
        ("forward middle", 3),
        ("forward middle", 7),
        ("forward last but one", 8),
        ("forward last", 9),
        ("loss", 10),
        ("backward last", 10),
        ("optimizer step", 1),
    ]
]


def test_a_step_is_drawn_in_order_with_a_place_for_every_block() -> None:
    axes = Figure().subplots()
    timeline(axes, SPANS, BUDGET)
    line = axes.lines[0]
    assert line.get_xdata().tolist() == [number + 0.5 for number in range(10)]
    assert line.get_ydata().tolist() == [span.peak / GIB for span in SPANS]
    assert [label.get_text().replace("\n", " ") for label in axes.get_xticklabels()] == [
        "forward",
        "loss",
        "block backward",
        "optimizer step",
    ]


@pytest.fixture(scope="module")
def picture(space: list[Candidate], chosen: Point) -> Picture:
    return Picture(chosen, SPANS, frontiers(space, TOY, SHARE, levels=2), BUDGET, 65536, "a job")


def test_the_files_are_pictures(tmp_path: Path, picture: Picture) -> None:
    assert draw(tmp_path / "plan.png", picture) == [tmp_path / "plan.png"]
    drawn = draw(tmp_path, picture)
    assert [path.name for path in drawn] == ["memory.png", "timeline.png", "frontier.png"]
    for path in [tmp_path / "plan.png", *drawn]:
        assert path.read_bytes().startswith(b"\x89PNG")
    with pytest.raises(UserError, match=r"^--plot: cannot write .*plan.nothing"):
        draw(tmp_path / "plan.nothing", picture)
    with pytest.raises(UserError, match=r"^--plot: cannot write "):
        draw(tmp_path / "missing" / "plan.png", picture)


def test_without_matplotlib_it_is_named(picture: Picture, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(UserError, match=r'pip install "selectrain\[plots\]"'):
        draw(tmp_path / "plan.png", picture)
