from __future__ import annotations

import itertools
import json
import sys
from dataclasses import asdict
from pathlib import Path

import check_parity
import pytest
from check_parity import differences, main, table
from parity_cases import ACCUMULATION, ADAPTERS, ARMS, ENGINES, RANKS, Case, pairwise_cover, whole_matrix
from several_ranks import run_script_on_ranks

from framework.config import Config


def test_the_cover_has_every_pair_of_the_matrix():
    def pairs(cases):
        return {pair for case in cases for pair in itertools.combinations(asdict(case).items(), 2)}

    matrix, cover = whole_matrix(), pairwise_cover()
    # A single rank has no two copies of the model.
    assert len(matrix) == (len(ENGINES) * len(RANKS) - 1) * len(ACCUMULATION) * len(ARMS) * len(ADAPTERS) == 476
    assert pairs(cover) == pairs(matrix)
    assert len(cover) < 60


def test_every_case_is_a_valid_run_of_sixteen_sequences_a_step(tmp_path):
    for case in whole_matrix():
        config = Config.model_validate_json(json.dumps(case.config(tmp_path, 20)))
        assert config.gradient_accumulation(case.ranks) == case.accumulation
        assert config.training.micro_batch_size * case.ranks * case.accumulation == 16
        assert case.baseline().config(tmp_path, 20)["training"]["micro_batch_size"] == 16


def test_the_difference_is_the_largest_over_all_steps(tmp_path):
    case = Case("FSDP2", 2, 1, "all", "full")
    for one, losses in ((case, [2.0, 1.01, 0.5]), (case.baseline(), [2.0, 1.0, 0.5])):
        run = Path(one.config(tmp_path, 3)["run"]["output_dir"])
        run.mkdir(parents=True)
        lines = [json.dumps({"kind": "train", "loss": loss}) for loss in losses]
        (run / "metrics.jsonl").write_text("\n".join([*lines, json.dumps({"kind": "eval", "loss": 9.0})]) + "\n")
    found = differences([case], tmp_path, 3)
    assert found == {case: pytest.approx(0.01)}
    text = table(found, 1e-5, 3, "command")
    assert "0 of 1 runs are within it" in text and "| FSDP2 | 1.0e-02 |" in text


@pytest.mark.multiprocess
@pytest.mark.slow
def test_every_engine_gives_the_losses_of_one_process(tmp_path, monkeypatch, capsys):
    """Within 1e-5 over 3 steps in float32, in a pairwise cover of the matrix; the tool itself takes 20."""
    monkeypatch.setattr(check_parity, "launch", run_script_on_ranks(tmp_path / "outputs"))
    monkeypatch.setattr(sys, "argv", ["check_parity.py", "--directory", str(tmp_path), "--steps", "3"])
    code, printed = main(), capsys.readouterr()
    assert code == 0, printed.out + printed.err
    assert f"{len(pairwise_cover())} of {len(pairwise_cover())} runs are within it" in printed.out
