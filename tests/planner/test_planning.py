"""From a config to plans: what they take, when they fit, and what is kept of what was recorded."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from framework.config import Config
from framework.errors import UserError
from framework.planner.choice import Choice
from framework.planner.hardware import cluster_of
from framework.planner.planning import PlannedJob
from framework.planner.profile import Profile, assumed_profile

ROOT = Path(__file__).parents[2]
LLAMA = {
    "model_type": "llama",
    "hidden_size": 256,
    "intermediate_size": 688,
    "num_hidden_layers": 6,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "vocab_size": 1000,
    "max_position_embeddings": 512,
}
PARAMETERS = 2 * 1000 * 256 + 6 * (256 * (2 * 256 + 2 * 64) + 3 * 256 * 688 + 2 * 256) + 256


def config_of(**sections: dict) -> Config:
    sections = {
        "training": {"max_steps": 1, "global_batch_size": 8, "micro_batch_size": "auto"},
        "planner": {"objective": "fidelity"},
    } | sections
    return Config.model_validate(
        {
            "run": {"output_dir": "unused"},
            "model": {"from_config": LLAMA, "tokenizer": "unused"},
            "data": {"train": "unused", "sequence_length": 256},
            "optimizer": {"learning_rate": 1e-3},
        }
        | sections
    )


def cluster_with(config: Config, size: int) -> tuple:
    cluster = cluster_of(config.hardware, assumed_profile, gpu_memory="80GiB")
    profile: Profile = replace(assumed_profile(cluster.device), reserved_ratio=1.0)
    return replace(cluster, budget_bytes=size), profile


@pytest.mark.slow
def test_the_largest_micro_batch_that_fits_is_chosen_and_laws_are_kept():
    said: list[str] = []
    config = config_of()
    job = PlannedJob(config, 0.5, said.append)
    everything = job.plan(*cluster_with(config, 1 << 40))
    assert len(said) == 1 and "recording" in said[0]
    batches = {point.choice.micro_batch_size: point.ledger for point in everything.found.points}
    assert set(batches) == {1, 2, 4, 8}
    # Weights and moments: 12 bytes a parameter; a number of steps for each tensor; frequencies of positions, twice.
    held = {ledger.terms[0].bytes for ledger in batches.values()}
    assert held == {12 * PARAMETERS + 4 * (6 * 9 + 3) + 2 * 4 * 16}
    for size in (2, 4, 8):
        peak = batches[size].peak
        fits, just_not = (job.plan(*cluster_with(config, budget)) for budget in (peak, peak - 1))
        assert {point.choice.micro_batch_size for point in fits.found.points} == {s for s in batches if s <= size}
        assert {point.choice.micro_batch_size for point in just_not.found.points} == {s for s in batches if s < size}
    nothing = job.plan(*cluster_with(config, batches[1].peak - 1))
    assert nothing.plans == () and nothing.smallest == batches[1]
    assert nothing.to_json() == {"fits": False, "budget_bytes": batches[1].peak - 1, "chosen": None, "plans": []}
    assert len(said) == 1
    again: list[str] = []
    deeper = config_of(model={"from_config": LLAMA | {"num_hidden_layers": 9}, "tokenizer": "unused"})
    assert PlannedJob(deeper, 0.5, again.append).plan(*cluster_with(deeper, 1 << 40)).plans
    assert again == []


def test_what_the_planner_does_not_know_is_said():
    deepspeed = config_of(sharding={"engine": "deepspeed", "zero_stage": 2}, hardware={"gpus_per_node": 2})
    with pytest.raises(UserError, match="does not know what stage 2 allocates"):
        PlannedJob(deepspeed, 1.0, print).plan(*cluster_with(deepspeed, 1 << 40))
    with pytest.raises(UserError, match="the planner knows causal_lm only"):
        PlannedJob(config_of(model={"from_config": LLAMA, "task": "masked_lm", "tokenizer": "x"}), 1.0, print)


def test_rows_of_a_selection_follow_the_ratio_and_the_labels():
    selective = {"policy": "selective"}
    config = config_of(selection={"strategy": "supervised", "ratio": 0.75}, retention=selective)
    memory = PlannedJob(config, 0.5, print).memory
    choice = Choice.of(config_of(training={"max_steps": 1, "global_batch_size": 8, "micro_batch_size": 4}), 1, 0.5)
    supervised = replace(choice, policy="selective", strategy="supervised", ratio=0.75)
    assert memory.sizes(supervised) | {"rows": 768, "slots": 768, "labels": 512} == memory.sizes(supervised)
    below = memory.sizes(replace(supervised, ratio=0.1))
    assert (below["rows"], below["labels"]) == (512, 512)
    uniform = memory.sizes(replace(supervised, strategy="uniform", ratio=0.25))
    assert (uniform["rows"], uniform["labels"], uniform["batch"], uniform["real"]) == (256, 128, 4, 1024)


@pytest.mark.slow
def test_the_command_prints_a_plan_and_exits_3_where_nothing_fits(tmp_path: Path):
    config = tmp_path / "config.json"
    config.write_text(json.dumps(config_of().to_json()))
    for memory, code, words in (("24GiB", 0, "launch"), ("10MiB", 3, "nothing fits")):
        output = tmp_path / "plan.json"
        command = [sys.executable, str(ROOT / "launchers" / "plan.py"), "--config", str(config), "--json", str(output)]
        checked = ["--simulate", "--top", "1", "--gpu-memory", memory]
        done = subprocess.run([*command, *checked], capture_output=True, text=True, timeout=240)
        assert done.returncode == code, done.stderr
        assert words in done.stdout
        plan = json.loads(output.read_text())
        assert plan["fits"] == (code == 0)
        if plan["fits"]:
            assert "simulating" in done.stdout and "trust the simulation" not in done.stdout
            chosen = plan["chosen"]
            assert chosen["peak_allocated_bytes"] == pytest.approx(chosen["simulated_peak_bytes"], rel=0.005)
    wrong = subprocess.run([*command, "--device", "H1000"], capture_output=True, text=True, timeout=60)
    assert wrong.returncode == 2 and "no device is known as 'H1000'" in wrong.stderr
