"""What a run's records say about the work that was done."""

from __future__ import annotations

import json
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import torch

import framework
from framework.config import Config
from framework.data import Loader, load_dataset, load_tokenizer
from framework.models import configured_model
from framework.training import insight
from framework.training.insight import device_peak
from framework.training.objective import Objective


def train_records(run_dir: Path) -> list[dict[str, Any]]:
    lines = map(json.loads, (run_dir / "metrics.jsonl").read_text().splitlines())
    return [line for line in lines if line["kind"] == "train"]


def counted_by_hand(config: Config, steps: int) -> list[tuple[int, int]]:
    """Model and hardware operations of the first steps, without a run."""
    tokenizer = load_tokenizer(config.model.tokenizer)
    loader = Loader(
        load_dataset(config.data.train, tokenizer=tokenizer, sequence_length=32, format="completion"),
        sequence_length=32,
        packing=config.data.packing,
        global_batch_size=config.training.global_batch_size,
        micro_batch_size=config.training.micro_batch_size,
        seed=config.run.seed,
        pad_token_id=tokenizer.pad_token_id,
    )
    objective = Objective(configured_model(config), config)
    counted = []
    for _ in range(steps):
        objective.tally.reset()
        for batch in loader.next_window():
            objective.tally.add(batch, objective.select(batch))
        flops = objective.flops()
        counted.append((flops.model, flops.hardware))
    return counted


EXACT = {"selection__strategy": "none", "retention__policy": "all", "retention__retain_linears": False}


@pytest.mark.parametrize("changes", [{}, EXACT, {"data__packing": True}])
def test_every_step_counts_its_own_micro_batches(make_config, changes):
    config = make_config(**changes, training__max_steps=3)
    records = train_records(framework.train(config).run_dir)
    found = [(record["model_flops"], record["hardware_flops"]) for record in records]
    assert found == counted_by_hand(config, 3)
    assert all(record["mfu"] is None and record["hfu"] is None for record in records)


def test_selection_needs_fewer_operations(make_config):
    (selective, _), *_ = counted_by_hand(make_config(), 1)
    (exact, _), *_ = counted_by_hand(make_config(**EXACT), 1)
    # A quarter of the tokens carries a label: 1 + 2r passes instead of 3, and a head on as many rows.
    assert 0.4 < selective / exact < 0.6


def test_utilisation_where_the_peak_is_known(make_config, monkeypatch, capsys):
    monkeypatch.setattr(insight, "device_peak", lambda config, device, count: 1e9)
    record = train_records(framework.train(make_config(training__max_steps=1)).run_dir)[0]
    assert record["mfu"] == pytest.approx(record["model_flops"] / record["step_seconds"] / 1e9)
    assert record["hfu"] == pytest.approx(record["hardware_flops"] / record["step_seconds"] / 1e9)
    assert f"mfu {record['mfu']:.1%}" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("precision", "tf32", "tera"),
    [("pure_bf16", "highest", 312), ("fp32_master", "highest", 312), ("fp32", "highest", 19.5), ("fp32", "high", 156)],
)
def test_the_peak_is_that_of_the_precision_on_all_devices(make_config, monkeypatch, precision, tf32, tera):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA A100-SXM4-80GB")
    monkeypatch.setattr(torch, "get_float32_matmul_precision", lambda: tf32)
    config = make_config(optimizer__precision=precision)
    assert device_peak(config, torch.device("cuda:0"), 4) == pytest.approx(4 * tera * 1e12)
    assert device_peak(config, torch.device("cpu"), 1) is None


def test_the_environment_is_kept_with_the_run(make_config):
    result = framework.train(make_config(training__max_steps=1))
    kept = json.loads((result.run_dir / "environment.json").read_text())
    assert kept["packages"]["torch"] == version("torch")
    assert "nvidia_smi" not in kept
