"""Runs that add a token: it trains, resumes and is exported with its tokenizer, in full and beside an adapter."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

import framework
from framework.checkpoint import export_run
from framework.config import Config
from framework.errors import UserError
from framework.models import configured_model
from framework.training.preview import dry_run

LORA = {"kind": "lora", "rank": 2, "alpha": 4.0}
ADDED = 106  # the tiny tokenizer has ids below
WIDTH = 8
KINDS = {
    "full-tied": (True, None),
    "full-untied": (False, None),
    "rows-tied": (True, LORA),
    "rows-untied": (False, LORA),
    "whole-tied": (True, {**LORA, "modules_to_save": ["embed_tokens"]}),
    "whole-untied": (False, {**LORA, "modules_to_save": ["embed_tokens", "lm_head"]}),
}


@pytest.fixture
def make_tool_config(
    make_config: Callable[..., Config], settings: dict[str, Any], tmp_path: Path
) -> Callable[..., Config]:
    """A config on data with the token `<tool>` in prompts and answers, from a base model on disk."""

    def make(tied: bool, adapter: dict[str, Any] | None, **changes: Any) -> Config:
        if not (tmp_path / "base").exists():
            described = {**settings["model"]["from_config"], "tie_word_embeddings": tied}
            configured_model(make_config(model__from_config=described)).save_pretrained(tmp_path / "base")
        lines = [{"prompt": f"{n}<tool>{n + 1} = ", "completion": f"<tool>{2 * n + 1}<tool>"} for n in range(5, 40)]
        (tmp_path / "train.jsonl").write_text("\n".join(map(json.dumps, lines)) + "\n")
        return make_config(
            model__path=str(tmp_path / "base"),
            model__from_config=None,
            model__adapter=adapter,
            model__added_tokens=["<tool>"],
            model__pad_vocabulary_to=8,
            data__eval=None,
            training__max_steps=4,
            checkpoint__every_steps=2,
            **changes,
        )

    return make


def logits(model: torch.nn.Module, ids: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(ids).logits[..., : ADDED + 1]


@pytest.mark.parametrize("kind", KINDS)
def test_added_token_trains_resumes_and_is_exported(
    make_tool_config: Callable[..., Config], tmp_path: Path, kind: str
) -> None:
    tied, adapter = KINDS[kind]
    config = make_tool_config(tied, adapter)
    start = configured_model(config).state_dict()
    result = framework.train(config)
    checkpoint = load_file(result.checkpoint / "model.safetensors")

    def losses() -> list[float]:
        return [json.loads(line)["loss"] for line in (result.run_dir / "metrics.jsonl").read_text().splitlines()]

    whole = losses()
    framework.train(config, resume=str(result.run_dir / "checkpoints" / "step-00000002"))
    assert losses() == whole
    again = load_file(result.checkpoint / "model.safetensors")
    assert again.keys() == checkpoint.keys() and all(torch.equal(again[name], checkpoint[name]) for name in again)

    # With rows, nothing else of the embedding is in the checkpoint at all.
    embeddings = {name: tensor for name, tensor in checkpoint.items() if "embed_tokens" in name or "lm_head" in name}
    rows = {name: tensor for name, tensor in embeddings.items() if "trainable_tokens_delta" in name}
    if kind.startswith("rows"):
        assert len(rows) == (1 if tied else 2)
        assert {tuple(tensor.shape) for tensor in rows.values()} == {(1, WIDTH)}
        assert not any(tensor.shape[0] > 1 for tensor in embeddings.values())
    else:
        rows = {name: tensor[ADDED] for name, tensor in embeddings.items()}
    for name, tensor in rows.items():
        before = start[name] if kind.startswith("rows") else start[name][ADDED]
        assert (tensor - before).abs().max() > 1e-3, "the token's row was not trained"

    trained = configured_model(config)
    trained.load_state_dict(checkpoint, strict=False)
    assert len(AutoTokenizer.from_pretrained(config.model.tokenizer)) == ADDED
    ids = torch.tensor([[7, ADDED, 8, 9, ADDED]])
    expected = logits(trained, ids)

    export_run(result.run_dir, output=tmp_path / "out")
    exported = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert exported("1<tool>2")["input_ids"] == [7, ADDED, 8]
    assert exported.decode([7, ADDED, 8], skip_special_tokens=True) == "1<tool>2"
    if adapter is None:
        stock = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
        assert stock.config.vocab_size == 112
        assert torch.equal(logits(stock, ids), expected)
        return
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    base.resize_token_embeddings(len(exported), pad_to_multiple_of=8)
    stock = PeftModel.from_pretrained(base, tmp_path / "out")
    assert torch.equal(logits(stock, ids), expected)
    export_run(result.run_dir, output=tmp_path / "merged", merge_adapter=True)
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert (merged.lm_head.weight is merged.model.embed_tokens.weight) == tied
    torch.testing.assert_close(logits(merged, ids), expected, rtol=1e-5, atol=1e-5)


def test_rows_of_the_frozen_embedding_stay(make_tool_config: Callable[..., Config], tmp_path: Path) -> None:
    config = make_tool_config(True, LORA)
    result = framework.train(config)
    export_run(result.run_dir, output=tmp_path / "merged", merge_adapter=True)
    before = AutoModelForCausalLM.from_pretrained(tmp_path / "base").model.embed_tokens.weight
    after = AutoModelForCausalLM.from_pretrained(tmp_path / "merged").model.embed_tokens.weight
    assert torch.equal(after[:ADDED], before)
    assert torch.equal(after[ADDED + 1 :], before.mean(0).expand(5, -1))
    assert not torch.allclose(after[ADDED], before.mean(0), atol=1e-3)


def test_dry_run_counts_the_rows(make_tool_config: Callable[..., Config]) -> None:
    config = make_tool_config(False, LORA)
    without = config.model_copy(
        update={"model": config.model.model_copy(update={"added_tokens": [], "pad_vocabulary_to": None})}
    )

    def counts(text: str) -> list[int]:
        line = next(line for line in text.splitlines() if line.startswith("parameters"))
        return [int(number.replace(",", "")) for number in re.findall(r"[\d,]*\d(?=, of| are)", line)]

    text = dry_run(config)
    assert "adapter        lora, rank 2, alpha 4.0\n" in text
    assert "added tokens   <tool>; the embedding has 112 rows\n" in text
    more, trained_more = (a - b for a, b in zip(counts(text), counts(dry_run(without)), strict=True))
    # Six rows in the embedding and six in the head, and for the one added token a trained row beside each.
    assert (more, trained_more) == (2 * 6 * WIDTH + 2 * WIDTH, 2 * WIDTH)


def test_another_token_is_another_run(make_tool_config: Callable[..., Config]) -> None:
    config = make_tool_config(True, None)
    framework.train(config)
    for changes in ({"added_tokens": ["<call>"]}, {"pad_vocabulary_to": None}):
        other = config.model_copy(update={"model": config.model.model_copy(update=changes)})
        with pytest.raises(UserError, match=rf"another run .*\n  model\.{next(iter(changes))}"):
            framework.train(other)
