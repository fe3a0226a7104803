"""The quality benchmark's bookkeeping: what is trained on what, for how long, and what is reported."""

from __future__ import annotations

import argparse
import json
import shutil

import numpy as np
import pytest
import quality_data
import torch
from bench_quality import main, parse
from quality_arms import LABELLED, ORDINARY, Sizes, Training, evaluate, step_seconds
from quality_bench import best_cells, spread
from quality_text import ARMS, TextBench

from framework.data import DataReport, TokenizedDataset

SIZES = Sizes(hidden=32, depth=1, vocabulary=106, batch=4, sequence=96, pad_token_id=0)


def dataset(count=24, tokens=40, labelled=10):
    """Samples of random ids whose last tokens carry labels."""
    ids = np.random.default_rng(0).integers(6, 100, (count, tokens)).astype(np.int32)
    supervised = np.zeros((count, tokens), dtype=bool)
    supervised[:, -labelled:] = True
    report = DataReport(samples=count, tokens=ids.size, supervised_tokens=int(supervised.sum()))
    return TokenizedDataset(ids.ravel(), supervised.ravel(), np.full(count, tokens), report)


def by_name(name):
    return next(arm for arm in ARMS if arm.name.startswith(name))


def test_subset_and_share_filter():
    whole = dataset(count=3, tokens=4, labelled=1)
    part = quality_data.subset(whole, [2, 0])
    assert part.lengths.tolist() == [4, 4]
    assert part[0].input_ids.tolist() == whole[2].input_ids.tolist()
    assert part[1].labels.tolist() == whole[0].labels.tolist()
    assert part.report.labelled_share == 0.25
    mixed = TokenizedDataset(
        np.zeros(20, np.int32),
        np.array([0] * 9 + [1] + [0] * 4 + [1] + [0, 0, 1, 1, 1], dtype=bool),
        np.array([10, 5, 5]),
        DataReport(),
    )
    assert quality_data.within_shares(mixed) == [1]  # shares .1, .2 and .6


@pytest.mark.parametrize(
    ("name", "sequences", "share"),
    [
        ("ordinary", 4, 1.0),
        ("checkpointed", 4, 1.0),
        ("half", 2, 1.0),
        ("uniform", 4, 0.25),
        ("suffix", 4, 0.25),
        ("supervised, labelled", 4, 0.25),
        ("supervised, r = .5", 4, 0.5),
        ("supervised, r = .5, correction 1", 4, 0.5),
        ("supervised, r = .75", 4, 0.75),
    ],
)
def test_an_arm_takes_its_sequences_and_selects_its_share(name, sequences, share):
    training = Training(SIZES.model(0), by_name(name), SIZES, dataset(), seed=0)
    training.step(rate=1e-3)
    assert training.tokens == sequences * 80  # two samples of 40 fit into 96
    assert training.selected_tokens / training.tokens == share


@pytest.mark.parametrize(("name", "labels"), [("ordinary", 80), ("supervised, labelled", 80), ("suffix", 72)])
def test_labels_that_enter_the_loss_are_counted(name, labels):
    training = Training(SIZES.model(0), by_name(name), SIZES, dataset(), seed=0)
    training.step(rate=1e-3)
    # Of each of 8 samples the last 10 tokens are selected; the last one predicts nothing, and one before them does.
    assert training.labels == labels


def test_a_uniform_selection_drops_labels():
    training = Training(SIZES.model(0), by_name("uniform"), SIZES, dataset(), seed=0)
    for _ in range(10):
        training.step(rate=1e-3)
    assert training.labels / 800 == pytest.approx(0.25, abs=0.05)


def test_the_correction_changes_what_is_learnt():
    losses = {}
    for name in ("supervised, r = .5", "supervised, r = .5, correction 1"):
        training = Training(SIZES.model(3), by_name(name), SIZES, dataset(), seed=1)
        list(training.run(2, peak=1e-2))
        losses[name] = evaluate(training.model, dataset(), SIZES)
    assert len(set(losses.values())) == 2


def test_a_constant_schedule_does_not_depend_on_its_length():
    losses = []
    for steps in (2, 5):
        training = Training(SIZES.model(3), ORDINARY, SIZES, dataset(), seed=1)
        for step in training.run(steps, 1e-2, kind="constant", warmup=2):
            if step == 2:
                losses.append(evaluate(training.model, dataset(), SIZES))
    assert losses[0] == losses[1]


def test_arms_start_equal_and_the_exact_ones_agree():
    losses = {}
    for name in ("ordinary", "checkpointed", "supervised"):
        training = Training(SIZES.model(3), by_name(name), SIZES, dataset(), seed=1)
        assert list(training.run(2, peak=1e-2)) == [1, 2]
        losses[name] = evaluate(training.model, dataset(), SIZES)
        assert training.model.training
    assert losses["checkpointed"] == pytest.approx(losses["ordinary"], abs=1e-5)
    assert losses["supervised"] != pytest.approx(losses["ordinary"], abs=1e-5)


def test_evaluation_is_the_mean_over_labels():
    model, data = SIZES.model(0), dataset(count=5)
    ids = torch.from_numpy(data.input_ids.reshape(5, 40)).long()
    with torch.no_grad():
        logits = model.eval()(ids).logits[:, 29:39]
    expected = torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 30:].flatten())
    assert evaluate(model, data, SIZES) == pytest.approx(float(expected), rel=1e-5)


def test_every_arm_is_timed():
    assert set(step_seconds(ARMS[:2], SIZES, dataset(), rounds=1)) == {"ordinary", "checkpointed"}


def bench(results):
    """A benchmark with given results, whose cells are made up: the loss is lowest at rate 8e-3."""
    args = argparse.Namespace(rates=[1e-3, 2e-3, 4e-3], most_rates=5, seeds=[0, 1], ordinary_steps=10)
    made = object.__new__(TextBench)
    made.args, made.arms, made.results = args, ARMS, results

    def cell(arm, rate, seed):
        loss = abs(np.log2(rate / 8e-3)) + 0.1 * seed + 0.01 * ARMS.index(arm)
        count = {"selected_share": 0.25, "labels": 25_000, "steps": 7}
        made_up = {"arm": arm.name, "rate": rate, "seed": seed, "loss": loss, "tuning_loss": loss, **count}
        results["cells"][f"{arm.name} | {rate:g} | {seed}"] = made_up
        return made_up

    made.cell = cell
    return made


def empty_results():
    seconds = {arm.name: 1.0 + index for index, arm in enumerate(ARMS)}
    start = {"0": {"loss": 5.0}, "1": {"loss": 5.2}}
    return {"settings": {"labelled_share": 0.25}, "step_seconds": seconds, "cells": {}, "start": start}


def test_rates_go_on_beyond_the_edge_of_the_grid():
    results = empty_results()
    assert bench(results).best_rate(ARMS[0]) == 8e-3
    assert sorted(cell["rate"] for cell in results["cells"].values()) == [1e-3, 2e-3, 4e-3, 8e-3, 16e-3]


def test_the_budget_is_the_same_measured_time():
    assert list(bench(empty_results()).measure_steps().values())[:6] == [10, 5, 3, 2, 2, 2]


def test_the_table_has_means_deviations_and_paired_differences():
    made = bench(empty_results())
    for arm in ARMS:
        made.cell(arm, made.best_rate(arm), 1)
    assert [cell["rate"] for cell in best_cells(made.results)[LABELLED.name]] == [8e-3, 8e-3]
    lines = made.report().splitlines()
    assert len(lines) == 2 + len(ARMS) + 2
    assert lines[2] == "| ordinary | 1.00 | 7 | 0.25 | 25.0 k | 0.008 | 0.050 ± 0.071 | -0.030 ± 0.000 |"
    assert "25.0% of the tokens carry labels" in lines[-1]
    assert "before fine-tuning 5.100 ± 0.141 nats" in lines[-1]


def test_a_spread_of_one_seed_has_no_deviation():
    assert (spread([]), spread([0.5]), spread([1.0, 2.0], "+", 1)) == ("-", "0.500", "+1.5 ± 0.7")


def test_each_task_has_its_own_defaults():
    text, transfer = parse(["--output", "x"]), parse(["--output", "x", "--task", "transfer", "--hidden", "32"])
    assert (text.task, text.hidden, text.gaps) == ("text", 256, None)
    assert (transfer.hidden, transfer.gaps) == (32, [32, 128])


def test_the_command_trains_every_arm_and_goes_on_where_it_stopped(tmp_path, monkeypatch, capsys, tiny_tokenizer_path):
    monkeypatch.setattr(quality_data, "HELD_OUT", 8)
    source, output = tmp_path / "source", tmp_path / "output"
    source.mkdir()
    shutil.copytree(tiny_tokenizer_path, source / "tokenizer")
    for name in ("train", "eval"):
        turns = [
            {
                "messages": [
                    {"role": "user", "content": "a" * 40},
                    {"role": "assistant", "content": f"answer {i:03d}"},
                ],
                "task": ("describe", "signature")[i % 2],
            }
            for i in range(40)
        ]
        (source / f"{name}.jsonl").write_text("".join(json.dumps(turn) + "\n" for turn in turns))
    sizes = "--hidden 32 --depth 1 --batch 2 --sequence 96 --start-steps 1 --ordinary-steps 1 --rounds 1"
    arguments = f"--output {output} --data {source} {sizes} --rates 1e-3 --most-rates 1 --seeds 0 1 --threads 1".split()
    main(arguments)
    results = json.loads((output / "text.json").read_text())
    assert len(results["cells"]) == 2 * len(ARMS)
    assert set(results["start"]) == {"0", "1"}
    assert results["settings"]["pairs"] == {"train": 12, "tuning": 8, "report": 20}
    table = capsys.readouterr().out.splitlines()[-len(ARMS) :]
    main(arguments)  # nothing is left to do
    assert capsys.readouterr().out.splitlines()[-len(ARMS) :] == table
    assert json.loads((output / "text.json").read_text()) == results
    with pytest.raises(SystemExit, match="has other settings"):
        main([*arguments, "--batch", "4"])
    picture = tmp_path / "quality.png"
    main(["--output", str(output), "--plot", str(picture)])
    assert picture.read_bytes().startswith(b"\x89PNG")
