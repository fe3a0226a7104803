"""Masked language models and classifiers of text and images, from a config to an exported model."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import PeftModel
from PIL import Image
from transformers import (
    AutoConfig,
    AutoModelForImageClassification,
    AutoModelForMaskedLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
)
from transformers.models.auto.image_processing_auto import AutoImageProcessor

import framework
from framework.checkpoint import WEIGHTS_FILE, export_run, load_weights
from framework.config import Config
from framework.errors import UserError
from framework.models import configured_model
from framework.retention.reference import reference_gradients
from framework.sharding.ranks import Ranks
from framework.sharding.single import SingleEngine
from framework.training.evaluation import evaluate
from framework.training.loss import rows_loss, unwrapped
from framework.training.objective import Objective, draw_selection
from framework.training.optimizer import optimizer_factory
from framework.training.preview import dry_run, inspect_data
from framework.training.run_data import load_run_data
from framework.training.step import train_window

SIZES = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
TEXT = {**SIZES, "intermediate_size": 32, "vocab_size": 106, "max_position_embeddings": 64}
PIXELS = {**SIZES, "intermediate_size": 32, "image_size": 16, "patch_size": 4}
NO_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
# Larger than usual: with narrow layers attention would otherwise be uniform and hide errors.
SPREAD = {"initializer_range": 0.2}
BERT = {"model_type": "bert", **TEXT, **NO_DROPOUT, **SPREAD}
MODELS: dict[str, dict[str, Any]] = {
    "bert": BERT,
    "electra": {**BERT, "model_type": "electra", "embedding_size": 16},
    "modernbert": {
        "model_type": "modernbert",
        **TEXT,
        **SPREAD,
        "local_attention": 8,
        "global_attn_every_n_layers": 2,
        "pad_token_id": 0,
        "cls_token_id": 1,
        "sep_token_id": 2,
        "classifier_pooling": "cls",
    },
    "llama": {"model_type": "llama", **TEXT, **SPREAD, "num_key_value_heads": 1},
    "vit": {"model_type": "vit", **PIXELS, **SPREAD},
    "dinov2": {"model_type": "dinov2", **{**PIXELS, **SPREAD, "mlp_ratio": 2, "layerscale_value": 0.7}},
}
MODELS["siglip"] = {"model_type": "siglip", "vision_config": {**PIXELS, "model_type": "siglip_vision_model"}}
MODELS["modernbert-mean"] = {**MODELS["modernbert"], "classifier_pooling": "mean"}
del MODELS["dinov2"]["intermediate_size"]

SELECTIONS = {
    "exact": {"strategy": "none"},
    "supervised": {"strategy": "supervised"},
    "context": {"strategy": "supervised", "ratio": 0.5},
    "uniform": {"strategy": "uniform", "ratio": 0.4},
}
CASES = [
    ("masked_lm", "bert"),
    ("masked_lm", "electra"),
    ("masked_lm", "modernbert"),
    ("sequence_classification", "bert"),
    ("sequence_classification", "electra"),
    ("sequence_classification", "modernbert"),
    ("sequence_classification", "modernbert-mean"),
    ("sequence_classification", "llama"),
    ("image_classification", "vit"),
    ("image_classification", "dinov2"),
    ("image_classification", "siglip"),
]
LORA = {"kind": "lora", "rank": 2, "alpha": 4}
AUTO = {
    "masked_lm": AutoModelForMaskedLM,
    "sequence_classification": AutoModelForSequenceClassification,
    "image_classification": AutoModelForImageClassification,
}


def write_data(directory: Path, task: str, samples: int, seed: int) -> Path:
    """Data whose class can be told: by its letters, or its colour."""
    random = np.random.default_rng(seed)
    if task == "image_classification":
        for number in range(samples):
            pixels = random.integers(0, 90, (18 + number % 5, 20, 3), dtype=np.uint8)
            pixels[..., number % 3] += 160
            path = directory / ("red", "green", "blue")[number % 3] / f"{number:02}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(pixels).save(path)
        return directory
    lines: list[dict[str, Any]] = []
    for number in range(samples):
        letters = "".join(random.choice(list(("abc", "mno", "xyz")[number % 3]), 3 + number % 7))
        lines.append({"text": letters})
        if task == "sequence_classification":
            lines[-1]["label"] = ("first", "middle", "last")[number % 3]
            if number % 4 == 1:
                lines[-1]["text_pair"] = "0" * (1 + number % 5)
    path = directory.with_suffix(".jsonl")
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


@pytest.fixture
def make(
    tmp_path: Path, encoder_tokenizer_path: Path, tiny_tokenizer_path: Path, write_config: Any, settings: Any
) -> Callable[..., Config]:
    """A config for a task and a model of `MODELS`, with changes given as `section__key=value`."""

    def config(task: str, name: str, selection: str = "supervised", **changes: Any) -> Config:
        tokenizer = tiny_tokenizer_path if name == "llama" else encoder_tokenizer_path
        images = task == "image_classification"
        settings["model"] = {"from_config": MODELS[name], "task": task}
        settings["data"] = {
            "train": str(write_data(tmp_path / "train", task, 36, seed=0)),
            "eval": str(write_data(tmp_path / "eval", task, 10, seed=1)),
        }
        if not images:
            settings["model"]["tokenizer"] = str(tokenizer)
            settings["data"]["sequence_length"] = 32
        settings["selection"] = dict(SELECTIONS[selection])
        policy = "all" if selection == "exact" else "selective"
        settings["retention"] = {"policy": policy, "retain_linears": policy == "selective"}
        return framework.load_config(write_config(**changes))

    return config


def records(run_dir: Path, kind: str) -> list[dict[str, Any]]:
    lines = map(json.loads, (run_dir / "metrics.jsonl").read_text().splitlines())
    return [line for line in lines if line["kind"] == kind]


def losses(result: Any) -> list[float]:
    return [record["loss"] for record in records(result.run_dir, "train")]


def prepared(config: Config) -> tuple[Any, Any, Any, list[Any]]:
    """Data, model, objective and first window of a config."""
    data = load_run_data(config, lambda line: None)
    loader, _ = data.loaders()
    model = configured_model(data.config, data.tokenizer)
    return data, model, Objective(model, data.config), loader.next_window()


def step_gradients(config: Config) -> tuple[float, dict[str, torch.Tensor], Any, list[Any]]:
    """Loss and gradients of the first step by the loop's own function, with the data and the window."""
    data, model, objective, window = prepared(config)
    engine = SingleEngine("fp32", torch.device("cpu"))
    engine.prepare(model, optimizer_factory(config))
    objective.check(model, window[0])
    gradients = {}

    def keep(**arguments: Any) -> Any:
        gradients.update({name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None})
        return SingleEngine.step(engine, **arguments)

    engine.step = keep
    result, _ = train_window(engine, Ranks(), objective, window, 0.01, None)
    return result.loss, gradients, data, window


def stock_loss(model: Any, window: list[Any]) -> torch.Tensor:
    """transformers' own mean over the labels of a window: each batch's mean, weighted by its labels."""
    labels = sum(batch.supervised_tokens for batch in window)
    return sum(model(**batch.inputs).loss * batch.supervised_tokens for batch in window) / labels


@pytest.mark.parametrize(("task", "name"), CASES)
def test_loss_and_gradients_are_stock_transformers_whatever_the_split(make: Any, task: str, name: str) -> None:
    outcomes = [step_gradients(make(task, name, "exact", training__micro_batch_size=micro)) for micro in (8, 4, 1)]
    data, window = outcomes[0][2:]
    model = configured_model(data.config, data.tokenizer)
    expected = stock_loss(model, window)
    expected.backward()
    for loss, gradients, *_ in outcomes:
        assert loss == pytest.approx(expected.item(), rel=1e-6)
        reference = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
        assert gradients.keys() == reference.keys()
        scale = max(float(gradient.abs().max()) for gradient in reference.values())
        assert scale > 1e-2
        for key, gradient in reference.items():
            torch.testing.assert_close(gradients[key], gradient, rtol=1e-5, atol=1e-6 * scale)


def assert_gradients_are_the_slow_references(config: Config) -> None:
    loss, gradients, data, window = step_gradients(config)
    model = configured_model(data.config, data.tokenizer)
    labels = sum(batch.supervised_tokens for batch in window)
    total = 0.0
    for batch in window:
        chosen = draw_selection(config, batch)
        mask = chosen.mask(batch.documents.shape[1])
        with reference_gradients(unwrapped(model), mask):
            logits = model(**{key: value for key, value in batch.inputs.items() if key != "labels"}).logits
            if config.model.task == "masked_lm":
                probability = torch.ones(mask.shape).scatter(1, chosen.positions, chosen.probability)
                rows = mask & batch.supervised
                share = rows_loss(logits[rows], batch.inputs["labels"][rows], 1 / probability[rows])
            else:
                assert bool((mask >= batch.pooled).all())
                share = rows_loss(logits, batch.inputs["labels"])
            (share / labels).backward()
        total += share.item() / labels
    assert loss == pytest.approx(total, rel=1e-5)
    reference = {key: p.grad for key, p in model.named_parameters() if p.grad is not None}
    assert gradients.keys() == reference.keys()
    floor = 1e-3 * max(float(gradient.norm()) for gradient in reference.values())
    for key, gradient in reference.items():
        assert float((gradients[key] - gradient).norm()) <= 1e-5 * (float(gradient.norm()) + floor), key


@pytest.mark.parametrize("selection", ["supervised", "context", "uniform"])
@pytest.mark.parametrize(("task", "name"), CASES)
def test_gradients_under_selection_are_the_slow_references(make: Any, task: str, name: str, selection: str) -> None:
    assert_gradients_are_the_slow_references(make(task, name, selection))


@pytest.mark.parametrize(
    ("task", "name", "adapter", "added_tokens"),
    [
        ("masked_lm", "bert", {"kind": "ia3"}, []),
        ("masked_lm", "bert", None, ["ab", "mn"]),
        ("sequence_classification", "bert", {**LORA, "kind": "dora"}, ["ab", "mn"]),
        ("sequence_classification", "llama", LORA, ["ab", "mn"]),
        ("sequence_classification", "modernbert", {"kind": "ln_tuning"}, []),
        ("image_classification", "vit", {"kind": "oft", "options": {"oft_block_size": 4}}, []),
        ("image_classification", "dinov2", {"kind": "hra", "rank": 2}, []),
    ],
)
def test_gradients_beside_adapters_and_added_tokens(
    make: Any, task: str, name: str, adapter: Any, added_tokens: list[str]
) -> None:
    assert_gradients_are_the_slow_references(
        make(task, name, "context", model__adapter=adapter, model__added_tokens=added_tokens)
    )


@pytest.mark.parametrize(("task", "name"), [CASES[0], *CASES[3:4], *CASES[7:]])
@pytest.mark.parametrize("selection", ["supervised", "uniform"])
def test_the_split_changes_nothing_under_selection(make: Any, task: str, name: str, selection: str) -> None:
    whole, *others = (step_gradients(make(task, name, selection, training__micro_batch_size=micro)) for micro in (8, 2))
    for loss, gradients, *_ in others:
        assert loss == pytest.approx(whole[0], rel=1e-6)
        scale = max(float(gradient.abs().max()) for gradient in whole[1].values())
        for key, gradient in whole[1].items():
            torch.testing.assert_close(gradients[key], gradient, rtol=1e-4, atol=1e-6 * scale)


@pytest.mark.parametrize(("task", "name"), CASES)
def test_a_run_learns_and_its_export_is_stock(make: Any, tmp_path: Path, task: str, name: str) -> None:
    config = make(task, name, "context", training__max_steps=20, training__eval_every_steps=10)
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
def test_resumed_losses_are_equal_to_the_bit(make: Any, settings: Any, task: str, name: str, changes: Any) -> None:
    changes = changes | {"checkpoint__every_steps": 2}
    whole = framework.train(make(task, name, "context", **changes, training__max_steps=6))
    settings["run"]["output_dir"] += "-again"
    framework.train(make(task, name, "context", **changes, training__max_steps=4))
    resumed = framework.train(make(task, name, "context", **changes, training__max_steps=6))
    assert losses(resumed) == losses(whole) and len(losses(whole)) == 6
    assert resumed.eval_loss == whole.eval_loss


def test_a_masked_lm_is_evaluated_on_the_same_masks_each_time(make: Any) -> None:
    config = make("masked_lm", "bert", "exact", optimizer__learning_rate=1e-12, training__eval_every_steps=3)
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
def test_added_tokens_are_trained_and_exported(make: Any, tmp_path: Path, task: str, name: str, adapter: Any) -> None:
    data = load_run_data(make(task, name), lambda line: None)
    configured_model(data.config, data.tokenizer).save_pretrained(tmp_path / "base")
    changes: dict[str, Any] = {"model__path": str(tmp_path / "base"), "model__from_config": None}
    changes |= {"model__added_tokens": ["ab", "mn"], "model__pad_vocabulary_to": 8, "model__adapter": adapter}
    config = make(task, name, "context", **changes, selection__ratio=0.9)
    assert "added tokens   ab, mn; the embedding has 112 rows" in dry_run(config)
    result = framework.train(config)
    config = framework.load_config(result.run_dir / "config.json")
    trained = configured_model(config)
    load_weights(result.checkpoint / WEIGHTS_FILE, trained)

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


def test_an_adapter_trains_the_head_and_its_export_names_the_classes(make: Any, tmp_path: Path) -> None:
    base = make("sequence_classification", "llama")
    tokenizer = base.model.tokenizer
    model = AutoModelForSequenceClassification.from_config(
        framework.models.configuration.read_model_config(None, MODELS["llama"])
    )
    model.save_pretrained(tmp_path / "base")
    config = make(
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


def test_the_classes_of_the_evaluation_set_are_those_of_the_training_set(make: Any) -> None:
    config = make("sequence_classification", "bert")
    path = Path(config.data.eval)
    path.write_text(path.read_text() + '{"text": "q", "label": "elsewhere"}\n')
    with pytest.raises(UserError, match=r"data\.eval.*\n.*eval\.jsonl:11: unknown label 'elsewhere'; the classes are"):
        framework.train(config)
    assert not Path(config.run.output_dir).exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_labels": 5}, r"data\.train: has 3 classes \(first, last, middle\), but the model's config says 5"),
        ({"id2label": {"0": "first", "1": "other"}}, r"unknown label 'middle'; the classes are first, other"),
        ({"problem_type": "regression"}, "problem_type 'regression' is not supported"),
        ({"pad_token_id": 4}, "pads with token 0, but the model's config says pad_token_id 4"),
    ],
)
def test_a_model_config_that_contradicts_the_data_is_refused(make: Any, changes: Any, message: str) -> None:
    config = make("sequence_classification", "bert", model__from_config={**BERT, **changes})
    with pytest.raises(UserError, match=message):
        framework.train(config)


def test_a_resumed_run_keeps_its_classes(make: Any) -> None:
    framework.train(make("sequence_classification", "bert", training__max_steps=2))
    changed = make("sequence_classification", "bert", data__label_names=["middle", "last", "first"])
    with pytest.raises(UserError, match=r"(?s)of another run.*data\.label_names"):
        framework.train(changed)
    same = make("sequence_classification", "bert", data__label_names=["first", "last", "middle"])
    assert framework.train(same).status == "completed"


def test_a_head_that_reads_more_than_it_is_known_for_is_refused(make: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(framework.models.architecture, "pooling_of", lambda model: "first")
    with pytest.raises(UserError, match=r"the classifier of dinov2 reads other tokens than the one .* reads 17"):
        framework.train(make("image_classification", "dinov2"))
    assert framework.train(make("image_classification", "dinov2", "exact", training__max_steps=1)).step == 1


def test_dry_run_and_samples_of_each_task(make: Any, tmp_path: Path) -> None:
    from rich.console import Console

    def shown(config: Config) -> tuple[str, str]:
        console = Console(record=True, width=300, color_system=None, file=(tmp_path / "console").open("w"))
        inspect_data(config, 2, console)
        assert not Path(config.run.output_dir).exists()
        return dry_run(config), console.export_text()

    plan, samples = shown(make("masked_lm", "bert", data__mask_probability=0.5))
    assert "task           masked_lm, 50% of the tokens to be found" in plan
    assert samples.count(" supervised, ") == 2 and "⟦⟪<mask>" in samples
    plan, samples = shown(make("sequence_classification", "llama"))
    assert "of up to 32 tokens" in plan and "head on the last token" in plan
    assert samples.count(", class ") == 2 and "data.train: first: 12, last: 12, middle: 12" in samples
    plan, samples = shown(make("image_classification", "vit", "context", data__train=str(tmp_path / "train")))
    assert "of 17 tokens" in plan and "head on the first token" in plan
    assert samples.count("17 tokens, 8 selected") == 2 and samples.count("■") == 16 and ".png, class " in samples


@pytest.mark.parametrize(
    ("name", "task", "parameters"),
    [
        # As the models' own cards say, but for the head: 110 M, 149 M and 86 M.
        ("bert-masked", "task           masked_lm, 15% of the tokens to be found", "109,514,298"),
        ("classify", "head on the first token", "149,606,402"),
        ("vit", "head on the first token", "85,800,194"),
    ],
)
def test_shipped_configs_describe_their_models(name: str, task: str, parameters: str) -> None:
    plan = dry_run(framework.load_config(Path(__file__).parents[2] / "configs" / f"{name}.json"))
    assert task in plan and f"parameters     {parameters}, " in plan and "not here       " in plan


def test_evaluation_counts_what_is_right(make: Any) -> None:
    data, model, _, _ = prepared(make("sequence_classification", "bert", "exact"))
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
