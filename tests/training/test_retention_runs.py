"""Runs whose blocks keep their tensors elsewhere, or are compiled: losses are those of ordinary ones."""

import json

import pytest
import torch
from task_runs import losses, records
from torch._dynamo.utils import counters

import framework
from framework.retention import compiled


def test_retaining_on_the_host_changes_no_loss_and_takes_less(make_config, settings):
    settings["model"]["from_config"] = settings["model"]["from_config"] | {"num_hidden_layers": 6}
    results = []
    for placement in ("device", "host"):
        settings["run"]["output_dir"] += f"-{placement}"
        config = make_config(retention__placement=placement, logging__track_cpu_memory=True, training__max_steps=3)
        results.append(framework.train(config))
    assert losses(results[0]) == losses(results[1])
    plain, less = (records(result.run_dir, "train")[-1]["peak_memory_bytes"] for result in results)
    assert less < plain
    assert json.loads((results[1].run_dir / "plan.json").read_text())["chosen"]["retention"]["placement"] == "host"


@pytest.mark.parametrize("policy", ["all", "checkpoint", "selective"])
def test_compiled_blocks_give_the_same_losses(make_config, settings, monkeypatch, policy):
    monkeypatch.setattr(compiled, "BACKEND", "eager")
    torch._dynamo.reset()
    counters.clear()
    results = []
    for compile in (False, True):
        settings["run"]["output_dir"] += f"-{compile}"
        strategy = "supervised" if policy == "selective" else "none"
        given = {"retention__policy": policy, "retention__retain_linears": False, "selection__strategy": strategy}
        results.append(losses(framework.train(make_config(training__compile=compile, training__max_steps=3, **given))))
        assert (counters["frames"]["ok"] > 0) == compile
    assert results[1] == pytest.approx(results[0], rel=1e-6)
