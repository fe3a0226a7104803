"""`"auto"` at the launch of a run: what it takes, what it keeps, and what it goes on with."""

from __future__ import annotations

import json
import re
import runpy
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from recorded_here import recorded_here

import framework
from framework.config import Config, load_config
from framework.errors import NoPlanError, RunError, UserError
from framework.planner import advice
from framework.planner.drift import drift_records
from framework.planner.labelled import labelled_share_of
from framework.planner.launching import LaunchPlan, launch_cluster, plan_launch
from framework.planner.overrides import with_overrides
from framework.sharding.single import SingleEngine
from framework.training import launch_plan, start

pytestmark = pytest.mark.slow

TRAIN = Path(__file__).parents[2] / "launchers" / "train.py"
OPEN = {
    "selection__ratio": "auto",
    "retention__policy": "auto",
    "retention__retain_linears": False,
    "retention__kv_format": "model",
    "training__micro_batch_size": "auto",
    "hardware__gpu_memory": "1GiB",
}


@pytest.fixture(autouse=True)
def record_here() -> Iterator[None]:
    with recorded_here():
        yield


@pytest.fixture
def open_config(make_config: Callable[..., Config]) -> Callable[..., Config]:
    """A run that leaves open what a single process can choose."""
    return lambda **changes: make_config(**(OPEN | changes))


def plans_of(config: Config, ranks: int = 1) -> LaunchPlan:
    """What the planner finds for it."""
    cluster = launch_cluster(config, nodes=1, ranks_per_node=ranks)
    return plan_launch(config, cluster, labelled_share_of(config), lambda line: None)


def mib(size: float) -> str:
    """As `hardware.gpu_memory` takes it."""
    return f"{size / (1 << 20):.7f}MiB"


def written(config: Config, name: str) -> dict[str, Any]:
    return json.loads((Path(config.run.output_dir) / name).read_text())


def records(config: Config) -> list[dict[str, Any]]:
    lines = map(json.loads, (Path(config.run.output_dir) / "metrics.jsonl").read_text().splitlines())
    return [line for line in lines if line["kind"] == "train"]


def losses(config: Config) -> list[float]:
    return [record["loss"] for record in records(config)]


@pytest.fixture
def tight(open_config: Callable[..., Config]) -> Config:
    """The same under a budget at which a part of the context has to go without gradient."""
    loose = plans_of(open_config())
    (least, *_) = sorted(loose.fallbacks, key=lambda plan: plan.reserved_bytes)
    return open_config(hardware__gpu_memory=mib(least.reserved_bytes))


@pytest.mark.parametrize("budget", ["1GiB", "tight"])
def test_a_run_takes_what_the_planner_finds(open_config, request, budget, capsys):
    config = open_config() if budget == "1GiB" else request.getfixturevalue(budget)
    expected = plans_of(config)
    chosen = expected.planned.plans[0]
    assert set(chosen.overrides) >= set(config.open_keys)
    assert (chosen.fidelity == "exact") == (budget == "1GiB")
    framework.train(config)
    assert written(config, "config.json") == chosen.config.to_json()
    plan = written(config, "plan.json")
    assert plan["chosen"] == json.loads(json.dumps(chosen.to_json()))
    assert plan["plans"] == json.loads(json.dumps([each.to_json() for each in expected.planned.plans]))
    assert plan["overrides"] == chosen.overrides
    assert plan["fits"] and plan["budget_bytes"] == expected.planned.budget.bytes
    assert {record["predicted_peak_memory_bytes"] for record in records(config)} == {chosen.point.ledger.peak}
    said = capsys.readouterr().out
    assert "labelled share: " in said and f"budget: {config.hardware.gpu_memory}" not in said
    assert "chosen" in said and "peak in" in said and "launchers/train.py" not in said
    # The same settings, given, are the same run.
    given = with_overrides(config, {**chosen.overrides, "run.output_dir": f"{config.run.output_dir}-given"})
    framework.train(given)
    assert losses(given) == losses(config)
    assert given.sha256() == Config.model_validate_json(json.dumps(written(config, "config.json"))).sha256()


def test_a_run_offloads_where_nothing_else_fits(open_config):
    fixed = {"selection__ratio": 1.0, "retention__policy": "checkpoint", "training__micro_batch_size": 2}
    whole = {**fixed, "sharding__engine": "single", "training__max_steps": 2}
    least = plans_of(open_config(**whole)).planned.plans[0]
    tight = mib(least.reserved_bytes - 1)
    config = open_config(**fixed, sharding__engine="auto", training__max_steps=2, hardware__gpu_memory=tight)
    framework.train(config)
    resolved = Config.model_validate_json(json.dumps(written(config, "config.json")))
    assert resolved.sharding.offload_optimizer and resolved.sharding.engine in ("fsdp", "deepspeed")
    plan = written(config, "plan.json")["chosen"]
    assert plan["offload_optimizer"] and plan["host_bytes"] > 0
    assert plan["peak_allocated_bytes"] < least.point.ledger.peak
    alone = {"sharding.engine": "single", "run.output_dir": f"{config.run.output_dir}-alone"}
    given = with_overrides(config, {**least.overrides, **alone})
    framework.train(given)
    assert losses(config) == pytest.approx(losses(given), rel=1e-5)


def test_fallbacks_are_the_plans_of_smaller_budgets(open_config):
    found = plans_of(open_config()).to_json()
    chosen = found["chosen"]["peak_reserved_bytes"]
    reserved = [each["peak_reserved_bytes"] for each in found["fallbacks"]]
    assert len(reserved) >= 2 and reserved == sorted(reserved, reverse=True)
    assert reserved[0] <= 0.95 * chosen and reserved[-1] <= 0.5 * chosen
    half = open_config(hardware__gpu_memory=mib(0.5 * chosen))
    assert plans_of(half).planned.plans[0].overrides == found["fallbacks"][-1]["overrides"]


def test_a_budget_that_cannot_be_met_exits_3_before_anything_is_loaded(open_config, monkeypatch, tmp_path, capsys):
    config = open_config(hardware__gpu_memory="0.01MiB")
    monkeypatch.setattr(advice, "MOST_RECORDINGS", 0)
    monkeypatch.setattr(start, "shared_run_data", None)
    with pytest.raises(NoPlanError, match=r"^no plan fits: the smallest that the config permits takes 0\.\d MiB"):
        framework.train(config)
    assert not Path(config.run.output_dir).exists()
    said = capsys.readouterr().out
    assert "nothing fits" in said and "peak in" in said
    code, _, error = command("--config", str(tmp_path / "config.json"), monkeypatch=monkeypatch, capsys=capsys)
    assert code == 3 and error.startswith("error: no plan fits: ")
    assert not Path(config.run.output_dir).exists()


def command(*options: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> tuple[int, str, str]:
    """`launchers/train.py` in this process: exit code and output."""
    monkeypatch.setattr(sys, "argv", [str(TRAIN), *options])
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(TRAIN), run_name="__main__")
    captured = capsys.readouterr()
    return ended.value.code, captured.out, captured.err


def test_a_dry_run_shows_the_plan_and_touches_nothing(open_config, tmp_path, monkeypatch, capsys):
    config = open_config()
    monkeypatch.setattr(advice, "MOST_RECORDINGS", 0)
    before = sorted(tmp_path.iterdir())
    options = ("--config", str(tmp_path / "config.json"), "--dry-run")
    code, said, _ = command(*options, monkeypatch=monkeypatch, capsys=capsys)
    assert code == 0
    assert "chosen        exact" in said
    batch = plans_of(config).planned.plans[0].config.micro_batch_size
    assert f"8 sequences a step = {batch} (micro-batch) x {8 // batch} (accumulation) x 1 (rank)" in said
    code, said, error = command(
        *options, "--set", "hardware.gpu_memory=0.01MiB", monkeypatch=monkeypatch, capsys=capsys
    )
    assert code == 3 and "nothing fits" in said and error.startswith("error: no plan fits")
    options = ("--config", str(tmp_path / "config.json"), "--inspect-data", "1")
    code, said, _ = command(*options, monkeypatch=monkeypatch, capsys=capsys)
    assert code == 0 and "48 samples" in said
    assert sorted(tmp_path.iterdir()) == before


def test_a_resumed_run_keeps_its_plan(tight, open_config, monkeypatch, capsys):
    whole = with_overrides(tight, {"run.output_dir": f"{tight.run.output_dir}-whole"})
    framework.train(whole)
    framework.train(with_overrides(tight, {"training.max_steps": 2}))
    first = written(tight, "plan.json")
    capsys.readouterr()
    with monkeypatch.context() as patch:
        patch.setattr(launch_plan, "plan_launch", None)
        framework.train(with_overrides(tight, {"training.max_steps": 4, "checkpoint.every_steps": 3}))
    said = capsys.readouterr().out
    assert "plan: that of " in said and "step-00000002: selection.ratio 0." in said
    kept = written(tight, "plan.json")
    assert kept == first | {"plans": first["plans"][:1]}
    assert "resuming with another setting" not in said
    # With more memory a new run would be exact; this one goes on as it was.
    loose = open_config()
    assert plans_of(loose).planned.plans[0].fidelity == "exact"
    framework.train(loose)
    said = capsys.readouterr().out
    ratio = first["overrides"]["selection.ratio"]
    before = f"{first['budget_bytes']:,} bytes"
    assert f"plan: made anew, with selection.ratio {ratio} as before: {before} -> 1,073,741,824 bytes" in said
    assert written(loose, "config.json")["selection"]["ratio"] == ratio
    assert written(loose, "plan.json")["overrides"]["selection.ratio"] == ratio
    assert losses(loose) == pytest.approx(losses(whole), rel=1e-5)
    # What was made anew is what is taken from then on.
    with monkeypatch.context() as patch:
        patch.setattr(launch_plan, "plan_launch", None)
        framework.train(with_overrides(loose, {"training.max_steps": 7}))


def test_a_checkpoint_that_was_not_planned_fixes_what_it_learns(open_config, make_config, capsys):
    values = {"selection__ratio": "labelled", "retention__policy": "selective", "training__micro_batch_size": 2}
    framework.train(make_config(**values, retention__retain_linears=False, training__max_steps=2))
    config = open_config(training__max_steps=4)
    assert plans_of(config).planned.plans[0].fidelity == "exact"
    framework.train(config)
    said = capsys.readouterr().out
    assert 'made anew, with selection.ratio "labelled" as before: the checkpoint\'s run was not planned' in said
    resolved = written(config, "config.json")
    assert (resolved["selection"]["ratio"], resolved["retention"]["policy"]) == ("labelled", "selective")
    conflict = with_overrides(config, {"selection.strategy": "uniform", "training.max_steps": 6})
    with pytest.raises(UserError, match=r'trained with selection\.ratio "labelled", which this config does not permit'):
        framework.train(conflict)


def test_the_resolved_config_goes_on_with_the_prediction(open_config):
    config = open_config(training__max_steps=2)
    framework.train(config)
    plan = written(config, "plan.json")
    given = load_config(Path(config.run.output_dir) / "config.json", ["training.max_steps=4"])
    framework.train(given)
    assert written(config, "plan.json") == plan
    other = load_config(Path(config.run.output_dir) / "config.json", ["training.micro_batch_size=1"])
    framework.train(with_overrides(other, {"training.max_steps": 6}))
    assert written(config, "plan.json")["chosen"]["peak_allocated_bytes"] is None
    assert [record["predicted_peak_memory_bytes"] is None for record in records(config)] == [False] * 4 + [True] * 2


def test_without_an_accelerator_one_has_to_be_described(open_config):
    config = open_config(hardware__gpu_memory=None)
    keys = r"selection\.ratio, retention\.policy, training\.micro_batch_size"
    with pytest.raises(UserError, match=rf'^{keys}: "auto" is chosen for the memory.*hardware\.gpu_memory=') as caught:
        framework.train(config)
    assert caught.value.exit_code == 2
    assert not Path(config.run.output_dir).exists()


@pytest.fixture
def full_rows(tmp_path: Path) -> dict[str, Any]:
    """Changes that make every row full, as the planner takes them to be, but for a padding token in every other one."""
    lines = [json.dumps({"text": chr(97 + number % 26) * (32 - number % 2)}) for number in range(48)]
    (tmp_path / "text.jsonl").write_text("\n".join(lines))
    path = str(tmp_path / "text.jsonl")
    return {"data__train": path, "data__eval": None, "data__format": "text", "logging__track_cpu_memory": True}


def test_the_second_step_is_compared_with_the_plan(open_config, full_rows, monkeypatch, tmp_path, capsys):
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "profiles"))
    config = open_config(**full_rows)
    framework.train(config)
    (line,) = [line for line in capsys.readouterr().out.splitlines() if "the plan's" in line]
    step = records(config)[1]
    assert line.startswith("step 2 takes ") and "it is kept" not in line
    assert step["peak_memory_bytes"] == pytest.approx(step["predicted_peak_memory_bytes"], rel=0.01)
    assert drift_records("cpu") == []


def test_drift_is_a_warning_and_kept(open_config, monkeypatch, tmp_path, capsys):
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "profiles"))
    # Half of each row is padding that the collator leaves out, and the planner does not.
    config = open_config(logging__track_cpu_memory=True)
    framework.train(config)
    (line,) = [line for line in capsys.readouterr().out.splitlines() if "the plan's" in line]
    assert line.startswith("warning: step 2 takes ") and line.endswith("over 3%; it is kept for calibration")
    (kept,) = drift_records("cpu")
    step = records(config)[1]
    assert (kept.measured, kept.predicted) == (step["peak_memory_bytes"], step["predicted_peak_memory_bytes"])
    assert f"{kept.error:.2%} above that" in line and kept.error > 0.03
    resolved = Config.model_validate_json(json.dumps(written(config, "config.json")))
    assert kept.config == resolved.sha256() and kept.versions["torch"] == torch.__version__


def test_when_memory_runs_out_the_next_plan_is_named(open_config, full_rows, monkeypatch):
    config = open_config(**full_rows)
    plain, calls = SingleEngine.step, []

    def step(engine, **arguments):
        calls.append(1)
        if len(calls) == 3:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 KiB.")
        return plain(engine, **arguments)

    monkeypatch.setattr(SingleEngine, "step", step)
    with pytest.raises(RunError) as caught:
        framework.train(config)
    lines = [line.strip() for line in str(caught.value).splitlines()]
    planned, reached, held, following = lines[2:6]
    plan = written(config, "plan.json")
    chosen, phase = plan["chosen"]["peak_allocated_bytes"], plan["chosen"]["binding_phase"]
    assert planned == f"planned: {chosen / 1024:.2f} KiB at the peak ({phase}), of 1.00 GiB that a rank may take"
    assert re.fullmatch(r"reached: [0-9.]+ KiB, and 20\.00 KiB more was asked for", reached)
    # 2,040 parameters, their gradients and two moments in float32, the steps of 20 tensors, two buffers of positions.
    size = 4 * 2040
    assert held.startswith(
        f"held: weights {(size + 16) / 1024:.2f} KiB, gradients {size / 1024:.2f} KiB, optimizer state "
    )
    fallback = plan["fallbacks"][0]
    assert fallback["peak_allocated_bytes"] < chosen - 20 * 1024
    options = " ".join(f"--set {key}={value}" for key, value in fallback["overrides"].items())
    assert following.startswith(f"next plan: {options} (same result), ")
    assert following.endswith(f"KiB at the peak instead of {chosen / 1024:.2f} KiB")
    assert lines[6].startswith("to try: training.micro_batch_size ")
    marker = written(config, "FAILED")
    assert marker["code"] == 1 and marker["message"] == str(caught.value)
    monkeypatch.setattr(SingleEngine, "step", plain)
    # It goes on with what was named, without another plan.
    monkeypatch.setattr(launch_plan, "plan_launch", None)
    result = framework.train(with_overrides(config, fallback["overrides"]))
    assert (result.status, result.step) == ("completed", 6)
