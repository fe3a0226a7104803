"""Masked language models and classifiers of text and images, from a config to an exported model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import PeftModel
from PIL import Image
from task_runs import AUTO, CASES, LORA, MODELS, losses, prepared, records
from transformers import (
    AutoConfig,
    AutoModelForSequenceClassification,
    AutoTokenizer,
)
from transformers.models.auto.image_processing_auto import AutoImageProcessor

import framework
from framework.checkpoint import StoredFragments, export_run, load_weights
from framework.errors import UserError
from framework.models import configured_model
from framework.sharding.ranks import Ranks
from framework.sharding.single import SingleEngine
from framework.training.evaluation import evaluate
from framework.training.loss import unwrapped
from framework.training.optimizer import optimizer_factory
from framework.training.preview import dry_run
from framework.training.run_data import load_run_data


@pytest.mark.parametrize(("task", "name"), CASES)
def test_a_run_learns_and_its_export_is_stock(make_task: Any, tmp_path: Path, task: str, name: str) -> None:
    config = make_task(task, name, "context", training__max_steps=20, training__eval_every_steps=10)
    result = framework.train(config)
    train, evaluations = records(result.run_dir, "train"), records(result.run_dir, "eval")
    assert result.status == "completed" and [record["step"] for record in evaluations] == [10, 20]
    assert np.mean(losses(result)[-3:]) < np.mean(losses(result)[:3]) - 0.15
    assert all(0 < record["selected_tokens"] <= record["tokens"] for record in train)
    output = export_run(result.run_dir, output=tmp_path / "export")
    model = AUTO[task].from_pretrained(output).eval()
    total, correct, count = 0.0, 0, 0
    data = load_run_data(config, lambda line: None)
    _, batches = data.loaders()
    with torch.no_grad():
        for batch in batches(data.eval):
            found = model(**batch.inputs)
            total += found.loss.item() * batch.supervised_tokens
            correct += int((found.logits.argmax(-1) == batch.inputs["labels"]).sum()) if batch.pooled is not None else 0
            count += batch.supervised_tokens
    assert evaluations[-1]["loss"] == pytest.approx(total / count, rel=1e-4)
    assert evaluations[-1]["tokens"] == count
    if task == "masked_lm":
        assert "accuracy" not in evaluations[-1]
        assert AutoTokenizer.from_pretrained(output).mask_token == "<mask>"
        return
    assert evaluations[-1]["accuracy"] == correct / count == correct / 10
    assert all(record["supervised_tokens"] == 8 for record in train)
    names = ["blue", "green", "red"] if task == "image_classification" else ["first", "last", "middle"]
    assert model.config.id2label == dict(enumerate(names))
    assert json.loads((result.run_dir / "config.json").read_text())["data"]["label_names"] == names
    if task == "image_classification":
        processor = AutoImageProcessor.from_pretrained(output, backend="pil")
        image = Image.open(data.eval[0].path)
        pixels = torch.from_numpy(np.stack(processor(images=[image])["pixel_values"]))
        torch.testing.assert_close(pixels, data.collate(data.eval, [0]).inputs["pixel_values"])
    else:
        assert model.config.pad_token_id == AutoTokenizer.from_pretrained(output).pad_token_id == 0


@pytest.mark.parametrize(
    ("task", "name", "changes"),
    [
        ("masked_lm", "bert", {}),
        ("sequence_classification", "llama", {}),
        ("image_classification", "vit", {"data__augmentation": "crop_flip"}),
    ],
)
def test_resumed_losses_are_equal_to_the_bit(make_task: Any, settings: Any, task: str, name: str, changes: Any) -> None:
    changes = changes | {"checkpoint__every_steps": 2}
    whole = framework.train(make_task(task, name, "context", **changes, training__max_steps=6))
    settings["run"]["output_dir"] += "-again"
    framework.train(make_task(task, name, "context", **changes, training__max_steps=4))
    resumed = framework.train(make_task(task, name, "context", **changes, training__max_steps=6))
    assert losses(resumed) == losses(whole) and len(losses(whole)) == 6
    assert resumed.eval_loss == whole.eval_loss


def test_a_masked_lm_is_evaluated_on_the_same_masks_each_time(make_task: Any) -> None:
    config = make_task("masked_lm", "bert", "exact", optimizer__learning_rate=1e-12, training__eval_every_steps=3)
    result = framework.train(config)
    first, second = records(result.run_dir, "eval")
    assert second["loss"] == pytest.approx(first["loss"], rel=1e-6)
    assert len({round(loss, 4) for loss in losses(result)}) == 6


@pytest.mark.parametrize(
    ("task", "name", "adapter"),
    [
        ("masked_lm", "bert", None),
        ("masked_lm", "modernbert", None),
        ("sequence_classification", "bert", None),
        ("sequence_classification", "bert", LORA),
        ("sequence_classification", "modernbert", LORA),
        ("sequence_classification", "llama", LORA),
    ],
)
def test_added_tokens_are_trained_and_exported(
    make_task: Any, tmp_path: Path, task: str, name: str, adapter: Any
) -> None:
    data = load_run_data(make_task(task, name), lambda line: None)
    configured_model(data.config, data.tokenizer).save_pretrained(tmp_path / "base")
    changes: dict[str, Any] = {"model__path": str(tmp_path / "base"), "model__from_config": None}
    changes |= {"model__added_tokens": ["ab", "mn"], "model__pad_vocabulary_to": 8, "model__adapter": adapter}
    config = make_task(task, name, "context", **changes, selection__ratio=0.9)
    assert "added tokens   ab, mn; the embedding has 112 rows" in dry_run(config)
    result = framework.train(config)
    config = framework.load_config(result.run_dir / "config.json")
    trained = configured_model(config)
    load_weights(StoredFragments(result.checkpoint, "model"), trained)

    export_run(result.run_dir, output=tmp_path / "out")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    inputs = tokenizer(["abcab", "xmn"], padding=True, return_tensors="pt")
    assert (inputs["input_ids"] == 106).sum() == 2 and (inputs["input_ids"] == 107).sum() == 1
    if adapter is None:
        stock = AUTO[task].from_pretrained(tmp_path / "out")
    else:
        described = AutoConfig.from_pretrained(tmp_path / "out")
        stock = AUTO[task].from_pretrained(tmp_path / "base", config=described)
        stock.resize_token_embeddings(len(tokenizer), pad_to_multiple_of=8)
        stock = PeftModel.from_pretrained(stock, tmp_path / "out")
    ours, theirs = trained.eval()(**inputs).logits, stock.eval()(**inputs).logits
    if task == "masked_lm":
        # Rows beyond the tokenizer's are no tokens.
        ours, theirs = ours[..., :108], theirs[..., :108]
    torch.testing.assert_close(theirs, ours, rtol=0, atol=0)

    merged = trained.merge_and_unload() if adapter else trained
    before = unwrapped(configured_model(data.config)).get_input_embeddings().weight
    after = merged.get_input_embeddings().weight
    for row in (106, 107):
        assert (after[row] - before.mean(0)).abs().max() > 1e-3, "the token's row was not trained"
    assert torch.equal(after[:106], before) == (adapter is not None)


def test_an_adapter_trains_the_head_and_its_export_names_the_classes(make_task: Any, tmp_path: Path) -> None:
    base = make_task("sequence_classification", "llama")
    tokenizer = base.model.tokenizer
    model = AutoModelForSequenceClassification.from_config(
        framework.models.configuration.read_model_config(None, MODELS["llama"])
    )
    model.save_pretrained(tmp_path / "base")
    config = make_task(
        "sequence_classification",
        "llama",
        model__path=str(tmp_path / "base"),
        model__from_config=None,
        model__tokenizer=tokenizer,
        model__adapter=LORA,
    )
    # The base was saved with a head of two classes, the data has three.
    with pytest.raises(UserError, match=r"do not fit its config\.json"):
        framework.train(config)
    causal = framework.models.load_model(
        path=None,
        from_config=MODELS["llama"],
        task="causal_lm",
        dtype=torch.float32,
        attention="sdpa",
        seed=0,
    )
    causal.save_pretrained(tmp_path / "base")
    result = framework.train(config)
    out = export_run(result.run_dir, output=tmp_path / "adapter")
    whole = export_run(result.run_dir, output=tmp_path / "merged", merge_adapter=True)
    loaded = AutoConfig.from_pretrained(out)
    assert loaded.id2label == {0: "first", 1: "last", 2: "middle"} and loaded.pad_token_id == 0
    stock = AutoModelForSequenceClassification.from_pretrained(tmp_path / "base", config=loaded)
    adapted = PeftModel.from_pretrained(stock, out).eval()
    merged = AutoModelForSequenceClassification.from_pretrained(whole).eval()
    ids = torch.tensor([[5, 6, 7, 8], [9, 8, 0, 0]])
    mask = (ids != 0).long()
    torch.testing.assert_close(
        adapted(input_ids=ids, attention_mask=mask).logits,
        merged(input_ids=ids, attention_mask=mask).logits,
        rtol=1e-5,
        atol=1e-6,
    )


def test_evaluation_counts_what_is_right(make_task: Any) -> None:
    data, model, _, _ = prepared(make_task("sequence_classification", "bert", "exact"))
    engine = SingleEngine("fp32", torch.device("cpu"))
    engine.prepare(model, optimizer_factory(data.config))
    _, batches = data.loaders()
    record = evaluate(engine, Ranks(), batches(data.eval), step=3, interrupted=lambda: False)
    model.eval()
    with torch.no_grad():
        logits = torch.cat([model(**batch.inputs).logits for batch in batches(data.eval)])
    labels = torch.cat([batch.inputs["labels"] for batch in batches(data.eval)])
    assert record.accuracy == int((logits.argmax(-1) == labels).sum()) / 10
    assert record.loss == pytest.approx(torch.nn.functional.cross_entropy(logits, labels).item(), rel=1e-6)
    assert record.to_json().keys() == {"kind", "step", "loss", "tokens", "accuracy"}
