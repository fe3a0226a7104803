"""Predictions beside simulations, as they are said and as they are had."""

from __future__ import annotations

import io
import json

import pytest
from rich.console import Console

from framework.config import Config
from framework.errors import RunError, UserError
from framework.planner import checks
from framework.planner.apart import run_apart
from framework.planner.checks import GIB, Check, print_checks, simulated_peaks


def printed(*found: Check) -> str:
    console = Console(file=io.StringIO(), width=100)
    print_checks(found, console)
    return console.file.getvalue()


def test_a_difference_over_two_percent_is_said():
    close = Check(round(49.1 * GIB), 50 * GIB, "loss", 3.4)
    low, high = Check(97 * GIB, 100 * GIB, "loss", 3), Check(103 * GIB, 100 * GIB, "optimizer step", 3)
    assert [check.agrees for check in (close, low, high)] == [True, False, False]
    assert "trust" not in printed(close)
    text = printed(close, low, high)
    assert "plan 2: the ledger is 3.0% below what its step allocates; trust the simulation" in text
    assert "plan 3: the ledger is 3.0% above" in text
    assert "plan 1" not in text
    row = next(line for line in text.splitlines() if line.startswith("1 ")).split()
    assert row == ["1", "49.10", "50.00", "-1.80%", "3", "loss"]


def test_configs_are_passed_on_with_what_they_leave_out(monkeypatch):
    asked: list[dict] = []

    def answered(module: str, request: list[dict], *, failure: str) -> list[dict]:
        asked.extend(request)
        return [{"start": 1, "peaks": {"loss": 5}, "seconds": 0.5} for _ in request]

    monkeypatch.setattr(checks, "run_apart", answered)
    values = {
        "run": {"output_dir": "x"},
        "model": {"path": "x"},
        "data": {"train": "x", "sequence_length": 8},
        "optimizer": {"learning_rate": 0.1},
        "training": {"max_steps": 1, "global_batch_size": 4, "micro_batch_size": 1},
    }
    assert simulated_peaks([(Config.model_validate(values), 4)], 0.25) == [({"loss": 5}, 0.5)]
    assert asked == [{"config": json.loads(json.dumps(values)), "ranks": 4, "labelled_share": 0.25}]


def test_what_cannot_be_simulated_is_said_once(monkeypatch):
    monkeypatch.setattr(checks, "run_apart", lambda *_, **__: [{"reason": "too few blocks"}] * 2)
    with pytest.raises(UserError, match=r"^too few blocks$"):
        simulated_peaks([], 0.25)


def test_what_fails_apart_is_said_in_its_last_words():
    with pytest.raises(RunError, match=r"(?s)^it cannot be:.*No module named 'framework\.planner\.missing'"):
        run_apart("framework.planner.missing", [], failure="it cannot be")
