"""The quality benchmark's bookkeeping: what is trained on what, for how long, and what is reported."""

from __future__ import annotations

import argparse
import json
import shutil

import numpy as np
import pytest
import quality_data
import torch
from bench_quality import Bench, main
from quality_arms import ARMS, Sizes, Training, evaluate, step_seconds

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
    [("ordinary", 4, 1.0), ("checkpointed", 4, 1.0), ("half", 2, 1.0), ("uniform", 4, 0.25), ("supervised", 4, 0.25)],
)
def test_an_arm_takes_its_sequences_and_selects_its_share(name, sequences, share):
    training = Training(SIZES.model(0), by_name(name), SIZES, dataset(), seed=0)
    training.step(rate=1e-3)
    assert training.tokens == sequences * 80  # two samples of 40 fit into 96
    assert training.supervised_tokens == sequences * 20
    assert training.selected_tokens / training.tokens == share


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


def bench(tmp_path, results):
    """A benchmark with given results, whose cells are made up: the loss is lowest at rate 8e-3."""
    args = argparse.Namespace(rates=[1e-3, 2e-3, 4e-3], most_rates=5, seeds=[0, 1], ordinary_steps=10)
    made = object.__new__(Bench)
    made.args, made.arms, made.results = args, ARMS, results

    def cell(arm, rate, seed):
        loss = abs(np.log2(rate / 8e-3)) + 0.1 * seed + 0.01 * ARMS.index(arm)
        count = {"tokens": 400, "supervised_tokens": 100_000, "selected_tokens": 100, "steps": 7}
        made_up = {"arm": arm.name, "rate": rate, "seed": seed, "loss": loss, "tuning_loss": loss, **count}
        results["cells"][f"{arm.name} | {rate:g} | {seed}"] = made_up
        return made_up

    made.cell = cell
    return made


def empty_results():
    seconds = {arm.name: 1.0 + index for index, arm in enumerate(ARMS)}
    return {"settings": {"labelled_share": 0.25}, "step_seconds": seconds, "cells": {}, "start": {"0": 5.0, "1": 5.2}}


def test_rates_go_on_beyond_the_edge_of_the_grid(tmp_path):
    results = empty_results()
    assert bench(tmp_path, results).best_rate(ARMS[0]) == 8e-3
    assert sorted(cell["rate"] for cell in results["cells"].values()) == [1e-3, 2e-3, 4e-3, 8e-3, 16e-3]


def test_the_budget_is_the_same_measured_time(tmp_path):
    assert list(bench(tmp_path, empty_results()).measure_steps().values()) == [10, 5, 3, 2, 2, 2]


def test_the_table_has_means_deviations_and_paired_differences(tmp_path):
    made = bench(tmp_path, empty_results())
    for arm in ARMS:
        rate = made.best_rate(arm)
        made.cell(arm, rate, 1)
    lines = made.report().splitlines()
    assert len(lines) == 2 + len(ARMS) + 2
    ordinary, uniform = lines[2], lines[5]
    assert ordinary == "| ordinary | 1.000 | 7 | 0.25 | 100 k | 0.008 | 0.050 ± 0.071 | -0.040 ± 0.000 |"
    assert "| 25 k |" in uniform  # a uniform selection drops three labels in four
    assert "25.0% of the tokens carry labels" in lines[-1]


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
    results = json.loads((output / "results.json").read_text())
    assert len(results["cells"]) == 2 * len(ARMS)
    assert set(results["start"]) == {"0", "1"}
    assert results["settings"]["pairs"] == {"train": 12, "tuning": 8, "report": 20}
    table = capsys.readouterr().out.splitlines()[-9:]
    main(arguments)  # nothing is left to do
    assert capsys.readouterr().out.splitlines()[-9:] == table
    assert json.loads((output / "results.json").read_text()) == results
    with pytest.raises(SystemExit, match="has other settings"):
        main([*arguments, "--batch", "4"])
