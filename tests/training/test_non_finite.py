"""Steps that are not finite, and the loss scale of float16, in whole runs."""

import json
import math
import re
from pathlib import Path

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import framework
from framework.data import load_dataset, load_tokenizer
from framework.errors import RunError
from framework.training import loop
from framework.training.setup import make_loaders


def train_records(run_dir: Path) -> list[dict]:
    lines = (run_dir / "metrics.jsonl").read_text().splitlines()
    return [record for record in map(json.loads, lines) if record["kind"] == "train"]


def drawn_samples(config, step: int) -> list[int]:
    """The samples of a step, drawn again."""
    tokenizer = load_tokenizer(config.model.tokenizer)
    data = load_dataset(config.data.train, tokenizer=tokenizer, sequence_length=32, format="completion")
    loader, _ = make_loaders(config, data, tokenizer.pad_token_id)
    window = [loader.next_window() for _ in range(step)][-1]
    draws = torch.cat([batch.documents.flatten() for batch in window]).unique()
    return sorted(int(draw) % len(data) for draw in draws if draw >= 0)


def poison(monkeypatch, *steps: int):
    """Make the losses of some calls NaN, counted from 1."""
    plain, calls = loop.train_window, []

    def train_window(engine, ranks, objective, window, rate, max_grad_norm):
        calls.append(rate)
        if len(calls) in steps:
            unpoisoned = objective.loss
            monkeypatch.setattr(objective, "loss", lambda *arguments: unpoisoned(*arguments) * math.nan)
            try:
                return plain(engine, ranks, objective, window, rate, max_grad_norm)
            finally:
                monkeypatch.setattr(objective, "loss", unpoisoned)
        return plain(engine, ranks, objective, window, rate, max_grad_norm)

    monkeypatch.setattr(loop, "train_window", train_window)


def test_a_non_finite_loss_stops_the_run(make_config, monkeypatch):
    poison(monkeypatch, 5)
    config = make_config(checkpoint__every_steps=2)
    with pytest.raises(
        RunError, match=r"step 5.*nan.*samples of data\.train.*the newest checkpoint is .*step-00000004; lower"
    ):
        framework.train(config)
    run_dir = Path(config.run.output_dir)
    marker = json.loads((run_dir / "FAILED").read_text())
    assert marker["code"] == 1 and "step 5" in marker["message"]
    assert [(record["step"], record.get("skipped", False)) for record in train_records(run_dir)[-2:]] == [
        (4, False),
        (5, True),
    ]
    assert not (run_dir / "COMPLETED").exists()
    monkeypatch.undo()
    assert framework.train(config).status == "completed"
    assert not (run_dir / "FAILED").exists()


def test_a_non_finite_loss_can_be_skipped(make_config, monkeypatch):
    poison(monkeypatch, 3)
    result = framework.train(make_config(training__non_finite="skip"))
    train = train_records(result.run_dir)
    assert [record.get("skipped", False) for record in train] == [False, False, True, False, False, False]
    assert train[2]["loss"] is None
    assert all(math.isfinite(record["loss"]) for record in train[3:])
    assert [record.get("skipped_steps", 0) for record in train] == [0, 0, 1, 1, 1, 1]


def test_a_skipped_step_names_its_samples_and_is_recorded_between_the_lines(make_config, monkeypatch, capsys):
    poison(monkeypatch, 3)
    config = make_config(training__non_finite="skip", logging__every_steps=4)
    result = framework.train(config)
    assert [record["step"] for record in train_records(result.run_dir)] == [3, 4, 6]
    output = capsys.readouterr().out
    (listed,) = re.findall(r"warning: skipped step 3: the loss is nan .* counted from 0: ([\d, ]+) of ", output)
    assert sorted(map(int, listed.split(", "))) == drawn_samples(config, 3)
    assert "done after step 6; skipped steps: 1; checkpoint" in output


@pytest.mark.parametrize("precision", ["fp32", "pure_bf16"])
def test_a_skipped_step_changes_no_bit_of_weights_and_optimizer_nor_the_rates_of_others(
    make_config, monkeypatch, precision
):
    poison(monkeypatch, 3)
    config = make_config(
        training__non_finite="skip",
        optimizer__precision=precision,
        schedule__kind="linear",
        checkpoint__every_steps=1,
        checkpoint__keep_last=9,
    )
    result = framework.train(config)
    assert [record["learning_rate"] for record in train_records(result.run_dir)] == pytest.approx(
        [0.01 * (6 - step) / 5 for step in range(1, 7)]
    )
    for name in ("model.safetensors", "optimizer.safetensors"):
        files = [(result.run_dir / "checkpoints" / f"step-{step:08d}" / name).read_bytes() for step in (2, 3, 4)]
        assert files[0] == files[1] != files[2]


def test_a_diverged_run_stops_after_so_many_skipped_steps(make_config, monkeypatch):
    poison(monkeypatch, 2, 4, 5, 6)
    config = make_config(
        training__non_finite="skip", training__max_skipped_steps=3, training__max_steps=8, checkpoint__every_steps=3
    )
    with pytest.raises(
        RunError, match=r"step 6: .* last of 3 such steps in a row .*the newest checkpoint is .*step-00000003; lower"
    ):
        framework.train(config)
    run_dir = Path(config.run.output_dir)
    assert [record["step"] for record in train_records(run_dir)] == [1, 2, 3, 4, 5, 6]
    assert (run_dir / "FAILED").exists()


def test_the_step_that_ends_a_run_is_recorded_between_the_lines_and_by_the_trackers(make_config, monkeypatch):
    poison(monkeypatch, 3)
    config = make_config(logging__every_steps=4, logging__trackers=["tensorboard"])
    with pytest.raises(RunError, match="step 3"):
        framework.train(config)
    run_dir = Path(config.run.output_dir)
    assert [record["step"] for record in train_records(run_dir)] == [3]
    events = EventAccumulator(str(run_dir / "tensorboard")).Reload()
    assert [event.step for event in events.Scalars("train/tokens")] == [3]


def test_a_resumed_run_counts_the_skipped_steps_in_a_row_anew_and_says_when_its_checkpoint_is_of(
    make_config, monkeypatch
):
    poison(monkeypatch, 3, 4, 5, 6, 7)
    changes = {"training__non_finite": "skip", "training__max_skipped_steps": 3, "checkpoint__every_steps": 2}
    framework.train(make_config(**changes, training__max_steps=4))
    skipping = r"step-00000006 \(saved while steps were being skipped\)"
    with pytest.raises(RunError, match=rf"step 7: .* last of 3 such steps .*the newest checkpoint is .*{skipping}"):
        framework.train(make_config(training__max_steps=8))
    assert train_records(Path(make_config().run.output_dir))[-1]["skipped_steps"] == 5
    poison(monkeypatch, 1, 2, 3)
    with pytest.raises(RunError, match=rf"step 9: .*{skipping.replace('6', '8')}"):
        framework.train(make_config(training__max_steps=12))


def test_skipping_resumes_to_the_bit(make_config, settings, monkeypatch):
    changes = {"training__non_finite": "skip", "checkpoint__every_steps": 1}
    poison(monkeypatch, 3)
    whole = framework.train(make_config(**changes))
    monkeypatch.undo()
    settings["run"]["output_dir"] += "-again"
    poison(monkeypatch, 3)
    framework.train(make_config(**changes | {"training__max_steps": 3}))
    resumed = framework.train(make_config(**changes | {"training__max_steps": 6}))
    assert [r["loss"] for r in train_records(resumed.run_dir)] == [r["loss"] for r in train_records(whole.run_dir)]
    assert train_records(resumed.run_dir)[-1]["skipped_steps"] == 1


FP16 = {"optimizer__precision": "fp16", "optimizer__loss_scale": {"initial": 4.0, "growth_interval": 2}}


def test_the_loss_scale_is_recorded_and_resumed_to_the_bit(make_config, settings):
    whole = framework.train(make_config(**FP16))
    assert [record["loss_scale"] for record in train_records(whole.run_dir)] == [4.0, 4.0, 8.0, 8.0, 16.0, 16.0]
    settings["run"]["output_dir"] += "-again"
    framework.train(make_config(**FP16, training__max_steps=3))
    resumed = framework.train(make_config(training__max_steps=6))
    for key in ("loss_scale", "loss", "grad_norm"):
        assert [r[key] for r in train_records(resumed.run_dir)] == [r[key] for r in train_records(whole.run_dir)]


def overflow(monkeypatch):
    """Make every gradient overflow, the loss being finite."""
    plain = loop.train_window

    def train_window(engine, *arguments):
        for parameter in engine.model.parameters():
            parameter.register_hook(lambda gradient: gradient * math.inf)
        return plain(engine, *arguments)

    monkeypatch.setattr(loop, "train_window", train_window)


def test_a_persistent_overflow_stops_the_run_at_the_smallest_scale(make_config, monkeypatch):
    overflow(monkeypatch)
    config = make_config(**FP16)
    with pytest.raises(RunError, match=r"step 3: .* at a loss scale of 1, which falls no lower \(optim"):
        framework.train(config)
    records = train_records(Path(config.run.output_dir))
    assert [(record["loss_scale"], record["skipped_steps"]) for record in records] == [(4.0, 1), (2.0, 2), (1.0, 3)]


def test_an_overflow_that_the_scale_answers_is_not_one_of_the_bounded_steps(make_config, monkeypatch):
    overflow(monkeypatch)
    changes = {"training__non_finite": "skip", "training__max_skipped_steps": 2}
    with pytest.raises(RunError, match=r"step 4: .* last of 2 such steps in a row"):
        framework.train(make_config(**FP16, **changes))
