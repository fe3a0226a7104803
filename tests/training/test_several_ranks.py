"""Runs over several ranks: the losses of one process, stopped, killed and resumed in every way."""

from __future__ import annotations

import json
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from forked import KILL, Ended, patched
from safetensors.torch import load_file
from several_ranks import Ranks, run, start_training, train_one_after_the_other
from transformers import LlamaConfig, LlamaForCausalLM

import framework
from framework.checkpoint import export_run, find_checkpoint
from framework.config import load_config
from framework.training.run_directory import MARKERS

pytestmark = [pytest.mark.multiprocess, pytest.mark.slow]

FSDP = {"engine": "fsdp"}
STEP = "framework.training.loop:train_window"
ENDS_BY_ITSELF_SECONDS = 60


class Runs:
    """Starts runs of one config in directories of their own."""

    def __init__(self, config: Path, directory: Path) -> None:
        self.config, self.directory = config, directory

    def path(self, name: str) -> Path:
        return self.directory / name

    def start(self, name: str, ranks: int, *settings: str, patch: str = "") -> Ranks:
        options = ["--config", str(self.config)]
        for setting in (f"run.output_dir={self.path(name)}", *settings):
            options += ["--set", setting]
        return start_training(ranks, self.directory / "outputs", options, patch)

    def run(self, name: str, ranks: int, *settings: str) -> list[Ended]:
        ended = self.start(name, ranks, *settings).wait()
        for rank, end in enumerate(ended):
            assert end.code == 0, f"rank {rank}:\n{end.output[-5000:]}"
        return ended

    def records(self, name: str, kind: str = "train") -> list[dict[str, Any]]:
        records = map(json.loads, (self.path(name) / "metrics.jsonl").read_text().splitlines())
        return [record for record in records if record["kind"] == kind]

    def losses(self, name: str) -> list[float]:
        return [record["loss"] for record in self.records(name)]

    def marker(self, name: str) -> tuple[str, dict[str, Any]]:
        (found,) = [marker for marker in MARKERS if (self.path(name) / marker).exists()]
        return found, json.loads((self.path(name) / found).read_text())


@pytest.fixture
def make_runs(write_config: Callable[..., Path], tmp_path: Path) -> Callable[..., Runs]:
    def make(sharding: dict[str, Any] | None = None, **changes: Any) -> Runs:
        changes = {"training__micro_batch_size": 2, "checkpoint__every_steps": 2} | changes
        changes |= {f"sharding__{key}": value for key, value in (sharding or {}).items()}
        return Runs(write_config(**changes), tmp_path)

    return make


def single(runs: Runs, name: str = "single") -> list[float]:
    """The losses of the same run in this process."""
    overrides = [f"run.output_dir={runs.path(name)}", "sharding={}", "training.micro_batch_size=8"]
    framework.train(load_config(runs.config, overrides))
    return runs.losses(name)


@pytest.mark.parametrize(
    "sharding",
    [FSDP, {"engine": "deepspeed", "zero_stage": 3}, {"engine": "deepspeed", "zero_stage": 1}],
    ids=["fsdp", "zero3", "zero1"],
)
def test_two_ranks_train_evaluate_and_write_as_one_process(make_runs, sharding):
    # Five samples in batches of two: the second rank's last one is a stand-in.
    changes = {"training__eval_every_steps": 3, "training__eval_max_samples": 5, "logging__track_cpu_memory": True}
    runs = make_runs(sharding=sharding, **changes)
    first, second = runs.run("run", 2)
    expected = single(runs)
    assert runs.losses("run") == pytest.approx(expected, rel=1e-5)
    for kind, keys in {
        "train": ("tokens", "supervised_tokens", "selected_tokens", "learning_rate", "model_flops"),
        "eval": ("step", "tokens"),
    }.items():
        for own, other in zip(runs.records("run", kind), runs.records("single", kind), strict=True):
            assert {key: own[key] for key in keys} == {key: other[key] for key in keys}
    for own, other in zip(runs.records("run", "eval"), runs.records("single", "eval"), strict=True):
        assert own["loss"] == pytest.approx(other["loss"], rel=1e-5)
    assert all(record["peak_memory_bytes"] > 0 for record in runs.records("run"))
    assert runs.marker("run")[0] == "COMPLETED"
    assert "over 2 ranks" in first.output and "step 6/6" in first.output
    assert second.output.strip() == ""
    plan = json.loads((runs.path("run") / "plan.json").read_text())["chosen"]
    assert (plan["engine"], plan["gradient_accumulation"], plan["micro_batch_size"]) == (sharding["engine"], 2, 2)


# What rank 0 alone does comes with rank 0; in all others rank 1 is the one.
KILL_POINTS = {
    "in a step": ("framework.sharding.fsdp:FsdpEngine.backward", 10, 1),
    "before a shard": ("framework.checkpoint.saver:write_fragments", 3, 1),
    "between its files": ("framework.checkpoint.saver:write_fragments", 4, 1),
    "before the state": ("framework.checkpoint.saving:write_state", 2, 0),
    "before the manifest": ("framework.checkpoint.saving:write_manifest", 2, 0),
    "before the name": ("framework.checkpoint.saving:publish", 2, 0),
    "before latest": ("framework.checkpoint.saving:move_latest", 2, 0),
    "before pruning": ("framework.checkpoint.saving:prune", 2, 0),
}


KILLS = [
    *((point, False) for point in KILL_POINTS if point != "before a shard"),
    # What all of them leave differs from what one leaves in these alone: later, the first rank is the only one at work,
    # and earlier, nothing is written.
    *((point, True) for point in ("before a shard", "between its files", "before the name")),
]


@pytest.mark.parametrize(
    ("point", "everybody"), KILLS, ids=[f"{point}-{'all' if everybody else 'one'}" for point, everybody in KILLS]
)
def test_killed_at_any_point_it_resumes_to_the_bit(make_runs, point, everybody, whole_run):
    runs = make_runs(sharding=FSDP)
    target, call, rank = KILL_POINTS[point]
    ranks = runs.start("run", 2, patch=patched(target, call, [rank], KILL))
    if everybody:
        ranks.processes[rank].wait()
        ranks.kill()
    ended = ranks.wait(timeout=ENDS_BY_ITSELF_SECONDS)
    assert ended[rank].code == -signal.SIGKILL
    assert ended[1 - rank].code != 0
    if not everybody:
        marker, content = runs.marker("run")
        assert (marker, content["rank"], content["cause"]) == ("FAILED", 1 - rank, "lost rank")
        assert "another rank has ended" in content["message"]
        assert "error: " in ended[1 - rank].output
    published = point in ("before latest", "before pruning", "in a step")
    assert find_checkpoint(runs.path("run")).step == (4 if published else 2)
    first, _ = runs.run("run", 2)
    assert "resuming from" in first.output
    assert runs.losses("run") == whole_run(runs)
    assert runs.marker("run")[0] == "COMPLETED"
    assert not [*(runs.path("run") / "checkpoints").glob(".*")]


@pytest.fixture(scope="module")
def whole_run() -> Callable[[Runs], list[float]]:
    """The losses of a run that nobody interrupts, trained once for all tests that ask for them."""
    known: list[list[float]] = []

    def losses(runs: Runs) -> list[float]:
        if not known:
            runs.run("whole", 2)
            known.append(runs.losses("whole"))
        return known[0]

    return losses


def test_a_rank_killed_under_deepspeed_ends_the_others(make_runs):
    runs = make_runs(sharding={"engine": "deepspeed", "zero_stage": 2})
    point = ("framework.sharding.deepspeed:DeepSpeedEngine.backward", 10, [1], KILL)
    first, _ = runs.start("run", 2, patch=patched(*point)).wait(timeout=ENDS_BY_ITSELF_SECONDS)
    assert first.code == 1 and "another rank has ended" in first.output
    runs.run("run", 2)
    runs.run("whole", 2)
    assert runs.losses("run") == runs.losses("whole")


@pytest.mark.parametrize("adapter", [None, {"kind": "lora", "rank": 2, "alpha": 4.0}], ids=["full", "lora"])
def test_a_run_moves_between_numbers_of_ranks_and_engines(make_runs, adapter):
    runs = make_runs(model__adapter=adapter, training__micro_batch_size=1, training__max_steps=10)
    stations = [
        (4, FSDP),
        (2, FSDP),
        (2, {"engine": "deepspeed", "zero_stage": 3}),
        (4, {"engine": "deepspeed", "zero_stage": 1}),
        (1, {"engine": "single"}),
    ]
    for number, (ranks, sharding) in enumerate(stations):
        runs.run("run", ranks, f"sharding={json.dumps(sharding)}", f"training.max_steps={2 * number + 2}")
    assert runs.losses("run") == pytest.approx(single(runs), rel=1e-5)


@pytest.fixture
def base_model(tmp_path: Path, settings: dict[str, Any]) -> Path:
    """A pretrained model on the disk, in two files."""
    torch.manual_seed(4)
    model = LlamaForCausalLM(LlamaConfig(**settings["model"]["from_config"]))
    model.save_pretrained(tmp_path / "base", max_shard_size="5KB")
    assert len([*(tmp_path / "base").glob("*.safetensors")]) >= 2
    return tmp_path / "base"


@pytest.mark.parametrize("sharding", [FSDP, {"engine": "deepspeed", "zero_stage": 3}], ids=["fsdp", "zero3"])
def test_a_sharded_run_exports_what_one_process_does(make_runs, base_model, tmp_path, sharding):
    adapter = {"kind": "lora", "rank": 2, "alpha": 4.0}
    runs = make_runs(sharding=sharding, model__path=str(base_model), model__adapter=adapter)
    runs.run("run", 2)
    assert runs.losses("run") == pytest.approx(single(runs), rel=1e-5)
    for file in ("adapter_model.safetensors", "model.safetensors"):
        exported = []
        for name in ("run", "single"):
            output = tmp_path / f"{name}-{file}"
            export_run(runs.path(name), output=output, merge_adapter=file == "model.safetensors")
            exported.append(load_file(output / file))
        own, expected = exported
        assert {name: value.shape for name, value in own.items()} == {n: v.shape for n, v in expected.items()}
        for name, value in own.items():
            torch.testing.assert_close(value, expected[name], rtol=1e-4, atol=1e-6)
        if file == "adapter_model.safetensors":
            assert all("lora_" in name for name in own) and any(value.abs().max() > 0 for value in own.values())


def test_dropout_goes_on_as_it_would_have(make_runs):
    adapter = {"kind": "lora", "rank": 2, "alpha": 4.0, "dropout": 0.5}
    runs = make_runs(sharding=FSDP, model__adapter=adapter)
    runs.run("whole", 2)
    runs.run("run", 2, "training.max_steps=2")
    runs.run("run", 2)
    assert runs.losses("run") == runs.losses("whole")


@pytest.mark.parametrize("asked", ["by the file", "by a signal to one rank"])
def test_all_ranks_stop_after_the_step_and_save(make_runs, asked, whole_run):
    runs = make_runs(sharding=FSDP)
    stop = runs.path("run") / "STOP"
    action = f"open('{stop}', 'w')" if asked == "by the file" else "os.kill(os.getpid(), signal.SIGTERM)"
    ended = runs.start("run", 2, patch=patched(STEP, 3, [1], action)).wait()
    assert [end.code for end in ended] == [0, 0]
    assert f"stopped by {'STOP' if asked == 'by the file' else 'SIGTERM'} after step 3" in ended[0].output
    assert runs.marker("run")[0] == "STOPPED"
    checkpoint = find_checkpoint(runs.path("run"))
    assert (checkpoint.step, checkpoint.manifest["world_size"]) == (3, 2)
    runs.run("run", 2)
    assert runs.losses("run") == whole_run(runs)


def test_a_stop_interrupts_an_evaluation_on_all_ranks(make_runs):
    runs = make_runs(sharding=FSDP, training__eval_every_steps=3)
    signal_rank_1 = patched(
        "framework.training.evaluation:evaluation_loss", 1, [1], "os.kill(os.getpid(), signal.SIGTERM)"
    )
    assert [end.code for end in runs.start("run", 2, patch=signal_rank_1).wait()] == [0, 0]
    assert runs.marker("run")[0] == "STOPPED" and runs.records("run", "eval") == []
    assert find_checkpoint(runs.path("run")).step == 3
    runs.run("run", 2)
    runs.run("whole", 2)
    for kind in ("train", "eval"):
        own, other = ([record["loss"] for record in runs.records(name, kind)] for name in ("run", "whole"))
        assert own == other


def test_all_ranks_continue_what_the_first_one_finds_or_refuse_it(make_runs, whole_run):
    runs = make_runs(sharding=FSDP)
    runs.run("run", 2, "training.max_steps=2")
    for end in runs.start("run", 2, "data.sequence_length=40").wait():
        assert end.code == 2 and "data.sequence_length: 32 -> 40" in end.output
        # Not even a small model was built.
        assert "model: " not in end.output
    assert runs.marker("run")[0] == "FAILED"
    # As if the second rank's machine did not see the file yet.
    blind = "import framework.training.resuming as resuming\nif rank: resuming.find_checkpoint = lambda *_: None"
    assert [end.code for end in runs.start("run", 2, patch=blind).wait()] == [0, 0]
    assert runs.losses("run") == whole_run(runs)


def test_what_one_rank_refuses_is_what_the_others_say(make_runs, tmp_path):
    runs = make_runs(sharding=FSDP, data__cache_dir=str(tmp_path / "cache"))
    first, second = runs.start("run", 2, f"data.train={tmp_path / 'nothing.jsonl'}").wait()
    assert (first.code, second.code) == (2, 1)
    assert "error: data.train: no such file or directory" in first.output
    assert "error: rank 1: rank 0 has ended: data.train: no such file or directory" in second.output
    marker, content = runs.marker("run")
    assert (marker, content["rank"], content["code"]) == ("FAILED", 0, 2)


# One rank has a launcher, too, which passes on what every process has been sent.
@pytest.mark.parametrize("ranks", [1, 2])
def test_two_signals_that_come_together_are_one_request(make_runs, ranks):
    runs = make_runs(sharding=FSDP)
    both = "[os.kill(os.getpid(), number) for number in (signal.SIGINT, signal.SIGTERM)]"
    ended = runs.start("run", ranks, patch=patched(STEP, 2, [*range(ranks)], both)).wait()
    assert [end.code for end in ended] == [0] * ranks
    assert runs.marker("run")[0] == "STOPPED"


def test_the_rank_with_an_error_is_the_one_that_is_quoted(make_runs):
    runs = make_runs(sharding=FSDP)
    broken = patched(STEP, 3, [1], "raise OSError('the cable of rank 1 is loose')")
    started = time.monotonic()
    first, second = runs.start("run", 2, patch=broken).wait(timeout=ENDS_BY_ITSELF_SECONDS)
    assert time.monotonic() - started < ENDS_BY_ITSELF_SECONDS
    assert (first.code, second.code) == (1, 1)
    assert "the cable of rank 1 is loose" in second.output
    assert "error: rank 1 has ended: the cable of rank 1 is loose" in first.output
    marker, content = runs.marker("run")
    assert (marker, content["rank"], content["message"]) == ("FAILED", 1, "the cable of rank 1 is loose")


def test_a_loss_that_is_not_finite_on_one_rank_stops_all(make_runs):
    runs = make_runs(sharding=FSDP)
    poison = """
from framework.training.objective import Objective
plain, calls = Objective.loss, []
def loss(*arguments):
    calls.append(1)
    return plain(*arguments) * (float("nan") if rank == 1 and len(calls) == 5 else 1.0)
Objective.loss = loss
"""
    ended = runs.start("run", 2, patch=poison).wait()
    for end in ended:
        assert end.code == 1
        assert "step 3: the loss is nan" in end.output and "step-00000002" in end.output
    named = [end.output.split("counted from 0: ")[1].split(";")[0] for end in ended]
    assert named[0] == named[1] and named[0].count(",") == 7


@pytest.mark.parametrize(
    ("overrides", "ranks", "message"),
    [
        ([], 2, "sharding.engine: 'single' runs in one process, but the launcher started 2"),
        (["sharding.engine=fsdp"], 3, "is no multiple of training.micro_batch_size x ranks = 2 x 3"),
        (["sharding.engine=fsdp", "sharding.replicas=3"], 2, "3 copies cannot share 2 ranks evenly"),
    ],
)
def test_what_a_launch_cannot_run_is_refused_before_anything_starts(make_runs, overrides, ranks, message):
    runs = make_runs()
    for end in runs.start("run", ranks, *overrides).wait():
        assert end.code == 2 and message in end.output
    assert not runs.path("run").exists()


def test_a_run_that_is_refused_has_not_stopped_any_more(make_runs):
    runs = make_runs(sharding=FSDP)
    runs.run("run", 1, "training.max_steps=1")
    assert runs.marker("run")[0] == "COMPLETED"
    (end,) = runs.start("run", 1, "sharding.replicas=2").wait()
    assert end.code == 2
    marker, content = runs.marker("run")
    assert (marker, content["code"]) == ("FAILED", 2) and "2 copies cannot share 1 ranks" in content["message"]


def test_runs_of_any_engine_follow_each_other_in_one_process_and_leave_nothing(make_runs, tmp_path):
    runs = make_runs()
    stages = [{"engine": "deepspeed", "zero_stage": stage} for stage in (3, 3, 2, 0)]
    shardings = [*stages, {"engine": "single"}, FSDP, stages[1]]
    run(1, tmp_path / "outputs", train_one_after_the_other, str(runs.config), shardings, str(tmp_path))
    assert json.loads((tmp_path / "left.json").read_text()) == [[0, True, False]] * len(shardings)
    expected = runs.losses("4")
    for number in range(len(shardings)):
        assert runs.losses(str(number)) == pytest.approx(expected, rel=1e-5)
