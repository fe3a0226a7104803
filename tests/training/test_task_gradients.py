"""Gradients of masked language models and classifiers: stock transformers' own, and the slow references'."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from task_runs import CASES, LORA, prepared

from framework.config import Config
from framework.models import configured_model
from framework.retention.reference import reference_gradients
from framework.sharding.ranks import Ranks
from framework.sharding.single import SingleEngine
from framework.training.loss import rows_loss, unwrapped
from framework.training.objective import draw_selection
from framework.training.optimizer import optimizer_factory
from framework.training.step import train_window


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
def test_loss_and_gradients_are_stock_transformers_whatever_the_split(make_task: Any, task: str, name: str) -> None:
    outcomes = [step_gradients(make_task(task, name, "exact", training__micro_batch_size=micro)) for micro in (8, 4, 1)]
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
def test_gradients_under_selection_are_the_slow_references(
    make_task: Any, task: str, name: str, selection: str
) -> None:
    assert_gradients_are_the_slow_references(make_task(task, name, selection))


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
    make_task: Any, task: str, name: str, adapter: Any, added_tokens: list[str]
) -> None:
    assert_gradients_are_the_slow_references(
        make_task(task, name, "context", model__adapter=adapter, model__added_tokens=added_tokens)
    )


@pytest.mark.parametrize(("task", "name"), [CASES[0], *CASES[3:4], *CASES[7:]])
@pytest.mark.parametrize("selection", ["supervised", "uniform"])
def test_the_split_changes_nothing_under_selection(make_task: Any, task: str, name: str, selection: str) -> None:
    whole, *others = (
        step_gradients(make_task(task, name, selection, training__micro_batch_size=micro)) for micro in (8, 2)
    )
    for loss, gradients, *_ in others:
        assert loss == pytest.approx(whole[0], rel=1e-6)
        scale = max(float(gradient.abs().max()) for gradient in whole[1].values())
        for key, gradient in whole[1].items():
            torch.testing.assert_close(gradients[key], gradient, rtol=1e-4, atol=1e-6 * scale)
