"""What a check over several keys is, and how all are run.

Each rule names the keys it reads and is run only where all of them are valid by themselves, so that its findings are
reported together with those of single keys and never follow from them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

TASK_METRICS = {"sequence_classification": ("accuracy",), "image_classification": ("accuracy",)}
"""What an evaluation gives beside the loss, for each task that has such a figure; higher is better for all of them."""

Check = Callable[..., tuple[str, str] | None]

CLASSIFICATION = ("sequence_classification", "image_classification")
"""Tasks with one class a sample, which the model reads from a pooled token."""

TASK_FORMATS = {
    "masked_lm": "text",
    "sequence_classification": "classification",
    "image_classification": "image_folder",
}
"""The one format of each task that has no choice of them."""


@dataclass(frozen=True)
class Rule:
    """A check over the values of `keys` (dotted) that returns the key to change and the problem, or None."""

    keys: tuple[str, ...]
    check: Check


RULES: list[Rule] = []


def rule(*keys: str) -> Callable[[Check], Check]:
    """Register a check over the values of `keys`."""

    def register(check: Check) -> Check:
        RULES.append(Rule(keys, check))
        return check

    return register


def broken_rules(value_of: Callable[..., Any]) -> list[tuple[str, str]]:
    """Run all rules and return (key, problem) for each broken one.

    Args:
        value_of: gives the value of a key by its parts (`"model", "adapter", "rank"`; None inside a section that is
            null), or raises LookupError where it has no valid one; rules that read it are not run.
    """
    findings = []
    for rule in RULES:
        try:
            values = [value_of(*key.split(".")) for key in rule.keys]
        except LookupError:
            continue
        if finding := rule.check(*values):
            findings.append(finding)
    return findings
