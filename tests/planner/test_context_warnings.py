"""Plans that detach context warn where the quality benchmark found that to fail, and nowhere else."""

from __future__ import annotations

import io
import json
import re
from dataclasses import replace
from typing import Any

import pytest
from open_job import open_job
from rich.console import Console
from toy_laws import TOY, MiB

from framework.config import Config
from framework.planner.choice import Choice
from framework.planner.context_warnings import RANDOM_WEIGHTS, TRAINED_WEIGHTS, Finding, context_warnings
from framework.planner.plan import Plan, plan_json
from framework.planner.report import Report
from framework.planner.search import Budget, search
from framework.planner.space import candidates

SHARE = 0.2
RANDOM: dict[str, Any] = {"model__path": ..., "model__from_config": {"model_type": "llama"}, "model__tokenizer": "some"}


def choice_of(config: Config, ratio: float, strategy: str = "supervised") -> Choice:
    space = candidates(config, ranks=8, nodes=2, labelled_share=SHARE)
    return replace(space[0].choice, strategy=strategy, policy="selective", ratio=ratio)


def warned(ratio: float, strategy: str = "supervised", share: float = SHARE, **changes: Any) -> tuple[str, ...]:
    config = open_job(**changes)
    return context_warnings(config, choice_of(config, ratio, strategy), share)


def ratio_of(context_share: float) -> float:
    return SHARE + context_share * (1 - SHARE)


@pytest.mark.parametrize(("finding", "changes"), [(RANDOM_WEIGHTS, RANDOM), (TRAINED_WEIGHTS, {})])
def test_less_context_than_was_enough_is_warned_of(finding: Finding, changes: dict[str, Any]) -> None:
    (text,) = warned(SHARE, **changes)
    assert text.startswith("0% of the context gets gradient. With less than ")
    assert f" of it, {finding.start} did not always learn" in text
    assert f"{finding.shortest_gap} or more tokens back in the prompt: {finding.figures}" in text
    assert finding.command in text
    (text,) = warned(ratio_of(finding.learnt_share - 0.02), **changes)
    assert text.startswith(f"{finding.learnt_share - 0.02:.0%} of the context gets gradient.")
    assert warned(ratio_of(finding.learnt_share), **changes) == ()


def test_the_ratio_that_a_warning_gives_ends_it() -> None:
    (text,) = warned(SHARE)
    remedy = re.search(r"set selection\.ratio ([\d.]+) or more$", text)
    assert remedy is not None
    assert float(remedy[1]) == pytest.approx(ratio_of(TRAINED_WEIGHTS.learnt_share), abs=0.01)
    assert warned(float(remedy[1])) == ()


def test_random_weights_are_to_be_trained_exactly() -> None:
    (text,) = warned(0.99, **RANDOM)
    assert text.endswith("train exactly, with selection.strategy none, until it can")
    assert warned(0.99) == warned(1.0, **RANDOM) == ()


def test_a_suffix_is_warned_of_by_what_it_leaves_out() -> None:
    (text,) = warned(0.75, strategy="suffix")
    assert text.startswith("the first 25% of every document get no gradient. A model that could look up some keys did")
    assert f"{TRAINED_WEIGHTS.shortest_gap} or more tokens back: {TRAINED_WEIGHTS.suffix_figures}" in text
    assert TRAINED_WEIGHTS.command in text
    remedy = re.search(r"set selection\.strategy supervised and selection\.ratio ([\d.]+) or more$", text)
    assert remedy is not None
    assert warned(float(remedy[1])) == ()
    (text,) = warned(SHARE / 2, strategy="suffix", **RANDOM)
    assert text.startswith("the first 90% of every document get no gradient. A model with random weights did not")
    assert RANDOM_WEIGHTS.suffix_figures in text
    assert text.endswith("train exactly, with selection.strategy none, until it can")


def test_what_was_not_measured_is_not_warned_of() -> None:
    assert warned(1.0) == ()
    assert warned(0.1, strategy="uniform") == ()
    assert warned(1.0, strategy="suffix") == ()
    assert warned(0.5, strategy="suffix", share=1.0) == ()  # the default without data: no token is context alone
    assert warned(0.995, share=0.99) == ()  # at most 10 tokens of 1024 are context
    short = TRAINED_WEIGHTS.shortest_gap / (1 - SHARE)
    assert warned(SHARE, data__sequence_length=int(short)) == ()
    assert warned(SHARE, data__sequence_length=int(short) + 1) != ()


def test_a_plan_has_its_warnings_in_its_json_and_in_the_report() -> None:
    config = open_job(selection__ratio="labelled")
    space = candidates(config, ranks=8, nodes=2, labelled_share=SHARE)
    budget = Budget(8_000 * MiB)
    found = search(space, TOY, budget, config.planner, labelled_share=SHARE)
    plans = [Plan.of(config, point, SHARE, engine_options=lambda config: {}) for point in found.points]
    (text,) = plans[0].warnings
    assert json.loads(json.dumps(plan_json(plans, 1)))["chosen"]["warnings"] == [text]
    output = io.StringIO()
    Report(found, plans, budget, 8, 2, SHARE).print(Console(file=output, width=4000))
    assert re.search(r"warning +" + re.escape(text), output.getvalue())
