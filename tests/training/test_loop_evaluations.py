"""What a run makes of its evaluations: early stopping, best checkpoints, and that neither forgets on resume."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import framework
from framework.checkpoint import CheckpointSaver, export_run, find_best
from framework.errors import RunError
from framework.training import evaluation, loop
from framework.training.metrics import EvalRecord

LOSSES = {1: 3.0, 2: 2.0, 3: 2.5, 4: 2.2, 5: 1.0, 6: 2.9}


def records(run_dir: Path, kind: str) -> list[dict]:
    lines = (run_dir / "metrics.jsonl").read_text().splitlines()
    return [record for record in map(json.loads, lines) if record["kind"] == kind]


def train_losses(run_dir: Path) -> list[float]:
    return [record["loss"] for record in records(run_dir, "train")]


def steps(run_dir: Path) -> list[int]:
    return sorted(int(path.name.removeprefix("step-")) for path in (run_dir / "checkpoints").glob("step-*"))


def pointer(run_dir: Path, name: str) -> int:
    return int((run_dir / "checkpoints" / name).read_text().strip().removeprefix("step-"))


@pytest.fixture
def scripted(monkeypatch):
    """Evaluations with losses that are set beforehand, by step, in place of the model's."""

    def evaluate(engine, ranks, batches, *, step, interrupted):
        return None if interrupted() else EvalRecord(step, LOSSES[step], 7)

    monkeypatch.setattr(loop, "evaluate", evaluate)


EVERY = {"training__eval_every_steps": 1}
STOPPING = EVERY | {"training__early_stopping": {"patience": 2}}


def test_a_run_ends_early_and_says_why(make_config, scripted):
    result = framework.train(make_config(**STOPPING))
    assert (result.status, result.step, result.eval_loss) == ("completed", 4, 2.2)
    assert result.reason.startswith(
        "the evaluation loss was best at step 2, 2, and did not improve in the 2 evaluations"
    )
    marker = json.loads((result.run_dir / "COMPLETED").read_text())
    assert marker["message"] == f"completed 4 steps: {result.reason}"
    assert marker["last_lines"][-1] == (f"done after step 4; reason: {result.reason}; checkpoint: {result.checkpoint}")
    assert pointer(result.run_dir, "latest") == 4
    assert len(train_losses(result.run_dir)) == 4


def test_an_early_end_stays_an_end_until_the_patience_grows(make_config, scripted, capsys):
    first = framework.train(make_config(**STOPPING))
    before = (first.run_dir / "metrics.jsonl").read_text()
    again = framework.train(make_config(training__max_steps=7))
    assert (again.status, again.step, again.train_loss, again.reason) == ("completed", 4, None, first.reason)
    assert (first.run_dir / "metrics.jsonl").read_text() == before
    assert f"nothing left to train: the checkpoint is of step 4 of 7: {first.reason}" in capsys.readouterr().out
    patient = framework.train(make_config(training__max_steps=6, training__early_stopping={"patience": 3}))
    assert (patient.status, patient.step, patient.reason) == ("completed", 6, None)
    assert json.loads((first.run_dir / "COMPLETED").read_text())["message"] == "completed 6 steps"


@pytest.mark.parametrize("stop_at", [1, 2, 3, 4])
def test_stopped_and_resumed_it_ends_early_at_the_same_step(make_config, settings, scripted, monkeypatch, stop_at):
    whole = framework.train(make_config(**STOPPING))
    settings["run"]["output_dir"] += "-again"
    directory = Path(settings["run"]["output_dir"])
    plain = loop.evaluate

    def stop_here(engine, ranks, batches, *, step, interrupted):
        if step == stop_at:
            (directory / "STOP").touch()
        return plain(engine, ranks, batches, step=step, interrupted=interrupted)

    monkeypatch.setattr(loop, "evaluate", stop_here)
    stopped = framework.train(make_config(**STOPPING))
    assert (stopped.status, stopped.step) == ("stopped", stop_at)
    assert [record["step"] for record in records(directory, "eval")] == list(range(1, stop_at))
    monkeypatch.setattr(loop, "evaluate", plain)
    resumed = framework.train(make_config(**STOPPING))
    assert (resumed.status, resumed.step, resumed.reason) == ("completed", 4, whole.reason)
    assert records(directory, "eval") == records(whole.run_dir, "eval")
    assert train_losses(directory) == train_losses(whole.run_dir)


def test_an_evaluation_at_the_last_step_counts_only_where_a_longer_run_has_it(make_config, settings, scripted):
    changes = {"training__eval_every_steps": 2, "training__early_stopping": {"patience": 2}}
    whole = framework.train(make_config(**changes))
    settings["run"]["output_dir"] += "-again"
    for last in (3, 5, 6):
        resumed = framework.train(make_config(**changes | {"training__max_steps": last}))
    assert (resumed.step, resumed.reason) == (whole.step, whole.reason) == (6, None)


@pytest.mark.parametrize(("keep_best", "kept"), [(1, [5, 6]), (2, [2, 5, 6]), (3, [2, 4, 5, 6])])
def test_the_best_checkpoints_are_saved_when_they_are_evaluated(make_config, scripted, keep_best, kept):
    result = framework.train(make_config(**EVERY, checkpoint__keep_best=keep_best, checkpoint__keep_last=1))
    assert steps(result.run_dir) == kept
    assert (pointer(result.run_dir, "latest"), pointer(result.run_dir, "best")) == (6, 5)
    assert result.best_checkpoint == result.run_dir / "checkpoints" / "step-00000005"
    manifests = [
        json.loads((result.run_dir / "checkpoints" / f"step-{step:08d}" / "manifest.json").read_text()) for step in kept
    ]
    assert [manifest["evaluation"] for manifest in manifests] == [{"loss": LOSSES[step], "tokens": 7} for step in kept]


def test_no_step_is_saved_for_an_evaluation_that_is_not_among_the_best(make_config, scripted, monkeypatch):
    saved = []
    plain = CheckpointSaver.save
    monkeypatch.setattr(
        CheckpointSaver,
        "save",
        lambda saver, step, **options: (saved.append(step), plain(saver, step, **options))[1],
    )
    framework.train(make_config(**EVERY, checkpoint__keep_best=1))
    assert saved == [1, 2, 5, 6]


def test_the_best_survives_a_resume_and_later_ones_are_set_aside(make_config, scripted):
    changes = EVERY | {"checkpoint__keep_best": 1, "checkpoint__keep_last": 1, "checkpoint__every_steps": 4}
    run_dir = framework.train(make_config(**changes, training__max_steps=4)).run_dir
    assert (steps(run_dir), pointer(run_dir, "best")) == ([2, 4], 2)
    framework.train(make_config(training__max_steps=5))
    assert (steps(run_dir), pointer(run_dir, "best")) == ([5], 5)
    branch = framework.train(make_config(training__max_steps=6, checkpoint__keep_last=9))
    assert (steps(run_dir), pointer(run_dir, "best")) == ([5, 6], 5)
    # Step 6 is set aside; what is left says what is best, before anything is saved.
    (run_dir / "checkpoints" / "best").unlink()
    again = framework.train(make_config(training__max_steps=5), resume=str(run_dir / "checkpoints" / "step-00000005"))
    assert branch.step == 6 and again.step == 5
    assert (steps(run_dir), pointer(run_dir, "best"), pointer(run_dir, "latest")) == ([5], 5, 5)
    assert steps(run_dir / "previous-1") == [6]


def test_going_back_before_the_best_makes_the_former_one_the_best_again(make_config, scripted):
    config = make_config(**EVERY, checkpoint__keep_best=2, checkpoint__keep_last=9, checkpoint__every_steps=1)
    run_dir = framework.train(config).run_dir
    assert pointer(run_dir, "best") == 5
    earlier = run_dir / "checkpoints" / "step-00000003"
    result = framework.train(make_config(training__max_steps=4), resume=str(earlier))
    assert (result.step, pointer(run_dir, "best")) == (4, 2)
    assert steps(run_dir) == [1, 2, 3, 4] and steps(run_dir / "previous-1") == [4, 5, 6]


def test_the_best_is_exported(make_config, scripted, tmp_path):
    config = make_config(**EVERY, checkpoint__keep_best=1, checkpoint__keep_last=1)
    run_dir = framework.train(config).run_dir
    assert find_best(run_dir, "loss").step == 5
    for step, name in (("best", "step-00000005"), (None, "step-00000006")):
        export_run(run_dir, step=step, output=tmp_path / name)
        exported = load_file(tmp_path / name / "model.safetensors")
        saved = load_file(run_dir / "checkpoints" / name / "model.safetensors")
        assert exported.keys() == saved.keys()
        assert all(torch.equal(exported[key], value) for key, value in saved.items())


def test_an_evaluation_before_training_is_a_record_and_no_more(make_config, scripted, monkeypatch):
    monkeypatch.setitem(LOSSES, 0, 0.5)
    changes = STOPPING | {"training__eval_before_training": True, "checkpoint__keep_best": 1}
    result = framework.train(make_config(**changes))
    assert [(record["step"], record["loss"]) for record in records(result.run_dir, "eval")][:2] == [(0, 0.5), (1, 3.0)]
    assert (result.step, pointer(result.run_dir, "best")) == (4, 2)


def test_an_evaluation_before_training_changes_no_bit(make_config, settings):
    changes = {"model__adapter": {"kind": "lora", "rank": 2, "alpha": 4.0, "dropout": 0.2}}
    plain = framework.train(make_config(**changes))
    settings["run"]["output_dir"] += "-evaluated"
    evaluated = framework.train(make_config(**changes, training__eval_before_training=True))
    assert train_losses(evaluated.run_dir) == train_losses(plain.run_dir)
    assert [record["step"] for record in records(evaluated.run_dir, "eval")] == [0, 6]


def test_an_evaluation_that_is_not_finite_stops_the_run_or_is_never_the_best(make_config, scripted, monkeypatch):
    monkeypatch.setitem(LOSSES, 2, float("nan"))
    config = make_config(**EVERY, checkpoint__keep_best=1)
    with pytest.raises(
        RunError, match=r"step 2: the evaluation loss is nan; .*the newest checkpoint is .*step-00000001"
    ):
        framework.train(config)
    result = framework.train(make_config(training__non_finite="skip"))
    assert pointer(result.run_dir, "best") == 5
    assert [record["loss"] for record in records(result.run_dir, "eval")] == [3.0, None, 2.5, 2.2, 1.0, 2.9]


def test_the_model_evaluates_as_in_evaluation_mode_and_trains_on(make_config, monkeypatch):
    seen = []
    plain = evaluation.evaluation_loss
    monkeypatch.setattr(
        evaluation, "evaluation_loss", lambda model, inputs: (seen.append(model.training), plain(model, inputs))[1]
    )
    training = []
    window = loop.train_window
    monkeypatch.setattr(
        loop, "train_window", lambda engine, *rest: (training.append(engine.model.training), window(engine, *rest))[1]
    )
    framework.train(make_config(training__eval_every_steps=3))
    assert seen and not any(seen)
    assert training == [True] * 6
