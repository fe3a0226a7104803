"""`launchers/train.py` in processes of its own, one of them as people start it."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from forked import KILL, TRAIN, Forked, fork_script, patched
from safetensors.torch import load_file

import framework
from framework.checkpoint import find_checkpoint
from framework.config import load_config
from framework.training.run_directory import MARKERS

Start = Callable[..., Forked]


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    """Start the launcher on a config, with the code `patch` executed before."""
    started: list[Forked] = []

    def start(config: Path, *options: str, patch: str = "") -> Forked:
        options = ("--config", str(config), *options)
        started.append(fork_script(tmp_path.parent / f"{tmp_path.name}-output", TRAIN, options, patch=patch))
        return started[-1]

    yield start
    for process in started:
        process.kill()


def wait_for_step(run_dir: Path, step: int) -> None:
    metrics = run_dir / "metrics.jsonl"
    deadline = time.monotonic() + 240
    while time.monotonic() < deadline:
        if metrics.exists() and len(metrics.read_text().splitlines()) >= step:
            return
        time.sleep(0.05)
    raise AssertionError(f"{metrics} did not reach step {step}")


def train_lines(run_dir: Path) -> list[dict[str, Any]]:
    lines = map(json.loads, (run_dir / "metrics.jsonl").read_text().splitlines())
    return [line for line in lines if line["kind"] == "train"]


def losses(run_dir: Path) -> list[float]:
    return [line["loss"] for line in train_lines(run_dir)]


def markers(run_dir: Path) -> list[str]:
    return [name for name in MARKERS if (run_dir / name).exists()]


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    return tmp_path / "run"


def test_killed_in_the_middle_of_a_step_it_resumes_to_the_bit(
    write_config: Callable[..., Path], run_dir: Path, start: Start
):
    config = write_config(checkpoint__every_steps=2)
    whole = start(config, "--set", f"run.output_dir={run_dir}-whole").wait()
    assert whole.code == 0, whole.stderr
    kill = patched("framework.sharding.single:SingleEngine.backward", 10, [0], KILL)
    assert start(config, patch=kill).wait().code == -signal.SIGKILL
    # Two micro-batches a step: it died in step 5, after the checkpoint of step 4.
    assert markers(run_dir) == [] and len(losses(run_dir)) == 4
    resumed = start(config, "--resume", "auto").wait()
    assert resumed.code == 0, resumed.stderr
    assert "resuming from" in resumed.stdout
    whole_dir = Path(f"{run_dir}-whole")
    assert losses(run_dir) == losses(whole_dir)
    assert markers(run_dir) == ["COMPLETED"]
    assert count_files(run_dir) == count_files(whole_dir)
    weights = [
        load_file(directory / "checkpoints" / "step-00000006" / "model.safetensors")
        for directory in (run_dir, whole_dir)
    ]
    assert weights[0].keys() == weights[1].keys()
    assert all((weights[0][name] == weights[1][name]).all() for name in weights[0])


@pytest.mark.parametrize(
    ("function", "call", "action", "kept"),
    [
        # A save writes two files.
        ("framework.checkpoint.saver:write_fragments", 3, "args[0].write_bytes(b'half of it'); " + KILL, 2),
        ("framework.checkpoint.saving:write_manifest", 2, KILL, 2),
        ("framework.checkpoint.saving:publish", 2, KILL, 2),
        ("framework.checkpoint.saving:move_latest", 2, KILL, 4),
        ("framework.checkpoint.saving:move_best", 2, KILL, 4),
        # The first removes the temporary directory in which the tokenizer was hashed.
        ("shutil:rmtree", 2, "(args[0] / 'model.safetensors').unlink(); " + KILL, 4),
    ],
    ids=[
        "while writing a shard",
        "before the manifest",
        "before the rename",
        "before latest",
        "before best",
        "while pruning",
    ],
)
def test_killed_while_saving_it_resumes_to_the_bit(
    write_config: Callable[..., Path], run_dir: Path, start: Start, function: str, call: int, action: str, kept: int
):
    config = write_config(
        checkpoint__every_steps=2, checkpoint__keep_last=1, checkpoint__keep_best=1, training__eval_every_steps=2
    )
    framework.train(load_config(config, [f"run.output_dir={run_dir}-whole"]))
    killed = start(config, patch=patched(function, call, [0], action)).wait()
    assert killed.code == -signal.SIGKILL, killed.output
    assert find_checkpoint(run_dir).step == kept
    resumed = framework.train(load_config(config))
    assert resumed.status == "completed"
    whole = Path(f"{run_dir}-whole")
    assert losses(run_dir) == losses(whole)
    assert count_files(run_dir) == count_files(whole)
    assert all((run_dir / "checkpoints" / name).read_text() == "step-00000006\n" for name in ("latest", "best"))


def count_files(run_dir: Path) -> list[str]:
    return sorted(str(path.relative_to(run_dir)) for path in run_dir.rglob("*") if path.is_file())


def check_stopped(run_dir: Path, name: str, code: int, output: str) -> None:
    """By a request of this name, with a checkpoint of the last step."""
    assert code == 0, (name, output)
    assert f"stopped by {name} after step" in output
    assert "Traceback" not in output, "of no thread that makes batches either"
    assert markers(run_dir) == ["STOPPED"], name
    assert json.loads((run_dir / "STOPPED").read_text())["cause"] == name
    step = train_lines(run_dir)[-1]["step"]
    manifest = json.loads((run_dir / "checkpoints" / f"step-{step:08d}" / "manifest.json").read_text())
    assert manifest["step"] == step


def test_signals_and_the_stop_file_end_a_run_with_a_checkpoint(
    write_config: Callable[..., Path], run_dir: Path, start: Start
):
    config = write_config(training__max_steps=100_000)
    requests = {"SIGINT": signal.SIGINT, "SIGUSR2": signal.SIGUSR2, "STOP": None}
    directories = {name: Path(f"{run_dir}-{name}") for name in requests}
    processes = {name: start(config, "--set", f"run.output_dir={path}") for name, path in directories.items()}
    for name, process in processes.items():
        wait_for_step(directories[name], 3)
        if requests[name] is None:
            (directories[name] / "STOP").touch()
        else:
            process.signal(requests[name])
    for name, process in processes.items():
        ended = process.wait()
        check_stopped(directories[name], name, ended.code, ended.output)
    # A request to stop does not outlive the start that it was for.
    step = train_lines(directories["STOP"])[-1]["step"]
    framework.train(load_config(config, [f"run.output_dir={directories['STOP']}", f"training.max_steps={step + 2}"]))
    assert markers(directories["STOP"]) == ["COMPLETED"]
    assert [line["step"] for line in train_lines(directories["STOP"])] == list(range(1, step + 3))


def test_a_signal_ends_what_was_started_from_a_shell_with_a_checkpoint(
    write_config: Callable[..., Path], run_dir: Path
):
    command = [sys.executable, str(TRAIN), "--config", str(write_config(training__max_steps=100_000))]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment
    ) as process:
        try:
            wait_for_step(run_dir, 3)
            process.send_signal(signal.SIGTERM)
            output, _ = process.communicate(timeout=120)
        finally:
            process.kill()
    check_stopped(run_dir, "SIGTERM", process.returncode, output)


def test_a_second_signal_ends_the_process_at_once(write_config: Callable[..., Path], run_dir: Path, start: Start):
    hold = "time.sleep(0.01); time.sleep(1e6)"
    process = start(write_config(), patch=patched("framework.sharding.single:SingleEngine.backward", 3, [0], hold))
    wait_for_step(run_dir, 1)
    time.sleep(0.5)
    process.signal(signal.SIGTERM)
    time.sleep(0.5)
    assert process.is_running
    process.signal(signal.SIGTERM)
    assert process.wait(timeout=30).code == 128 + signal.SIGTERM
    failed = json.loads((run_dir / "FAILED").read_text())
    assert (failed["code"], failed["cause"]) == (128 + signal.SIGTERM, "second signal")


def test_a_signal_before_training_ends_cleanly(write_config: Callable[..., Path], run_dir: Path, start: Start):
    hold = f"open({str(run_dir.parent / 'prepared')!r}, 'w').close(); time.sleep(1e6)"
    process = start(write_config(), patch=patched("framework.sharding.single:SingleEngine.prepare", 1, [0], hold))
    while process.is_running and not (run_dir.parent / "prepared").exists():
        time.sleep(0.05)
    process.signal(signal.SIGINT)
    ended = process.wait(timeout=30)
    assert ended.code == 0
    assert "Traceback" not in ended.output
    assert markers(run_dir) == ["STOPPED"]


def test_a_wrong_config_exits_2_without_importing_torch(write_config: Callable[..., Path], run_dir: Path):
    config = write_config(training__max_stepz=3)
    script = (
        "import runpy, sys\n"
        f"sys.argv = ['train.py', '--config', {str(config)!r}]\n"
        "try:\n"
        f"    runpy.run_path({str(TRAIN)!r}, run_name='__main__')\n"
        "except SystemExit as end:\n"
        "    print(end.code, 'torch' in sys.modules)\n"
    )
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120)
    assert result.stdout.strip() == "2 False"
    assert result.stderr.startswith("error: ")
    assert "training.max_stepz" in result.stderr and "training.max_steps" in result.stderr
    assert not run_dir.exists()


def test_an_exploding_loss_exits_1_and_keeps_the_checkpoint(
    write_config: Callable[..., Path], run_dir: Path, start: Start
):
    config = write_config()
    framework.train(load_config(config, ["training.max_steps=2"]))
    result = start(config, "--set", "optimizer.learning_rate=1e30").wait()
    assert result.code == 1
    assert result.stderr.splitlines()[-1].startswith("error: step ")
    assert markers(run_dir) == ["FAILED"]
    assert (run_dir / "checkpoints" / "step-00000002" / "manifest.json").exists()


def test_a_full_disk_exits_1_and_loses_nothing(write_config: Callable[..., Path], tmp_path: Path, start: Start):
    """On a real small disk where mounting is allowed; elsewhere the save fails as it would there."""
    disk = tmp_path / "disk"
    disk.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(disk)]
    mounted = shutil.which("mount") is not None and subprocess.run(command, capture_output=True).returncode == 0
    full = patched("framework.checkpoint.saving:write_state", 1, [0], "raise OSError(28, 'No space left on device')")
    try:
        run_dir = disk / "run"
        config = write_config(checkpoint__every_steps=2, run__output_dir=str(run_dir))
        framework.train(load_config(config, ["training.max_steps=2"]))
        if mounted:
            (disk / "filler").write_bytes(bytes(os.statvfs(disk).f_bavail * os.statvfs(disk).f_frsize - 32 * 1024))
        result = start(config, patch="" if mounted else full).wait()
        assert result.code == 1
        assert "disk is full" in result.stderr and str(run_dir) in result.stderr
        assert markers(run_dir) == ["FAILED"]
        (disk / "filler").unlink(missing_ok=True)
        resumed = framework.train(load_config(config))
        assert resumed.status == "completed" and len(losses(run_dir)) == 6
    finally:
        if mounted:
            subprocess.run(["umount", str(disk)], check=True)


def test_a_dry_run_prints_the_plan_and_touches_nothing(write_config: Callable[..., Path], run_dir: Path, start: Start):
    before = sorted(run_dir.parent.iterdir())
    result = start(write_config(), "--dry-run", "--set", "data.train=not/here.jsonl").wait()
    assert result.code == 0, result.stderr
    assert "2,040, of which 2,040 are trained" in result.stdout
    assert "8 sequences a step = 4 (micro-batch) x 2 (accumulation) x 1 (rank)" in result.stdout
    assert "not/here.jsonl" in result.stdout
    assert sorted(run_dir.parent.iterdir()) == sorted([*before, run_dir.parent / "config.json"])


def test_samples_are_shown(write_config: Callable[..., Path], run_dir: Path, start: Start):
    result = start(write_config(), "--inspect-data", "2").wait()
    assert result.code == 0, result.stderr
    assert "48 samples" in result.stdout
    assert not run_dir.exists()


@pytest.mark.parametrize("options", [["--deepspeed_config", "zero.json"], ["--inspect-data", "0"], ["--resume", "no/"]])
def test_arguments_that_cannot_be_followed_exit_2(
    write_config: Callable[..., Path], run_dir: Path, start: Start, options: list[str]
):
    result = start(write_config(), *options).wait()
    assert result.code == 2
    assert result.stderr.startswith(f"error: {options[0]}: ")
    assert not run_dir.exists()
