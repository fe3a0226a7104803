"""`torchrun` and `deepspeed` as people start them: what reaches the ranks, and what becomes of the run."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from framework.checkpoint import find_checkpoint
from framework.training.run_directory import MARKERS

pytestmark = [pytest.mark.multiprocess, pytest.mark.slow]

ROOT = Path(__file__).parents[2]
TRAIN = str(ROOT / "launchers" / "train.py")
SCRIPTS = Path(sys.executable).parent
TORCHRUN = [str(SCRIPTS / "torchrun"), "--nproc-per-node", "2", "--rdzv-backend", "c10d", "--rdzv-endpoint"]
TIMEOUT_SECONDS = 240
MANY = "training.max_steps=100000"


def deepspeed(port: int) -> list[str]:
    return [str(SCRIPTS / "deepspeed"), "--num_gpus", "2", "--master_port", str(port)]


@pytest.fixture
def launch() -> Iterator[Callable[..., subprocess.Popen[str]]]:
    """Start a command in a session of its own, which does not outlive the test."""
    started: list[subprocess.Popen[str]] = []

    def start(*command: str) -> subprocess.Popen[str]:
        environment = {key: value for key, value in os.environ.items() if key not in ("WORLD_SIZE", "RANK")}
        environment |= {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONUNBUFFERED": "1"}
        environment["PATH"] = f"{SCRIPTS}:{environment['PATH']}"
        started.append(
            subprocess.Popen(
                command,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                env=environment,
                start_new_session=True,
            )
        )
        return started[-1]

    yield start
    for process in started:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
        process.communicate()


def free_port() -> int:
    import socket

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def wait_for_step(process: subprocess.Popen[str], run_dir: Path, step: int) -> None:
    deadline = time.monotonic() + TIMEOUT_SECONDS
    metrics = run_dir / "metrics.jsonl"
    while not metrics.exists() or len(metrics.read_text().splitlines()) < step:
        assert process.poll() is None, process.communicate()[0][-6000:]
        assert time.monotonic() < deadline
        time.sleep(0.05)


def ending(run_dir: Path) -> str:
    (found,) = [name for name in MARKERS if (run_dir / name).exists()]
    return found


def last_step(run_dir: Path) -> int:
    return json.loads((run_dir / "metrics.jsonl").read_text().splitlines()[-1])["step"]


def test_sigterm_to_torchrun_lets_all_ranks_save(write_config, tmp_path, launch):
    config = write_config(training__micro_batch_size=2, sharding__engine="fsdp")
    run_dir = tmp_path / "run"
    process = launch(*TORCHRUN, f"localhost:{free_port()}", TRAIN, "--config", str(config), "--set", MANY)
    wait_for_step(process, run_dir, 2)
    reached = last_step(run_dir)
    process.send_signal(signal.SIGTERM)
    output, _ = process.communicate(timeout=TIMEOUT_SECONDS)
    # torchrun itself calls this a failure; the marker is what counts.
    assert ending(run_dir) == "STOPPED", output[-6000:]
    checkpoint = find_checkpoint(run_dir)
    assert checkpoint.manifest["world_size"] == 2
    assert checkpoint.step == last_step(run_dir)
    # It was seen at the next step boundary, but for steps that were done before the signal got there.
    assert checkpoint.step - reached < 60


def test_an_error_of_one_rank_is_on_the_first_screen_of_torchrun(write_config, tmp_path, launch):
    config = write_config(training__micro_batch_size=2, sharding__engine="fsdp")
    script = tmp_path / "train_with_error.py"
    script.write_text(
        "import os, runpy, sys\n"
        "from framework.sharding.fsdp import FsdpEngine\n"
        "def broken(*arguments, **keywords):\n"
        "    raise RuntimeError('the cable of rank 1 is loose')\n"
        "if os.environ['RANK'] == '1':\n"
        "    FsdpEngine.step = broken\n"
        f"sys.argv[0] = {TRAIN!r}\n"
        f"runpy.run_path({TRAIN!r}, run_name='__main__')\n"
    )
    process = launch(*TORCHRUN, f"localhost:{free_port()}", str(script), "--config", str(config))
    output, _ = process.communicate(timeout=TIMEOUT_SECONDS)
    assert process.returncode != 0
    assert "the cable of rank 1 is loose" in "\n".join(output.splitlines()[-60:])
    assert ending(tmp_path / "run") == "FAILED"
    failed = json.loads((tmp_path / "run" / "FAILED").read_text())
    assert (failed["rank"], failed["message"]) == (1, "the cable of rank 1 is loose")


SCALED_DOWN = [
    "model.path=null",
    "model.from_config.vocab_size=106",
    "model.from_config.hidden_size=32",
    "model.from_config.intermediate_size=48",
    "model.from_config.num_hidden_layers=2",
    "model.from_config.num_attention_heads=4",
    "model.from_config.num_key_value_heads=4",
    "model.from_config.max_position_embeddings=64",
    "data.sequence_length=64",
    "training.eval_every_steps=0",
    "checkpoint.every_steps=0",
    "training.global_batch_size=4",
    "training.micro_batch_size=1",
    "selection.ratio=labelled",
    'retention={"policy": "selective", "kv_format": "int8"}',
    'sharding={"engine": "deepspeed", "zero_stage": 3}',
]


def test_the_13b_config_scaled_down_under_deepspeed_stops_by_the_file(settings, tiny_tokenizer_path, tmp_path, launch):
    run_dir = tmp_path / "run"
    own = tmp_path / "ds_config.json"
    own.write_text(json.dumps({"train_batch_size": "auto", "zero_optimization": {"reduce_bucket_size": 600000}}))
    overrides = [
        *SCALED_DOWN,
        MANY,
        f"run.output_dir={run_dir}",
        f"model.tokenizer={tiny_tokenizer_path}",
        f"data.train={settings['data']['train']}",
        f"data.eval={settings['data']['eval']}",
    ]
    options = [option for override in overrides for option in ("--set", override)]
    config = ["--config", str(ROOT / "configs" / "llama13b.json"), "--deepspeed_config", str(own)]
    process = launch(*deepspeed(free_port()), TRAIN, *config, *options)
    wait_for_step(process, run_dir, 2)
    (run_dir / "STOP").touch()
    output, _ = process.communicate(timeout=TIMEOUT_SECONDS)
    assert process.returncode == 0, output[-6000:]
    assert ending(run_dir) == "STOPPED"
    assert find_checkpoint(run_dir).manifest["world_size"] == 2
    plan = json.loads((run_dir / "plan.json").read_text())["chosen"]
    assert (plan["zero_stage"], plan["gradient_accumulation"]) == (3, 2)
    assert plan["engine_options"]["zero_optimization"]["reduce_bucket_size"] == 600000
    assert "auto" not in json.dumps(plan["engine_options"])
