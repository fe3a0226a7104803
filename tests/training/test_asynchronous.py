"""Checkpoints that are written while a run goes on."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import framework
from framework.checkpoint import CheckpointSaver, find_checkpoint, saver
from framework.config import Config
from framework.errors import RunError
from framework.training import loop


def losses(run_dir: Path) -> list[float]:
    lines = (run_dir / "metrics.jsonl").read_text().splitlines()
    return [record["loss"] for record in map(json.loads, lines) if record["kind"] == "train"]


def checkpoints(run_dir: Path) -> dict[str, bytes]:
    """All files of all checkpoints but the manifests, which name the run directory in their config."""
    return {
        str(path.relative_to(run_dir)): path.read_bytes()
        for path in (run_dir / "checkpoints").rglob("*")
        if path.is_file() and path.name != "manifest.json"
    }


def slow(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let writing take longer than a step."""
    plain = saver.write_fragments

    def write(path: Path, fragments: object) -> None:
        time.sleep(0.2)
        plain(path, fragments)

    monkeypatch.setattr(saver, "write_fragments", write)


def test_a_run_is_the_same_and_so_is_what_it_leaves(
    make_config: Callable[..., Config], settings: dict, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = framework.train(make_config(checkpoint__every_steps=2, checkpoint__keep_last=9))
    settings["run"]["output_dir"] += "-asynchronous"
    slow(monkeypatch)
    result = framework.train(make_config(checkpoint__asynchronous=True))
    assert losses(result.run_dir) == losses(plain.run_dir)
    assert checkpoints(result.run_dir) == checkpoints(plain.run_dir)
    assert (result.checkpoint, result.step) == (result.run_dir / "checkpoints" / "step-00000006", 6)


def test_a_failing_run_completes_what_is_pending_and_names_it(
    make_config: Callable[..., Config], monkeypatch: pytest.MonkeyPatch
) -> None:
    slow(monkeypatch)
    plain = loop.train_window
    calls = []

    def train_window(engine, ranks, objective, *rest):
        calls.append(1)
        result, selected = plain(engine, ranks, objective, *rest)
        if len(calls) == 3:
            result = type(result)(float("nan"), result.grad_norm, finite=False, skipped=True)
        return result, selected

    monkeypatch.setattr(loop, "train_window", train_window)
    config = make_config(checkpoint__asynchronous=True, checkpoint__every_steps=2)
    with pytest.raises(RunError, match=r"step 3: the loss is nan.* the newest checkpoint is .*step-00000002; lower"):
        framework.train(config)
    found = find_checkpoint(Path(config.run.output_dir))
    assert found is not None and found.step == 2


def test_every_step_boundary_asks_whether_a_save_is_done(
    make_config: Callable[..., Config], monkeypatch: pytest.MonkeyPatch
) -> None:
    plain, asked = CheckpointSaver.poll, []
    monkeypatch.setattr(CheckpointSaver, "poll", lambda keeper: (asked.append(1), plain(keeper))[1])
    framework.train(make_config(checkpoint__asynchronous=True, checkpoint__every_steps=2))
    assert len(asked) == 6


def test_another_number_of_ranks_is_resumed_and_said(
    make_config: Callable[..., Config], capsys: pytest.CaptureFixture[str]
) -> None:
    first = framework.train(make_config(training__max_steps=4))
    # What two ranks would have saved.
    path = first.checkpoint / "state.pt"
    state = torch.load(path, weights_only=True)
    torch.save(state | {"random": state["random"] * 2}, path)
    manifest = json.loads((first.checkpoint / "manifest.json").read_text())
    manifest["world_size"] = 2
    for entry in manifest["files"]:
        entry["bytes"] = (first.checkpoint / entry["name"]).stat().st_size
    (first.checkpoint / "manifest.json").write_text(json.dumps(manifest))
    resumed = framework.train(make_config(training__max_steps=6))
    assert (resumed.status, resumed.step) == ("completed", 6)
    said = "the checkpoint is of 2 ranks and this run has 1: dropout draws other masks from here on"
    assert said in capsys.readouterr().out.replace("\n", " ")
