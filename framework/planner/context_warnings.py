"""What a plan that takes context for constant puts at risk, as the quality benchmark measured it.

Must not import torch.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from framework.config import Config
from framework.planner.choice import Choice


@dataclass(frozen=True)
class Finding:
    """What was measured of one kind of starting point.

    Attributes:
        start: such models, for people.
        shortest_gap: tokens between what was looked up and the question, the fewest of all; longer gaps gave the same.
        learnt_share: smallest share of the context with gradient with which looking up was learnt with every seed; 1
            if with none but all of it. `selection.correction` did not make it smaller.
        figures: who learnt it after as many steps as exact training took, for people.
        suffix_figures: the same with the end of every document alone, where what was looked up came before it.
        command: that measured them; README.md has its tables.
    """

    start: str
    shortest_gap: int
    learnt_share: float
    figures: str
    suffix_figures: str
    command: str


COMMAND = "tools/bench_quality.py --output runs/quality --most-rates 1 --threads 1"

RANDOM_WEIGHTS = Finding(
    start="a model with random weights",
    shortest_gap=8,
    learnt_share=1.0,
    figures="of three trainings one learnt it with half of the context, two with three quarters, all by exact training",
    suffix_figures="of three trainings with the last half none learnt it, all by exact training",
    command=f"{COMMAND} --task retrieval --rates 3e-3",
)

TRAINED_WEIGHTS = Finding(
    start="a model that could look up some keys",
    shortest_gap=32,
    learnt_share=0.49,
    figures="of three trainings two learnt it with a quarter of the context, all with half of it",
    suffix_figures="with the last half three trainings went from .49 and .42 right answers over gaps of 32 and 128 to "
    ".80 and .81, exact training to 1.00",
    command=f"{COMMAND} --task transfer --rates 1e-3",
)


def context_warnings(config: Config, choice: Choice, labelled_share: float) -> tuple[str, ...]:
    """Warnings of a choice that leaves context without gradient as was measured to fail; none where it was not.

    Args:
        config: of the run: whether it starts from random weights, how long its prompts can be.
        choice: says what is selected.
        labelled_share: labelled tokens / all tokens of the data.
    """
    finding = RANDOM_WEIGHTS if config.model.path is None else TRAINED_WEIGHTS
    assert config.data.sequence_length is not None
    if config.data.sequence_length * (1 - labelled_share) <= finding.shortest_gap:
        return ()
    if choice.strategy == "suffix" and choice.ratio < 1:
        return (_suffix_warning(finding, choice.ratio, labelled_share),)
    if choice.fidelity(labelled_share) != "context detached":
        return ()
    share = (choice.ratio - labelled_share) / (1 - labelled_share)
    if share >= finding.learnt_share:
        return ()
    bound = f"{finding.learnt_share:.0%}" if finding.learnt_share < 1 else "all"
    return (
        f"{share:.0%} of the context gets gradient. With less than {bound} of it, {finding.start} did not always learn "
        f"to look up answers {finding.shortest_gap} or more tokens back in the prompt: {finding.figures} "
        f"({finding.command}). If answers are to be looked up there, {_remedy(finding, labelled_share)}",
    )


def _suffix_warning(finding: Finding, ratio: float, labelled_share: float) -> str:
    return (
        f"the first {1 - ratio:.0%} of every document get no gradient. {finding.start.capitalize()} did not learn to "
        f"look up answers there, {finding.shortest_gap} or more tokens back: {finding.suffix_figures} "
        f"({finding.command}). If answers are to be looked up there, {_remedy(finding, labelled_share, 'supervised')}"
    )


def _remedy(finding: Finding, labelled_share: float, strategy: str | None = None) -> str:
    """What was measured to learn it.

    Args:
        finding: of the starting point.
        labelled_share: labelled tokens / all tokens of the data.
        strategy: that the config has to ask for; None if it does.
    """
    ratio = labelled_share + finding.learnt_share * (1 - labelled_share)
    if ratio >= 1:
        return "train exactly, with selection.strategy none, until it can"
    change = f"selection.strategy {strategy} and " if strategy else ""
    return f"set {change}selection.ratio {math.ceil(100 * ratio) / 100:.2f} or more"
