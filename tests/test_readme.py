"""What the README shows is what happens."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import get_args

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from framework.config import ConfigError, SourceConfig, data_sources, load_config
from framework.config.sections import Format
from framework.data.formats import VALIDATORS, recognise
from framework.data.labels import LABELLERS

README = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", README, flags=re.DOTALL | re.MULTILINE)


def test_first_job_loads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (job,) = blocks("json")
    Path("first.json").write_text(job)
    config = load_config("first.json")
    assert config.resolved_ratio == "labelled"
    assert config.gradient_accumulation(1) == 8

    shown = next(block for block in blocks("text") if block.startswith("error: "))
    Path("first.json").write_text(job.replace('"strategy": "supervised"', '"strategy": "supervised", "ration": 0.5'))
    with pytest.raises(ConfigError) as caught:
        load_config("first.json", ["training.micro_batch_size=5"])
    assert f"error: {caught.value}\n" == shown


def test_formats_are_those_that_are_read(tmp_path: Path) -> None:
    rows = re.findall(r"^\| `(\w+)` \| `(\{.*?\})` \|", README, flags=re.MULTILINE)
    assert set(LABELLERS) <= {name for name, _ in rows} <= set(get_args(Format))
    for name, record in rows:
        assert VALIDATORS[name](json.loads(record)) is None
        assert recognise(json.loads(record)) == name or name not in LABELLERS


def test_sources_as_objects_load(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (job,) = blocks("json")
    settings = json.loads(job)
    settings["data"] |= json.loads(
        "{" + ",".join(next(b for b in blocks("text") if b.startswith('"train"')).splitlines()) + "}"
    )
    Path("job.json").write_text(json.dumps(settings))
    data = load_config("job.json").data
    assert [source.split for source in data_sources(data.train)] == [None, "train[:5%]"]
    assert data_sources(data.eval) == (SourceConfig(path="data/mixed", split="test", format="alpaca"),)


def test_python_examples_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    model_config = LlamaConfig(
        vocab_size=32, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2
    )
    LlamaForCausalLM(model_config).save_pretrained("models/base")
    ids = torch.randint(0, 32, (2, 12))
    labels = ids.clone()
    labels[:, :8] = -100
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}
    loop, fixed = blocks("python")

    names = {"batches": [batch] * 3}
    exec(loop, names)
    before = LlamaForCausalLM.from_pretrained("models/base")
    after = names["model"]
    with torch.no_grad():
        assert after(**batch).loss < before(**batch).loss

    # Positions 8 and 10 predict the labels at 9 and 11.
    positions = torch.tensor([[0, 8, 10], [0, 8, 10]])
    names |= {"batch": batch, "positions": positions}
    exec("framework.enable_token_selection(model.train())\n" + fixed, names)
    logits = after.eval()(input_ids=ids).logits
    expected = torch.nn.functional.cross_entropy(logits[:, [8, 10]].flatten(0, 1), ids[:, [9, 11]].flatten())
    torch.testing.assert_close(names["loss"], expected)
