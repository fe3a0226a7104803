"""Whole runs within this process."""

import json
import math
import random
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from task_runs import losses, records

import framework
from framework.data import Loader, load_dataset, load_tokenizer
from framework.errors import UserError
from framework.models import configured_model
from framework.selection import supervised_positions
from framework.sharding.ranks import Ranks
from framework.sharding.single import SingleEngine
from framework.training import evaluation, loop
from framework.training.objective import Objective, draw_selection
from framework.training.optimizer import optimizer_factory
from framework.training.setup import warm_up


def parts(config):
    """Model, objective and the first window of a config, without an engine."""
    tokenizer = load_tokenizer(config.model.tokenizer)
    data = load_dataset(config.data.train, tokenizer=tokenizer, sequence_length=32, format="completion")
    loader = Loader(
        data,
        sequence_length=32,
        packing=config.data.packing,
        global_batch_size=config.training.global_batch_size,
        micro_batch_size=config.training.micro_batch_size,
        seed=config.run.seed,
        pad_token_id=tokenizer.pad_token_id,
    )
    return configured_model(config), loader.next_window()


EXACT = {"selection__strategy": "none", "retention__policy": "all", "retention__retain_linears": False}
UNIFORM = {"selection__strategy": "uniform", "selection__ratio": 0.5}
SUFFIX = {"selection__strategy": "suffix", "selection__ratio": 0.4}


def test_the_files_of_a_run_and_a_falling_loss(make_config):
    config = make_config(training__eval_every_steps=3, checkpoint__every_steps=2, training__max_steps=6)
    result = framework.train(config)
    assert (result.status, result.step) == ("completed", 6)
    run_dir = result.run_dir
    assert sorted(path.name for path in run_dir.iterdir()) == [
        "COMPLETED",
        "checkpoints",
        "config.json",
        "environment.json",
        "metrics.jsonl",
        "plan.json",
    ]
    assert sorted(path.name for path in (run_dir / "checkpoints").iterdir()) == [
        "latest",
        "step-00000004",
        "step-00000006",
    ]
    assert result.checkpoint == run_dir / "checkpoints" / "step-00000006"
    assert json.loads((run_dir / "config.json").read_text()) == config.to_json()
    train, evaluations = records(run_dir, "train"), records(run_dir, "eval")
    assert [record["step"] for record in train] == [1, 2, 3, 4, 5, 6]
    assert [record["step"] for record in evaluations] == [3, 6]
    assert train[0]["loss"] == pytest.approx(math.log(106), rel=0.02)
    assert train[-1]["loss"] < train[0]["loss"] - 0.2
    assert evaluations[1]["loss"] < evaluations[0]["loss"]
    assert result.eval_loss == evaluations[1]["loss"]
    assert train[0]["predicted_peak_memory_bytes"] is None and train[0]["peak_memory_bytes"] is None
    marker = json.loads((run_dir / "COMPLETED").read_text())
    assert (marker["code"], marker["rank"]) == (0, 0) and marker["last_lines"]
    plan = json.loads((run_dir / "plan.json").read_text())
    assert plan["fits"] is None and plan["chosen"]["gradient_accumulation"] == 2


def test_the_first_losses_are_those_of_a_plain_loop(make_config):
    config = make_config(**EXACT, training__max_steps=3)
    result = framework.train(config)
    model, _ = parts(config)
    tokenizer = load_tokenizer(config.model.tokenizer)
    data = load_dataset(config.data.train, tokenizer=tokenizer, sequence_length=32, format="completion")
    loader = Loader(
        data, sequence_length=32, packing=False, global_batch_size=8, micro_batch_size=8, seed=3, pad_token_id=0
    )
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01, betas=(0.9, 0.95), weight_decay=0.0)
    expected, norms = [], []
    for _ in range(3):
        (batch,) = loader.next_window()
        loss = model(**batch.inputs).loss
        loss.backward()
        norms.append(torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0).item())
        optimizer.step()
        optimizer.zero_grad()
        expected.append(loss.item())
    assert losses(result) == pytest.approx(expected, rel=1e-5)
    assert [record["grad_norm"] for record in records(result.run_dir, "train")] == pytest.approx(norms, rel=1e-4)


@pytest.mark.parametrize(
    "changes",
    [
        EXACT,
        {},
        UNIFORM,
        UNIFORM | {"selection__normalization": "selected"},
        {"selection__strategy": "bernoulli", "selection__ratio": 0.4},
        SUFFIX,
        {"data__packing": True},
    ],
    ids=["exact", "supervised", "uniform", "selected", "bernoulli", "suffix", "packing"],
)
def test_loss_and_gradients_do_not_depend_on_the_split(make_config, changes):
    outcomes = []
    for micro in (8, 4, 2, 1):
        config = make_config(training__micro_batch_size=micro, **changes)
        model, window = parts(config)
        objective = Objective(model, config, torch.device("cpu"))
        engine = SingleEngine("fp32", torch.device("cpu"))
        engine.prepare(model, optimizer_factory(config))
        gradients = {}

        def keep(*, loss, max_grad_norm, learning_rate, engine=engine, gradients=gradients):
            gradients |= {name: p.grad.clone() for name, p in engine.model.named_parameters()}
            return type(engine).step(engine, loss=loss, max_grad_norm=max_grad_norm, learning_rate=learning_rate)

        engine.step = keep
        result, selected = loop.train_window(engine, Ranks(), objective, window, 0.01, None)
        outcomes.append((result.loss, selected, gradients))
    loss, selected, gradients = outcomes[0]
    assert any(gradient.abs().max() > 1e-3 for gradient in gradients.values())
    for other_loss, other_selected, other in outcomes[1:]:
        assert other_loss == pytest.approx(loss, rel=1e-6)
        assert other_selected == selected
        for name, gradient in gradients.items():
            torch.testing.assert_close(other[name], gradient, rtol=1e-4, atol=1e-6 * gradient.abs().max().item())


def test_counts_in_the_metrics(make_config):
    config = make_config(**UNIFORM, training__max_steps=1)
    record = records(framework.train(config).run_dir, "train")[0]
    _, window = parts(config)
    assert record["tokens"] == sum(int(batch.inputs["attention_mask"].sum()) for batch in window)
    supervised = [supervised_positions(batch.inputs["labels"], causal=True) for batch in window]
    assert record["supervised_tokens"] == sum(int(mask.sum()) for mask in supervised)
    assert record["selected_tokens"] == sum(draw_selection(config, batch).selected_tokens for batch in window)
    lengths = torch.cat([batch.inputs["attention_mask"].sum(1) for batch in window])
    assert record["selected_tokens"] == sum(round(length / 2) for length in lengths.tolist())


@pytest.mark.parametrize("selection", [UNIFORM | {"selection__normalization": "selected"}, SUFFIX])
def test_the_mean_over_selected_supervised_tokens(make_config, selection):
    config = make_config(**selection, training__max_steps=1)
    loss = losses(framework.train(config))[0]
    model, window = parts(config)
    chosen = []
    for batch in window:
        labels = batch.inputs["labels"]
        with torch.no_grad():
            logits = model(**{key: value for key, value in batch.inputs.items() if key != "labels"}).logits
        each = torch.nn.functional.cross_entropy(logits[:, :-1].transpose(1, 2), labels[:, 1:], reduction="none")
        mask = draw_selection(config, batch).mask(labels.shape[1]) & supervised_positions(labels, causal=True)
        chosen.append(each[mask[:, :-1]])
    assert loss == pytest.approx(torch.cat(chosen).mean().item(), rel=1e-5)


def test_selecting_everything_equals_exact_training(make_config, settings):
    exact = losses(framework.train(make_config(**EXACT)))
    changes = {"selection__strategy": "none", "retention__policy": "selective", "retention__retain_linears": True}
    settings["run"]["output_dir"] += "-selective"
    selective = losses(framework.train(make_config(**changes)))
    settings["run"]["output_dir"] += "-checkpoint"
    checkpoint = losses(framework.train(make_config(**EXACT | {"retention__policy": "checkpoint"})))
    assert selective == pytest.approx(exact, rel=1e-5)
    assert checkpoint == pytest.approx(exact, rel=1e-5)


# Largest difference of a step's loss to fp32 over 6 steps; the loss starts at 4.7 and falls to some 3.9.
@pytest.mark.parametrize(("precision", "tolerance"), [("fp32_master", 0.02), ("fp16", 0.005), ("pure_bf16", 0.06)])
@pytest.mark.parametrize("policy", ["all", "selective"])
def test_every_precision_stays_close_to_fp32(make_config, settings, precision, tolerance, policy):
    changes = EXACT if policy == "all" else {}
    reference = losses(framework.train(make_config(**changes)))
    settings["run"]["output_dir"] += precision
    lower = losses(framework.train(make_config(optimizer__precision=precision)))
    assert lower[-1] < lower[0] - 0.2
    assert max(abs(a - b) for a, b in zip(lower, reference, strict=True)) < tolerance


@pytest.mark.parametrize("changes", [{}, {"data__packing": True}, {"optimizer__precision": "pure_bf16"}])
@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_resumed_losses_are_equal_to_the_bit(make_config, settings, changes, dropout):
    adapter = {"kind": "lora", "rank": 2, "alpha": 4.0, "dropout": dropout}
    changes = changes | {"checkpoint__every_steps": 2} | ({"model__adapter": adapter} if dropout else {})
    whole = framework.train(make_config(**changes))
    settings["run"]["output_dir"] += "-again"
    framework.train(make_config(**changes | {"training__max_steps": 4}))
    torch.manual_seed(99), random.seed(99), np.random.seed(99)
    resumed = framework.train(make_config(**changes | {"training__max_steps": 6}))
    assert losses(resumed) == losses(whole)
    assert resumed.eval_loss == whole.eval_loss
    assert [record["step"] for record in records(resumed.run_dir, "eval")] == [4, 6]


def test_a_completed_run_trains_no_further(make_config):
    config = make_config()
    framework.train(config)
    before = (Path(config.run.output_dir) / "metrics.jsonl").read_text()
    again = framework.train(config)
    assert (again.status, again.step, again.train_loss) == ("completed", 6, None)
    assert again.eval_loss is not None
    assert (again.run_dir / "metrics.jsonl").read_text() == before
    assert (again.run_dir / "COMPLETED").exists()


def test_starting_over_moves_the_former_run_aside(make_config):
    config = make_config()
    first = losses(framework.train(config))
    result = framework.train(config, resume="none")
    assert losses(result) == first
    assert (result.run_dir / "previous-1" / "checkpoints" / "step-00000006" / "manifest.json").exists()


def test_a_checkpoint_of_another_run_can_be_continued(make_config, settings):
    first = framework.train(make_config(checkpoint__every_steps=2, training__max_steps=4))
    settings["run"]["output_dir"] += "-branch"
    branch = framework.train(make_config(training__max_steps=6), resume=str(first.checkpoint))
    assert [record["step"] for record in records(branch.run_dir, "train")] == [5, 6]
    assert branch.checkpoint == branch.run_dir / "checkpoints" / "step-00000006"


@pytest.mark.parametrize("given", ["run", "checkpoint"])
def test_a_shorter_run_survives_when_another_runs_checkpoint_is_continued_in_its_place(make_config, settings, given):
    longer = framework.train(make_config(checkpoint__every_steps=2, training__max_steps=4))
    settings["run"]["output_dir"] += "-shorter"
    changes = {"training__max_steps": 3, "logging__trackers": ["tensorboard"], "checkpoint__keep_last": 1}
    own = framework.train(make_config(**changes))
    metrics = (own.run_dir / "metrics.jsonl").read_bytes()
    files = {path.name for path in (own.run_dir / "tensorboard").rglob("events*")}
    source = longer.run_dir if given == "run" else longer.checkpoint
    branch = framework.train(make_config(training__max_steps=6), resume=str(source))
    assert [record["step"] for record in records(branch.run_dir, "train")] == [5, 6]
    assert [path.name for path in (branch.run_dir / "checkpoints").glob("step-*")] == ["step-00000006"]
    former = branch.run_dir / "previous-1"
    assert (former / "metrics.jsonl").read_bytes() == metrics
    assert (former / "checkpoints" / "step-00000003" / "manifest.json").exists()
    assert files and {path.name for path in (former / "tensorboard").rglob("events*")} == files
    assert not files & {path.name for path in (branch.run_dir / "tensorboard").rglob("events*")}
    assert sorted(path.name for path in (longer.run_dir / "checkpoints").glob("step-*"))[-1] == "step-00000004"


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"optimizer__precision": "fp32_master"}, r"optimizer\.precision"),
        ({"data__sequence_length": 24}, r"data\.sequence_length"),
        ({"model__adapter": {"kind": "lora", "rank": 2, "alpha": 4.0}}, r"model\.adapter"),
    ],
)
def test_a_checkpoint_of_another_kind_of_run_is_refused(make_config, changes, named):
    result = framework.train(make_config(training__max_steps=2))
    with pytest.raises(UserError, match=named):
        framework.train(make_config(training__max_steps=4, **changes))
    assert json.loads((result.run_dir / "FAILED").read_text())["code"] == 2
    assert result.checkpoint.is_dir()


def test_changed_samples_are_refused_and_renamed_files_are_not(make_config, settings):
    framework.train(make_config(training__max_steps=2))
    train = Path(settings["data"]["train"])
    renamed = train.with_name("renamed.jsonl")
    renamed.write_text(train.read_text())
    framework.train(make_config(training__max_steps=3, data__train=str(renamed)))
    renamed.write_text(renamed.read_text().replace("1", "2"))
    with pytest.raises(UserError, match=r"data\.train"):
        framework.train(make_config(training__max_steps=4))


def test_another_learning_rate_is_a_warning(make_config, capsys):
    framework.train(make_config(training__max_steps=2))
    framework.train(make_config(training__max_steps=4, optimizer__learning_rate=0.005))
    assert "warning: resuming with another setting: optimizer.learning_rate: 0.01 -> 0.005" in capsys.readouterr().out


def test_tracked_bytes_of_the_cpu(make_config):
    result = framework.train(make_config(logging__track_cpu_memory=True, training__max_steps=3))
    peaks = [record["peak_memory_bytes"] for record in records(result.run_dir, "train")]
    parameters = sum(p.numel() for p in parts(make_config())[0].parameters())
    # Weights and two moments stay between steps; gradients and activations come on top.
    assert all(peak > 4 * 4 * parameters for peak in peaks[1:])


def test_several_processes_are_refused(make_config, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UserError, match=r"sharding\.engine.*2 \(WORLD_SIZE\)"):
        framework.train(make_config())


def test_a_stop_during_the_last_evaluation_is_made_good_on_resume(make_config, monkeypatch):
    config = make_config()
    directory = Path(config.run.output_dir)
    plain = evaluation.evaluation_loss

    def stop_here(*arguments):
        (directory / "STOP").touch()
        return plain(*arguments)

    monkeypatch.setattr(evaluation, "evaluation_loss", stop_here)
    stopped = framework.train(config)
    assert (stopped.status, stopped.step, stopped.eval_loss) == ("stopped", 6, None)
    assert (directory / "STOPPED").exists() and records(directory, "eval") == []
    monkeypatch.undo()
    resumed = framework.train(config)
    assert (resumed.status, resumed.step) == ("completed", 6)
    assert [record["step"] for record in records(directory, "eval")] == [6]


def test_the_warm_up_leaves_no_trace(make_config):
    config = make_config(model__adapter={"kind": "lora", "rank": 2, "alpha": 4.0, "dropout": 0.5})
    model, window = parts(config)
    objective = Objective(model, config, torch.device("cpu"))
    engine = SingleEngine("fp32", torch.device("cpu"))
    engine.prepare(model, optimizer_factory(config))
    backwards = []
    engine.backward = lambda loss: (backwards.append(loss), type(engine).backward(engine, loss))
    state = torch.get_rng_state()
    warm_up(engine, Ranks(), objective, window[0])
    assert len(backwards) == 1 and math.isfinite(backwards[0].item())
    assert torch.equal(torch.get_rng_state(), state)
    assert all(p.grad is None for p in model.parameters()) and not engine.optimizer.state


def test_groups_of_parameters_have_their_own_rate_and_are_counted(make_config, settings, capsys):
    adapter = {"kind": "lora", "rank": 2, "alpha": 4.0, "target_modules": ["q_proj", "v_proj"]}
    groups = [{"pattern": "lora_B", "learning_rate_scale": 1e-6}]
    result = framework.train(make_config(model__adapter=adapter, optimizer__groups=groups))
    # Two blocks, rank 2: q has 8 outputs and v 4; both have 8 inputs.
    assert 'optimizer: "lora_B": 48 parameters, learning rate 1e-08, weight decay 0' in capsys.readouterr().out
    weights = load_file(result.checkpoint / "model.safetensors")
    largest = {kind: max(w.abs().max() for name, w in weights.items() if kind in name) for kind in ("lora_A", "lora_B")}
    # B starts at zero; six AdamW steps move a weight by the learning rate each, at most.
    assert 0 < largest["lora_B"] <= 6.1e-8
    assert largest["lora_A"] > 0.01


def test_a_group_that_matches_nothing_is_refused_before_anything_is_written(make_config):
    config = make_config(optimizer__groups=[{"pattern": "lora_B", "weight_decay": 0.0}])
    with pytest.raises(UserError, match=r'optimizer\.groups: "lora_B" matches no parameter'):
        framework.train(config)
    assert not Path(config.run.output_dir).exists()


def test_other_groups_are_a_warning_on_resume(make_config, capsys):
    framework.train(make_config(training__max_steps=2))
    framework.train(make_config(training__max_steps=3, optimizer__groups=[{"pattern": "norm", "weight_decay": 0.1}]))
    assert "warning: resuming with another setting: optimizer.groups: [] -> [{" in capsys.readouterr().out


def test_groups_resume_to_the_bit(make_config, settings):
    changes = {
        "optimizer__groups": [{"pattern": "embed", "learning_rate": 0.002}, {"pattern": "norm", "weight_decay": 0.1}],
        "optimizer__weight_decay": 0.05,
    }
    whole = framework.train(make_config(**changes))
    settings["run"]["output_dir"] += "-again"
    framework.train(make_config(**changes | {"training__max_steps": 3}))
    resumed = framework.train(make_config(training__max_steps=6))
    assert losses(resumed) == losses(whole)
