"""From a config to plans: what they take, when they fit, and what is kept of what was recorded."""

from __future__ import annotations

import io
import json
import runpy
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from recorded_here import recorded_here
from rich.console import Console

from framework.cli import run_command
from framework.config import Config
from framework.errors import UserError
from framework.planner import advice
from framework.planner.advice import with_advice
from framework.planner.choice import Choice
from framework.planner.hardware import Cluster, cluster_of
from framework.planner.ledger import WORKSPACES
from framework.planner.planning import PlannedJob
from framework.planner.profile import Profile, assumed_profile
from framework.planner.rates import rates_of
from framework.planner.sizing import fewest, sizes, sizes_table
from framework.planner.zero import GRADIENTS
from framework.sharding.deepspeed_config import OwnOptions

ROOT = Path(__file__).parents[2]
LLAMA = {
    "model_type": "llama",
    "hidden_size": 256,
    "intermediate_size": 688,
    "num_hidden_layers": 6,
    "num_attention_heads": 8,
    "num_key_value_heads": 1,
    "vocab_size": 1000,
    "max_position_embeddings": 512,
    "tie_word_embeddings": True,
}
"""Of the family that tests of runs train, whose laws they share."""
PARAMETERS = 1000 * 256 + 6 * (256 * (2 * 256 + 2 * 32) + 3 * 256 * 688 + 2 * 256) + 256
CHECKPOINTED = {"selection": {"strategy": "supervised", "ratio": 1.0}, "retention": {"policy": "checkpoint"}}


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


@pytest.fixture(scope="module", autouse=True)
def in_this_process():
    with recorded_here():
        yield


def cluster_with(config: Config, size: int) -> tuple:
    cluster = cluster_of(config.hardware, assumed_profile, gpu_memory="80GiB")
    profile: Profile = replace(assumed_profile(cluster.device), reserved_ratio=1.0)
    return replace(cluster, budget_bytes=size), profile


@pytest.mark.slow
def test_the_largest_micro_batch_that_fits_is_chosen_and_laws_are_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    said: list[str] = []
    config = config_of()
    job = PlannedJob(config, 0.5, said.append)
    everything = job.plan(*cluster_with(config, 1 << 40))
    assert len(said) == 1 and "recording" in said[0]
    batches = {point.choice.micro_batch_size: point.ledger for point in everything.found.points}
    assert set(batches) == {1, 2, 4, 8}
    # Weights and moments: 12 bytes a parameter; a number of steps for each tensor; frequencies of positions, twice; and
    # 32 MiB of cuBLAS for each of two threads.
    held = {sum(term.bytes for term in ledger.terms if "save" in term.phases) for ledger in batches.values()}
    assert held == {12 * PARAMETERS + 4 * (6 * 9 + 2) + 2 * 4 * 16 + 2 * 32 * 2**20}
    for size in (2, 4, 8):
        peak = batches[size].peak
        fits, just_not = (job.plan(*cluster_with(config, budget)) for budget in (peak, peak - 1))
        assert {point.choice.micro_batch_size for point in fits.found.points} == {s for s in batches if s <= size}
        assert {point.choice.micro_batch_size for point in just_not.found.points} == {s for s in batches if s < size}
    nothing = job.plan(*cluster_with(config, batches[1].peak - 1))
    assert nothing.plans == () and nothing.smallest == batches[1]
    assert batches[1].tensors == batches[1].peak - 2 * 32 * 2**20
    assert nothing.to_json() == {"fits": False, "budget_bytes": batches[1].peak - 1, "chosen": None, "plans": []}
    assert len(said) == 1
    again: list[str] = []
    deeper = config_of(model={"from_config": LLAMA | {"num_hidden_layers": 9}, "tokenizer": "unused"})
    assert PlannedJob(deeper, 0.5, again.append).plan(*cluster_with(deeper, 1 << 40)).plans
    assert again == []


@pytest.mark.slow
def test_what_a_device_does_not_take_is_retained_on_the_host():
    """Of 2048 tokens, all of them selected, in float32."""
    config = config_of(
        training={"max_steps": 1, "global_batch_size": 8, "micro_batch_size": 8},
        selection={"strategy": "supervised", "ratio": 1.0},
        retention={"policy": "selective", "retain_linears": True, "placement": "auto"},
    )
    job = PlannedJob(config, 0.5, lambda line: None)
    cluster, profile = cluster_with(config, 1 << 40)
    device, host = job.plan(cluster, profile).found.points
    assert (device.choice.placement, host.choice.placement) == ("device", "host")
    assert device.seconds == host.seconds and device.ledger.host_bytes == 0
    # Input, query, attention's and MLP's outputs are as wide as the model; keys and values are kept before and after
    # positions turn them; eight log-sum-exps; gate and up, whose 688 columns take the memory of 1024.
    sent, pinned = (4 * 2048 * (5 * 256 + 4 * 32 + 8 + 2 * mlp) for mlp in (688, 1024))
    assert host.ledger.host_bytes == 6 * pinned and job.memory.sent(host.choice) == 6 * sent
    # The last of six blocks stays.
    assert device.ledger.total("loss") - host.ledger.total("loss") == 5 * sent
    assert host.ledger.peak < device.ledger.peak - 3 * sent

    tight = replace(cluster, budget_bytes=device.ledger.peak - 1)
    (plan,) = job.plan(tight, profile).plans
    chosen = plan.to_json()
    assert (chosen["retention"]["placement"], chosen["host_bytes"]) == ("host", 6 * pinned)
    assert plan.overrides == {"retention.placement": "host"}
    assert not job.plan(replace(tight, host_bytes=6 * pinned - 1), profile).plans

    slow = replace(profile, host_to_device=1e6, device_to_host=1e6)
    device, host = job.plan(cluster, slow).found.points
    passes = job.time.step(device.choice, rates_of(config, cluster, slow))
    link = (6 + 5) * sent / 1e6
    waited = link - passes.forward - passes.backward - passes.recomputation
    assert host.seconds - device.seconds == pytest.approx(waited)


@pytest.mark.slow
def test_more_accelerators_or_one_change_are_found_where_nothing_fits(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(advice, "MOST_RECORDINGS", 0)
    fixed = {"max_steps": 1, "global_batch_size": 32, "micro_batch_size": 8}
    config = config_of(sharding={"engine": "fsdp"}, training=fixed)
    job = PlannedJob(config, 0.5, lambda line: None)

    def on(size: int) -> Callable[[int, int], Cluster]:
        return lambda nodes, gpus: replace(
            cluster_with(config, size)[0], nodes=nodes, gpus_per_node=gpus, budget_bytes=size
        )

    _, profile = cluster_with(config, 1)
    everything = sizes(job, on(1 << 40), profile, lambda line: None)
    peaks = {size.ranks: size.planned.plans[0].point.ledger.peak for size in everything if size.planned}
    # Micro-batches of 8 make up 32 sequences on at most 4 ranks.
    assert list(peaks) == [1, 2, 4] and [size.ranks for size in everything] == [1, 2, 4, 8, 16, 32, 64]
    assert peaks[1] > peaks[2] > peaks[4]

    found = sizes(job, on(peaks[2]), profile, lambda line: None)
    assert [size.fits for size in found] == [False, True, True, False, False, False, False]
    best = fewest(found)
    assert best.ranks == 2 and best.to_json()["chosen"]["peak_allocated_bytes"] == peaks[2]
    output = io.StringIO()
    Console(file=output, width=120).print(sizes_table(found))
    rows = [line.split() for line in output.getvalue().splitlines()[2:]]
    assert [row[:2] for row in rows[:3]] == [["1", "nothing"], ["2", "FSDP2"], ["4", "FSDP2"]]
    assert rows[3] == ["8", "cannot", "be", "planned"]

    nothing = job.plan(on(peaks[2])(1, 1), profile)
    advised = with_advice(job, nothing, profile, lambda line: None)
    assert advised.more_ranks is not None and advised.more_ranks.ranks == 2
    changes = {tuple(change.overrides.items()): change for change in advised.changes}
    smaller = changes[("training.micro_batch_size", 4),]
    assert smaller.point.ledger.peak <= peaks[2] and smaller.same_result
    changed = PlannedJob(config_of(sharding={"engine": "fsdp"}, training=fixed | {"micro_batch_size": 4}), 0.5, print)
    assert changed.plan(on(peaks[2])(1, 1), profile).found.points[0].ledger == smaller.point.ledger
    fits = job.plan(on(peaks[1])(1, 1), profile)
    assert with_advice(job, fits, profile, print) is fits


@pytest.mark.slow
def test_one_accelerator_offloads_where_nothing_else_fits_and_the_host_has_room():
    fixed = {"max_steps": 1, "global_batch_size": 2, "micro_batch_size": 1}
    config = config_of(sharding={"engine": "auto"}, training=fixed, **CHECKPOINTED)
    job = PlannedJob(config, 0.5, lambda line: None)
    cluster, profile = cluster_with(config, 1 << 40)
    points = {point.choice: point.ledger for point in job.plan(cluster, profile, top=20).found.points}
    alone = next(choice for choice in points if choice.engine == "single")
    assert {(c.engine, c.zero_stage, c.offload_optimizer, c.offload_parameters) for c in points} == {
        ("single", None, False, False),
        ("fsdp", None, True, True),
        *(("deepspeed", stage, True, False) for stage in (1, 2, 3)),
        ("deepspeed", 3, True, True),
    }
    assert points[alone].host_bytes == 0
    tight = replace(cluster, budget_bytes=points[alone].peak - 1)
    chosen = job.plan(tight, profile).plans[0].point
    assert chosen.choice.offload_optimizer and chosen.ledger.peak < points[alone].peak
    # Float32 weights, gradients and two moments at least.
    assert min(ledger.host_bytes for choice, ledger in points.items() if choice != alone) > 12 * PARAMETERS
    poor = replace(tight, host_bytes=12 * PARAMETERS)
    nothing = job.plan(poor, profile)
    assert nothing.plans == () and nothing.smallest is not None
    output = io.StringIO()
    nothing.report("x.json").print(Console(file=output, width=200))
    assert "of the host, of which" in output.getvalue()


@pytest.mark.slow
def test_a_users_own_options_of_deepspeed_count():
    fixed = {"max_steps": 1, "global_batch_size": 2, "micro_batch_size": 1}
    config = config_of(sharding={"engine": "deepspeed", "zero_stage": "auto"}, training=fixed, **CHECKPOINTED)
    mine = {"stage": 3, "reduce_bucket_size": 1e5, "offload_optimizer": {"device": "none"}}
    own = OwnOptions({"zero_optimization": mine}, "ds.json")
    job = PlannedJob(config, 0.5, lambda line: None, own=own)
    assert {each.choice.zero_stage for each in job.space(2, 1)} == {3}
    cluster, profile = cluster_with(config, 1 << 40)
    cluster = replace(cluster, gpus_per_node=2)
    (with_own,) = job.plan(cluster, profile).plans
    assert with_own.engine_options["zero_optimization"]["reduce_bucket_size"] == 100_000
    plain = PlannedJob(config, 0.5, lambda line: None).plan(cluster, profile, top=20)
    same = next(plan for plan in plain.plans if plan.point.choice == with_own.point.choice)
    bucket = same.engine_options["zero_optimization"]["reduce_bucket_size"]
    held, its_held = (
        next(term.bytes for term in plan.point.ledger.terms if term.name == GRADIENTS) for plan in (with_own, same)
    )
    assert its_held - held == 4 * (bucket - 100_000)


def test_what_the_planner_does_not_know_is_said():
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
    # Labelled tokens are the last ones.
    suffix = memory.sizes(replace(supervised, strategy="suffix", ratio=0.25))
    assert (suffix["rows"], suffix["labels"]) == (256, 256)
    assert memory.sizes(replace(supervised, strategy="suffix", ratio=0.75))["labels"] == 512


@pytest.mark.slow
def test_the_command_prints_a_plan_and_exits_3_where_nothing_fits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
):
    monkeypatch.setattr(advice, "MOST_RECORDINGS", 0)
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    path, output = tmp_path / "config.json", tmp_path / "plan.json"
    path.write_text(json.dumps(config_of().to_json()))
    main = runpy.run_path(str(ROOT / "launchers" / "plan.py"))["main"]

    def run(*arguments: str) -> tuple[int, str]:
        monkeypatch.setattr(sys, "argv", ["plan.py", *arguments])
        code = run_command(main)
        printed = capsys.readouterr()
        return code, " ".join((printed.out + printed.err).split())

    planned = ("--config", str(path), "--json", str(output))
    shown = ("--plot", f"{tmp_path}/plots/", "--simulate", "--top", "1")
    code, words = run(*planned, "--gpu-memory", "24GiB", *shown)
    assert code == 0 and "launch" in words and "labelled share: 100 % assumed" in words
    assert "simulating" in words and "trust the simulation" not in words
    chosen = json.loads(output.read_text())["chosen"]
    (workspaces,) = (term["bytes"] for term in chosen["ledger"] if term["name"] == WORKSPACES)
    assert chosen["peak_allocated_bytes"] - workspaces == pytest.approx(chosen["simulated_peak_bytes"], rel=0.005)
    assert json.loads(output.read_text())["fits"] and (tmp_path / "plots" / "timeline.png").exists()
    code, words = run(*planned, "--gpu-memory", "10MiB")
    assert code == 3 and "nothing fits" in words and "settings are left out for lack of time" in words
    assert not json.loads(output.read_text())["fits"]
    code, words = run(*planned, "--device", "H1000")
    assert code == 2 and "no device is known as 'H1000'" in words
    assert run() == (2, "error: --config: missing; only --calibrate does without")
    monkeypatch.setattr("framework.planner.calibration.SECONDS", 0.0)
    code, words = run("--calibrate")
    assert code == 0 and "no time is left for: products; it stays assumed" in words
    assert list(tmp_path.glob("selectrain/machines/*-cpu.json"))
