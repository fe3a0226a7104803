"""Curves of whole runs, read back and compared with metrics.jsonl."""

from __future__ import annotations

import json
import math
import re
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import framework
from framework.errors import RunError, UserError
from framework.sharding.ranks import Place, Ranks
from framework.training import evaluation, loop, start, tracking
from framework.training.insight import Insight
from framework.training.loss import Evaluated
from framework.training.metrics import EvalRecord, TrainRecord
from framework.training.tracking import check_trackers, curve_points

# Records what a run of the real package would be told, and keeps it as a server does: over all starts of a run.
STUB = """
import itertools

server, inits, fail_at, ids = {}, [], [], itertools.count(1)


class Run:
    def __init__(self, id, config):
        self.id = id
        self.history = server.setdefault(id, [])
        # A resumed run counts on, as the service tells it to.
        self.step = self.history[-1][0] + 1 if self.history else 0
        self.finished, self.axes = None, []

    def define_metric(self, name, step_metric=None, hidden=None):
        self.axes.append((name, step_metric))

    def log(self, values, step):
        if len(self.history) + 1 in fail_at:
            raise ConnectionError("the service is gone")
        # The real one drops such a row with a warning.
        assert step >= self.step, (step, self.step)
        self.history.append((step, values))
        self.step = step

    def finish(self, exit_code=None):
        self.finished = exit_code


def init(*, project, name, id, resume, dir, config):
    inits.append({"project": project, "name": name, "id": id, "resume": resume, "dir": dir, "config": config})
    run = Run(id or f"run{next(ids)}", config)
    inits[-1]["run"] = run
    return run
"""


def records(run_dir: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


def expected_curves(run_dir: Path) -> dict[str, list[tuple[int, float]]]:
    curves: dict[str, list[tuple[int, float]]] = {}
    for record in records(run_dir):
        kind, step = record.pop("kind"), record.pop("step")
        for key, value in record.items():
            if value is not None:
                curves.setdefault(f"{kind}/{key}", []).append((step, value))
    return curves


def tensorboard_curves(directory: Path) -> tuple[dict[str, list[tuple[int, float]]], EventAccumulator]:
    events = EventAccumulator(str(directory), size_guidance={"scalars": 0, "tensors": 0})
    events.Reload()
    return {
        tag: [(point.step, point.value) for point in events.Scalars(tag)] for tag in events.Tags()["scalars"]
    }, events


def assert_same_curves(found, expected):
    assert found.keys() == expected.keys()
    for name, points in expected.items():
        assert [step for step, _ in found[name]] == [step for step, _ in points], name
        # TensorBoard keeps float32.
        assert [value for _, value in found[name]] == pytest.approx([value for _, value in points], rel=1e-6), name


@pytest.fixture
def wandb(tmp_path, monkeypatch):
    """A stand-in for the package that a test can ask what it was told."""
    (tmp_path / "packages").mkdir()
    (tmp_path / "packages" / "wandb.py").write_text(STUB)
    monkeypatch.delitem(sys.modules, "wandb", raising=False)
    monkeypatch.syspath_prepend(tmp_path / "packages")
    import wandb

    yield wandb
    sys.modules.pop("wandb", None)


def train_and_die(config, monkeypatch, *, after: int) -> None:
    """A run that ends in the middle, without a word to anyone."""
    plain, calls = loop.Run.one_step, []

    def one_step(run):
        plain(run)
        calls.append(1)
        if len(calls) == after:
            raise RuntimeError("killed")

    with monkeypatch.context() as patch, pytest.raises(RuntimeError, match="killed"):
        patch.setattr(loop.Run, "one_step", one_step)
        framework.train(config)


def test_tensorboard_holds_what_metrics_hold(make_config):
    config = make_config(logging__trackers=["tensorboard"], training__eval_every_steps=3)
    result = framework.train(config)
    curves, events = tensorboard_curves(result.run_dir / "tensorboard")
    assert_same_curves(curves, expected_curves(result.run_dir))
    assert {"train/loss", "train/model_flops", "eval/loss"} <= curves.keys()
    text = {tag: events.Tensors(tag) for tag in events.Tags()["tensors"]}
    assert sorted(text) == ["config/text_summary", "plan/text_summary"]
    (logged,) = text["config/text_summary"]
    assert json.loads(logged.tensor_proto.string_val[0]) == config.to_json()
    (plan,) = text["plan/text_summary"]
    assert json.loads(plan.tensor_proto.string_val[0])["gradient_accumulation"] == 2


def test_tensorboard_goes_on_where_the_checkpoint_is(make_config, monkeypatch):
    changes = {"logging__trackers": ["tensorboard"], "checkpoint__every_steps": 2, "training__eval_every_steps": 1}
    config = make_config(**changes)
    train_and_die(config, monkeypatch, after=5)
    before, _ = tensorboard_curves(Path(config.run.output_dir) / "tensorboard")
    assert [step for step, _ in before["train/loss"]] == [1, 2, 3, 4, 5]
    # Another rate from step 5 on: values of the first attempt would show.
    result = framework.train(make_config(**changes, optimizer__learning_rate=0.005))
    curves, events = tensorboard_curves(result.run_dir / "tensorboard")
    assert_same_curves(curves, expected_curves(result.run_dir))
    assert [step for step, _ in curves["train/loss"]] == [1, 2, 3, 4, 5, 6]
    assert curves["train/learning_rate"][4][1] == pytest.approx(0.005)
    assert len(events.Tensors("config/text_summary")) == 1


def test_starting_over_starts_new_curves(make_config, wandb):
    config = make_config(logging__trackers=["tensorboard", "wandb"], training__max_steps=2)
    framework.train(config)
    result = framework.train(config, resume="none")
    curves, _ = tensorboard_curves(result.run_dir / "tensorboard")
    assert [step for step, _ in curves["train/loss"]] == [1, 2]
    assert (result.run_dir / "previous-1" / "tensorboard").is_dir()
    first, second = (start["run"] for start in wandb.inits)
    assert first.id != second.id
    assert [step for step, _ in first.history] == [step for step, _ in second.history] == [1, 2, 2]


def wandb_curves(history) -> dict[str, list[tuple[int, float]]]:
    curves: dict[str, list[tuple[int, float]]] = {}
    for _, row in history:
        for name, value in row.items():
            if name != "step":
                curves.setdefault(name, []).append((row["step"], value))
    return curves


def test_wandb_is_told_what_metrics_hold(make_config, wandb):
    config = make_config(logging__trackers=["wandb"], logging__project="sums", training__eval_every_steps=2)
    result = framework.train(config)
    (start,) = wandb.inits
    run = start["run"]
    assert (start["project"], start["name"], start["id"]) == ("sums", "run", None)
    assert (start["resume"], start["dir"]) == ("allow", str(result.run_dir))
    assert start["config"]["config"] == config.to_json()
    assert start["config"]["plan"]["gradient_accumulation"] == 2
    assert wandb_curves(run.history) == expected_curves(result.run_dir)
    assert run.axes == [("step", None), ("*", "step")]
    assert run.finished == 0
    state = json.loads((result.run_dir / "wandb.json").read_text())
    assert state == {"id": run.id, "sent": {"train": 6, "eval": 6}}


def test_wandb_resumes_its_run_and_gets_no_step_twice(make_config, monkeypatch, wandb):
    changes = {"logging__trackers": ["wandb"], "logging__run_name": "first", "checkpoint__every_steps": 2}
    train_and_die(make_config(**changes), monkeypatch, after=5)
    result = framework.train(make_config(**changes))
    first, second = wandb.inits
    assert first["run"].finished == 1 and second["run"].finished == 0
    assert second["id"] == first["run"].id and second["config"] is None and second["name"] == "first"
    (history,) = wandb.server.values()
    curves = wandb_curves(history)
    assert [step for step, _ in curves["train/loss"]] == [1, 2, 3, 4, 5, 6]
    # Step 5 is that of the first attempt, which deterministic kernels repeat.
    assert curves["train/loss"] == expected_curves(result.run_dir)["train/loss"]
    assert [step for step, _ in curves["eval/loss"]] == [6]


def test_an_evaluation_owed_from_before_the_resume_is_sent(make_config, monkeypatch, wandb):
    config = make_config(logging__trackers=["wandb"])
    plain = evaluation.evaluation_loss

    def stop_here(*arguments):
        (Path(config.run.output_dir) / "STOP").touch()
        return plain(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(evaluation, "evaluation_loss", stop_here)
        assert framework.train(config).status == "stopped"
    framework.train(config)
    (history,) = wandb.server.values()
    curves = wandb_curves(history)
    assert [step for step, _ in curves["train/loss"]] == [1, 2, 3, 4, 5, 6]
    assert [step for step, _ in curves["eval/loss"]] == [6]


def test_a_tracker_that_fails_midway_is_left_out(make_config, wandb, capsys):
    wandb.fail_at.append(3)
    result = framework.train(make_config(logging__trackers=["wandb", "tensorboard"]))
    assert result.status == "completed"
    (history,) = wandb.server.values()
    assert [step for step, _ in history] == [1, 2]
    warnings = [line for line in capsys.readouterr().out.splitlines() if line.startswith("warning")]
    assert warnings == ["warning: wandb failed, the run goes on without it: ConnectionError: the service is gone"]
    curves, _ = tensorboard_curves(result.run_dir / "tensorboard")
    assert_same_curves(curves, expected_curves(result.run_dir))


def test_a_tracker_that_does_not_start_stops_a_beginning_and_not_a_resume(make_config, monkeypatch, wandb, capsys):
    def refuse(**_):
        raise ConnectionError("no API key configured")

    good = wandb.init
    monkeypatch.setattr(wandb, "init", refuse)
    with pytest.raises(UserError, match=r"logging\.trackers: wandb does not start: .*no API key.*WANDB_MODE=offline"):
        framework.train(make_config(logging__trackers=["wandb"]))
    wandb.init = good
    framework.train(make_config(logging__trackers=["wandb"], training__max_steps=2))
    wandb.init = refuse
    assert framework.train(make_config(logging__trackers=["wandb"], training__max_steps=4)).step == 4
    assert "warning: the run goes on without wandb, which does not start" in capsys.readouterr().out


def test_what_is_not_installed_is_said_before_anything_starts(make_config, monkeypatch, tmp_path):
    monkeypatch.setitem(tracking.PACKAGES, "tensorboard", "tensorboard_of_nobody")
    # W&B leaves a folder of its own name where it was used; that is not the package.
    (tmp_path / "wandb_of_nobody").mkdir()
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setitem(tracking.PACKAGES, "wandb", "wandb_of_nobody")
    message = (
        'logging.trackers: "tensorboard", "wandb" not installed here; pip install tensorboard_of_nobody wandb_of_n'
    )
    with pytest.raises(UserError, match=re.escape(message)):
        framework.train(make_config(logging__trackers=["tensorboard", "wandb"]))
    assert not (tmp_path / "run").exists()
    check_trackers([])


def test_only_the_first_rank_writes(make_config, monkeypatch):
    config = make_config(logging__trackers=["tensorboard"], training__max_steps=1)

    def of_the_second(config, directory, engine, ranks, *others, **options):
        return Insight(config, directory, engine, Ranks(Place(rank=1)), *others, **options)

    monkeypatch.setattr(start, "Insight", of_the_second)
    result = framework.train(config)
    assert not (result.run_dir / "tensorboard").exists()
    assert not (result.run_dir / "environment.json").exists()


def test_points_are_the_finite_numbers():
    record = TrainRecord(
        step=3,
        loss=math.nan,
        learning_rate=0.1,
        grad_norm=math.inf,
        tokens=10,
        supervised_tokens=4,
        selected_tokens=5,
        step_seconds=2.0,
        tokens_per_second=5.0,
        peak_memory_bytes=None,
        skipped=True,
    )
    assert curve_points(record) == {
        "train/learning_rate": 0.1,
        "train/tokens": 10,
        "train/supervised_tokens": 4,
        "train/selected_tokens": 5,
        "train/step_seconds": 2.0,
        "train/tokens_per_second": 5.0,
        "train/skipped": True,
    }
    assert curve_points(EvalRecord(3, 2.0, 77)) == {"eval/loss": 2.0, "eval/tokens": 77}


def test_a_failure_of_the_run_is_told_to_trackers(make_config, monkeypatch, wandb):
    monkeypatch.setattr(evaluation, "evaluation_loss", lambda *_: Evaluated(torch.tensor(math.nan), 1))
    with pytest.raises(RunError, match="evaluation loss is nan"):
        framework.train(make_config(logging__trackers=["wandb"]))
    assert wandb.inits[0]["run"].finished == 1
