"""Profiles of whole runs: which steps they hold, and what stands in them."""

from __future__ import annotations

import gzip
import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

import framework


def trace_of(path: Path) -> list[dict[str, Any]]:
    with gzip.open(path, "rt", encoding="utf-8") as file:
        return json.load(file)["traceEvents"]


def ranges(path: Path) -> Counter[str]:
    """How often each `record_function` range stands in a trace."""
    return Counter(event["name"] for event in trace_of(path) if event.get("cat") == "user_annotation")


@pytest.mark.parametrize("start", [1, 3])
def test_the_steps_that_are_asked_for(make_config, start, capsys):
    result = framework.train(make_config(logging__profile={"start": start, "steps": 2}))
    (trace,) = (result.run_dir / "profile").glob("*.trace.json.gz")
    assert trace.name == f"step-0000000{start}.trace.json.gz"
    found = ranges(trace)
    # Two steps of two micro-batches, in two blocks.
    assert (found["data"], found["optimizer step"]) == (2, 2)
    assert (found["forward"], found["backward"]) == (4, 4)
    for block in ("model.layers.0", "model.layers.1"):
        assert [found[f"{part} {block}"] for part in ("record", "replay", "backward")] == [4, 4, 4]
    table = trace.with_name(f"step-0000000{start}.txt").read_text()
    assert "aten::mm" in table and "Self CPU" in table
    printed = capsys.readouterr().out
    assert f"profile: {trace}" in printed and printed.count("Self CPU time total") == 1


def test_shapes_and_memory_on_request(make_config):
    plain = framework.train(make_config(logging__profile={"start": 2, "steps": 1}))
    assert not any("Input Dims" in event.get("args", {}) for event in trace_of(trace_path(plain.run_dir)))
    wanted = make_config(logging__profile={"start": 2, "steps": 1, "shapes": True, "memory": True})
    detailed = framework.train(wanted, resume="none")
    events = trace_of(trace_path(detailed.run_dir))
    shapes = [event["args"]["Input Dims"] for event in events if event["name"] == "aten::mm" and "args" in event]
    # The replay multiplies selected rows of 8 elements with the matrices of the MLP.
    assert any(list(map(len, dims)) == [2, 2] for dims in shapes)
    assert any(event["name"] == "[memory]" for event in events)


def trace_path(run_dir: Path) -> Path:
    return run_dir / "profile" / "step-00000002.trace.json.gz"


def test_losses_are_those_of_an_unobserved_run(make_config):
    def losses(run_dir):
        return [json.loads(line)["loss"] for line in (run_dir / "metrics.jsonl").read_text().splitlines()]

    plain = losses(framework.train(make_config()).run_dir)
    observed = make_config(logging__profile={"start": 2, "steps": 3}, logging__trackers=["tensorboard"])
    assert losses(framework.train(observed, resume="none").run_dir) == plain


def test_a_profile_that_a_resume_comes_too_late_for(make_config, capsys):
    framework.train(make_config(training__max_steps=3))
    result = framework.train(make_config(training__max_steps=6, logging__profile={"start": 2, "steps": 2}))
    assert "logging.profile: step 2 is past, so nothing is profiled" in capsys.readouterr().out
    assert not (result.run_dir / "profile").exists()


def test_a_stop_ends_the_profile_early(make_config, monkeypatch):
    config = make_config(logging__profile={"start": 2, "steps": 4})
    from framework.training import loop

    plain = loop.Run.one_step

    def one_step(run):
        plain(run)
        if run.step == 3:
            run.directory.stop_file.touch()

    monkeypatch.setattr(loop.Run, "one_step", one_step)
    result = framework.train(config)
    assert (result.status, result.step) == ("stopped", 3)
    assert ranges(trace_path(result.run_dir))["optimizer step"] == 2
