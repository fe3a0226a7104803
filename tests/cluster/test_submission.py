"""`launchers/submit.py` without a cluster: what it plans, refuses and writes."""

from __future__ import annotations

import importlib.util
import json
import re
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from changed_settings import change
from small_run import small_run
from torch.distributed.run import get_args_parser

ROOT = Path(__file__).parents[2]
spec = importlib.util.spec_from_file_location("submit", ROOT / "launchers" / "submit.py")
submit = importlib.util.module_from_spec(spec)
spec.loader.exec_module(submit)


@pytest.fixture
def config(tmp_path: Path, tiny_tokenizer_path: Path) -> Callable[..., str]:
    """Write a config to a file of a directory of this name; its path."""

    def write(name: str = "a", **changes: Any) -> str:
        home = tmp_path / name
        home.mkdir()
        settings = small_run(home, tiny_tokenizer_path) | {"sharding": {"engine": "fsdp"}}
        settings["hardware"] = {"gpus_per_node": 2}
        settings["training"]["micro_batch_size"] = 1
        change(settings, changes)
        path = home / "config.json"
        path.write_text(json.dumps(settings))
        return str(path)

    return write


@pytest.fixture
def call(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Callable[..., tuple[int, str, str]]:
    """`launchers/submit.py`, in this process: exit code and both streams."""

    def run(*options: str) -> tuple[int, str, str]:
        monkeypatch.setattr("sys.argv", ["submit.py", *options])
        monkeypatch.setenv("COLUMNS", "200")
        try:
            code = submit.run_command(submit.main)
        except SystemExit as ended:
            code = ended.code
        return code, *capsys.readouterr()

    return run


DRY = ("--dry-run", "--device", "cpu", "--labelled-share", "1")


def test_the_script_is_one_for_bash_and_touches_nothing(config, call) -> None:
    path = config('it\'s "a" $(b)', cluster__setup=["module load cuda", "ulimit -l unlimited"])
    code, script, said = call("--config", path, *DRY, "--nodes", "2", "--time", "1-00:00:00")
    assert code == 0, said
    assert "4 GPUs on 2 machines" in said
    assert re.search(r"^1 +FSDP2 +selective, linears +exact", said, flags=re.MULTILINE)
    assert subprocess.run(["bash", "-n"], input=script, text=True, capture_output=True).stderr == ""
    for line in ("#SBATCH --nodes=2", "#SBATCH --time=1-00:00:00", "module load cuda", "ulimit -l unlimited"):
        assert line in script.splitlines()
    run = Path(path).parent / "run"
    (assigned,) = re.findall(r"^run=.*$", script, flags=re.MULTILINE)
    shown = subprocess.run(["bash", "-c", f'{assigned}; printf %s "$run"'], text=True, capture_output=True).stdout
    assert shown == str(run) and not run.exists()


def test_torchrun_knows_its_options(config, call) -> None:
    code, script, said = call("--config", config(), *DRY, "--nodes", "2")
    assert code == 0, said
    options = script.partition("torch.distributed.run")[2].partition("launchers/train.py")[0]
    named = re.findall(r"(--[a-z-]+)=", options)
    assert len(named) > 4
    assert set(named) <= set(get_args_parser()._option_string_actions)


def test_deepspeed_launches_from_the_first_machine(config, call, tmp_path: Path) -> None:
    own = tmp_path / "own options.json"
    own.write_text("{}")
    deepspeed = {"sharding__engine": "deepspeed", "sharding__zero_stage": 2, "cluster__launcher": "deepspeed"}
    # A task that is not planned takes no time.
    path = config(**deepspeed, model__task="masked_lm", data__format="text")
    code, script, said = call("--config", path, *DRY, "--nodes", "2", "--deepspeed_config", str(own))
    assert code == 0, said
    assert "srun" not in script
    assert '--hostfile="$run/slurm/hostfile" --launcher=pdsh --master_addr="$host"' in script
    assert f"--config \"$run/slurm/config.json\" --deepspeed_config '{own}' &" in script


def test_sizes_that_cannot_be_used_are_said(config, call) -> None:
    code, script, said = call("--config", config(), *DRY, "--nodes", "1-4")
    assert code == 0, said
    assert "#SBATCH --nodes=1-4" in script
    # Eight sequences cannot be split over six ranks.
    assert "on 3 machines: one would be idle" in said
    assert [line.partition(":")[0] for line in said.splitlines() if line.startswith("on ")] == [
        "on 3 machines",
        "on 1 machine",
        "on 2 machines",
    ]


def test_what_the_planner_does_not_know_is_submitted_with_a_word(config, call) -> None:
    code, _, said = call("--config", config(), *DRY, "--nodes", "1", "--set", "model.task=masked_lm")
    assert code == 2 and "model.task" in said
    path = config("b", model__task="masked_lm", data__format="text")
    code, script, said = call("--config", path, *DRY, "--nodes", "1")
    assert code == 0, said
    assert "not planned, so whether it fits is not known: model.task: the planner knows causal_lm only" in said
    assert script.startswith("#!/bin/bash\n")


@pytest.mark.parametrize(
    ("options", "code", "message"),
    [
        (["--nodes", "1"], 2, "hardware.gpu_memory: say how much an accelerator of the cluster has"),
        (["--nodes", "3", "--device", "cpu"], 2, "training.global_batch_size: 8 is no multiple of"),
        (["--nodes", "0"], 2, "'0' is no number of machines and no range such as 2-4"),
        (["--nodes", "3-2"], 2, "'3-2' is no number of machines"),
        (["--time", "1:2"], 2, 'cluster.time: expected a string such as "12:00:00"'),
        (["--sbatch", "nodes=4"], 2, "cluster.sbatch: hardware.nodes says nodes"),
        (["--at-once", "2"], 2, "--at-once: a number of runs of --configs"),
        (["--set", "clutser.time=60"], 2, "did you mean cluster?"),
        (["--nodes", "1", "--gpu-memory", "1MiB"], 3, "nothing fits on 1 machine: the smallest plan takes"),
    ],
)
def test_bad_options_and_plans_are_refused(config, call, options: list[str], code: int, message: str) -> None:
    path = config()
    ended, printed, said = call("--config", path, "--dry-run", "--labelled-share", "1", *options)
    assert (ended, printed) == (code, "")
    assert message in said
    assert not (Path(path).parent / "run").exists()


def test_without_slurm_nothing_is_planned(config, call, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    code, _, said = call("--config", config(), "--device", "cpu")
    assert code == 2 and said.startswith("error: sbatch: no such command; submit on a machine of the cluster")


def test_runs_of_an_array_share_what_its_script_says(config, call) -> None:
    first = config("a")
    others = [config("b", cluster__partition="gpu"), config("c", hardware__nodes=2)]
    others.append(config("d", run__output_dir=str(Path(first).parent / "run")))
    code, _, said = call("--configs", first, *others, *DRY)
    assert code == 2
    assert said.splitlines() == [
        f"error: {others[0]}: cluster is another one than in {first}; an array asks for the same",
        f"{others[1]}: hardware.nodes is another one than in {first}; an array asks for the same",
        f"{others[2]}: run.output_dir is that of {first}; each run needs its own",
    ]
    code, script, said = call("--configs", first, config("e"), *DRY, "--at-once", "1")
    assert code == 0, said
    assert "#SBATCH --array=0-1%1" in script
    home = Path(first).parents[1]
    assert f"#SBATCH --output={home}/a/slurm/%A_%a.log" in script
    assert f"runs=(\n    {home}/a/run\n    {home}/e/run\n)\nrun=${{runs[SLURM_ARRAY_TASK_ID]}}" in script
    assert subprocess.run(["bash", "-n"], input=script, text=True, capture_output=True).stderr == ""
