"""Jobs on a real cluster: they end, go on, fail and are refused as they should."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from conftest import Runs, losses

from framework.training.run_directory import COMPLETED, FAILED, STOPPED

pytestmark = [pytest.mark.slurm, pytest.mark.multiprocess, pytest.mark.slow]

LOSS_TOLERANCE = 1e-5
# Steps that last long enough for something to happen meanwhile: many micro-batches each.
LONG = {"training__max_steps": 40, "training__global_batch_size": 48, "training__micro_batch_size": 2}


def test_two_nodes_with_two_ranks_train_as_one_process(runs: Runs):
    """In a directory whose name is a shell's nightmare."""
    name = "it's \"50%\" $(touch injected) `touch injected` \\ #1; x"
    config = runs.config("quoted", hardware__gpus_per_node=2)
    quoted = config.parent / name.replace("\\ ", "")
    run_dir = quoted / "run"
    run = runs.submit(config, "--nodes", "2", "--set", f"run.output_dir={run_dir}", "--sbatch", f"comment={name}")
    assert run.path != run_dir
