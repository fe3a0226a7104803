"""What is said and kept when memory runs out, with a device that is not there."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch._subclasses import FakeTensor, FakeTensorMode

import framework
from framework.errors import RunError, UserError
from framework.sharding.single import SingleEngine
from framework.training import evaluation, memory_report
from framework.training.memory_report import largest_tensors, options_to_change
from framework.training.objective import Objective


class FakeAllocator:
    def __init__(self, device: torch.device) -> None:
        self.recording = False

    def record_history(self) -> None:
        self.recording = True

    def dump(self, path: Path) -> None:
        path.write_text(f"snapshot, history {self.recording}")

    def summary(self) -> str:
        return "table of counters"

    def state(self) -> str:
        return "peak 78.10 GiB allocated, 79.00 GiB reserved of 79.25 GiB"


@pytest.fixture
def on_cuda(monkeypatch):
    """Every run's memory is watched as if it were on a CUDA device."""

    monkeypatch.setattr(memory_report, "allocator_of", FakeAllocator)


def exhaust(monkeypatch, *, step: int) -> None:
    """Let memory run out in the second micro-batch of a step."""
    plain, calls = SingleEngine.backward, []

    def backward(engine, loss):
        calls.append(1)
        if len(calls) == 2 * step:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nmore advice")
        plain(engine, loss)

    monkeypatch.setattr(SingleEngine, "backward", backward)


def test_the_message_says_where_what_and_what_to_change(make_config, monkeypatch, on_cuda):
    config = make_config(checkpoint__every_steps=1)
    exhaust(monkeypatch, step=3)
    # Other tests of this process may have left larger ones.
    monkeypatch.setattr(memory_report, "LISTED_TENSORS", 100_000)
    with pytest.raises(RunError) as caught:
        framework.train(config)
    run_dir = Path(config.run.output_dir)
    lines = str(caught.value).splitlines()
    first = lines[0]
    assert first.startswith("step 3: out of memory on cpu, micro-batch of 4 x 16 tokens, ")
    assert first.endswith("; peak 78.10 GiB allocated, 79.00 GiB reserved of 79.25 GiB")
    assert lines[1] == "  CUDA out of memory. Tried to allocate 2.00 GiB."
    assert "  to try: training.micro_batch_size 2 instead of 4 (same result)" in lines
    assert "  to try: retention.retain_linears false (same result, more work)" in lines
    report, snapshot = (
        run_dir / "memory" / "out-of-memory-step-3.txt",
        run_dir / "memory" / "out-of-memory-step-3.pickle",
    )
    assert lines[-2] == f"  report: {report}"
    assert lines[-1].startswith(f"  snapshot: {snapshot} (open it at https://pytorch.org/memory_viz; with where")
    text = report.read_text()
    assert (
        "step 3: out of memory on cpu, micro-batch of 4 x" in text
        and "table of counters" in text
        and "more advice" in text
    )
    assert "torch.float32 [106, 8]" in text  # the embedding and its moments
    assert snapshot.read_text() == "snapshot, history False"
    marker = json.loads((run_dir / "FAILED").read_text())
    assert marker["code"] == 1 and marker["message"] == str(caught.value)
    monkeypatch.undo()
    assert framework.train(config).status == "completed"


def test_history_is_recorded_where_it_is_asked_for(make_config, monkeypatch, on_cuda):
    exhaust(monkeypatch, step=4)
    config = make_config(logging__memory_snapshot=2)
    with pytest.raises(RunError, match=r"memory_viz\)$"):
        framework.train(config)
    written = {path.name: path.read_text() for path in (Path(config.run.output_dir) / "memory").glob("*.pickle")}
    assert written == dict.fromkeys(("step-00000002.pickle", "out-of-memory-step-4.pickle"), "snapshot, history True")


def test_without_a_device_there_is_a_report_and_no_snapshot(make_config, monkeypatch):
    exhaust(monkeypatch, step=1)
    config = make_config()
    with pytest.raises(
        RunError, match=r"(?s)step 1: out of memory on cpu, micro-batch of 4 x \d+ tokens, \d+ selected\n"
    ):
        framework.train(config)
    assert [path.name for path in (Path(config.run.output_dir) / "memory").iterdir()] == ["out-of-memory-step-1.txt"]


def test_a_snapshot_needs_a_device_that_has_one(make_config):
    config = make_config(logging__memory_snapshot=True)
    with pytest.raises(UserError, match=r"logging\.memory_snapshot: only CUDA devices have one.*set it to false"):
        framework.train(config)
    assert not Path(config.run.output_dir).exists()


def fail(*_):
    raise torch.OutOfMemoryError("CUDA out of memory.")


def test_before_the_first_step(make_config, monkeypatch):
    config = make_config()
    with monkeypatch.context() as patch, pytest.raises(RunError, match=r"^longest batch: out of memory"):
        patch.setattr(Objective, "check", fail)
        framework.train(config)
    monkeypatch.setattr(SingleEngine, "prepare", fail)
    with pytest.raises(RunError, match=r"^placing the model: out of memory on cpu\n") as caught:
        framework.train(config)
    assert "pure_bf16" in str(caught.value) and "micro_batch_size" not in str(caught.value)
    report = Path(config.run.output_dir) / "memory" / "out-of-memory-placing-the-model.txt"
    assert "torch.float32 [106, 8]" in report.read_text()


def test_in_an_evaluation(make_config, monkeypatch):
    monkeypatch.setattr(evaluation, "evaluation_loss", fail)
    with pytest.raises(RunError, match=r"^evaluation after step 6: out of memory on cpu\n") as caught:
        framework.train(make_config())
    # What a backward pass keeps is not what an evaluation lacks.
    assert "training.micro_batch_size 2" in str(caught.value) and "retention." not in str(caught.value)


def test_a_full_disk_does_not_hide_the_error(make_config, monkeypatch):
    exhaust(monkeypatch, step=1)
    monkeypatch.setattr(Path, "mkdir", no_space_for("memory", Path.mkdir))
    with pytest.raises(RunError, match=r"(?s)step 1: out of memory.*no report: .*No space left"):
        framework.train(make_config())


def no_space_for(name, plain):
    def mkdir(path, *args, **kwargs):
        if path.name == name:
            raise OSError(28, "No space left on device")
        return plain(path, *args, **kwargs)

    return mkdir


@pytest.mark.parametrize(
    ("changes", "expected", "unexpected"),
    [
        (
            {"retention__policy": "all", "retention__retain_linears": False, "selection__strategy": "none"},
            ["retention.policy", "selection.strategy", "optimizer.precision", "model.adapter"],
            ["retention.retain_linears", "retention.kv_format", "retention.placement"],
        ),
        (
            {
                "retention__retain_linears": False,
                "retention__kv_format": "int4",
                "retention__placement": "host",
                "optimizer__precision": "pure_bf16",
                "training__micro_batch_size": 1,
                "model__adapter": {"kind": "lora", "rank": 2, "alpha": 4.0},
            },
            ["data.sequence_length", "PYTORCH_ALLOC_CONF"],
            ["training.micro_batch_size", "retention.", "optimizer.precision", "model.adapter", "selection.strategy"],
        ),
        (
            {"retention__kv_format": "int8"},
            ['retention.kv_format "int4"'],
            ['retention.kv_format "int8"', 'retention.kv_format "model"'],
        ),
        ({}, ['retention.placement "host"', 'retention.kv_format "int8"', 'retention.kv_format "int4"'], []),
        ({}, ['sharding.engine "fsdp" or "deepspeed" over several devices'], ["sharding.zero_stage", "offload"]),
        (
            {"sharding__engine": "deepspeed", "sharding__zero_stage": 2},
            ["sharding.zero_stage 3 instead of 2 (same result)", "sharding.offload_optimizer true (same result"],
            ["offload_parameters", "sharding.engine"],
        ),
        (
            {"sharding__engine": "fsdp", "sharding__replicas": 2, "sharding__reshard_after_forward": False},
            [
                "sharding.reshard_after_forward true",
                "sharding.replicas 1 instead of 2",
                "sharding.offload_optimizer and offload_parameters true (same result, slower)",
            ],
            ["sharding.zero_stage", "sharding.engine"],
        ),
    ],
)
def test_advice_names_what_this_config_can_still_change(make_config, changes, expected, unexpected):
    advice = "\n".join(options_to_change(make_config(**changes)))
    assert all(key in advice for key in expected)
    assert not any(key in advice for key in unexpected)


def test_what_the_compiler_has_of_tensors_is_left_out():
    with FakeTensorMode():
        fake = torch.empty(3, 2**20)
    assert isinstance(fake, FakeTensor) and "[3, 1048576]" not in largest_tensors(torch.device("cpu"))


def test_the_largest_tensors_come_first_and_views_once():
    large = [torch.zeros(1 << 20, 3) for _ in range(2)]
    view = large[0][:5]
    lines = largest_tensors(torch.device("cpu")).splitlines()
    assert lines[1].split() == ["2", "x", "12.00", "MiB", "torch.float32", "[1048576,", "3]"]
    assert len(view) == 5
