"""One optimiser step under a foreign trainer, and the slow reference for the batches that it saw."""

from __future__ import annotations

import copy
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import families
import pytest
import torch
from accelerate.state import AcceleratorState
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel, Trainer, TrainerCallback

from framework.retention.reference import reference_gradients
from framework.selection import documents_of, select, supervised_positions
from framework.training.loss import LossKind, rows_loss, selected_supervised_rows, unwrapped

Tensors = dict[str, Tensor]

WORDS = "the cat sat on a mat and saw two birds in trees while rain fell".split()


def tiny_model(**changes: Any) -> LlamaForCausalLM:
    """A llama for the characters of the tiny tokenizer, with attention that is far from uniform."""
    config = LlamaConfig(
        vocab_size=106,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        initializer_range=0.2,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        **changes,
    )
    torch.manual_seed(1)
    return LlamaForCausalLM(config)


def contributing(model: nn.Module) -> nn.Module:
    """The model with the zeros of a new adapter drawn at random, so that each of its matrices has a gradient."""
    torch.manual_seed(2)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(0, 0.3)
    return model


def with_lora(model: nn.Module) -> nn.Module:
    """The model with an adapter that contributes from the start."""
    config = LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM")
    return contributing(get_peft_model(model, config))


def prompts_and_answers(count: int) -> list[tuple[str, str]]:
    """Pairs of very different lengths."""
    pairs = []
    for i in range(count):
        prompt = " ".join(WORDS[(i * 5 + k) % len(WORDS)] for k in range(2 + i * 3 % 7))
        pairs.append((prompt, " ".join(WORDS[(i * 7 + k) % len(WORDS)] for k in range(1 + i * 2 % 5))))
    return pairs


def tokenized(tokenizer: Any, count: int = 4) -> Dataset:
    """What `transformers.Trainer` takes: token ids, and labels on the answers."""
    rows = []
    for prompt, answer in prompts_and_answers(count):
        head, tail = tokenizer(prompt)["input_ids"], tokenizer(answer)["input_ids"]
        rows.append({"input_ids": head + tail, "labels": [-100] * len(head) + tail})
    return Dataset.from_list(rows)


class Captured(TrainerCallback):
    """The gradients of the first optimiser step, before the optimiser changes anything."""

    def __init__(self) -> None:
        self.gradients: Tensors = {}

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, model: nn.Module, **kwargs: Any) -> None:
        if not self.gradients:
            self.gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def record_batches(trainer: Trainer) -> list[Tensors]:
    """The inputs of every forward pass for training, as the trainer makes them."""
    batches: list[Tensors] = []
    compute_loss = trainer.compute_loss

    def recording(model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        if model.training:
            batches.append({k: v.clone() for k, v in inputs.items() if torch.is_tensor(v)})
        return compute_loss(model, inputs, *args, **kwargs)

    trainer.compute_loss = recording
    return batches


def reference(
    model: nn.Module,
    batches: list[Tensors],
    *,
    weighted: bool = True,
    loss: Callable[..., Tensor] = rows_loss,
    **draw: Any,
) -> Tensors:
    """Gradients of Σ loss · weight / labels over micro-batches by the slow reference, in a copy of the model.

    Args:
        model: as it was before the step.
        batches: the step's micro-batches.
        weighted: whether losses are weighted by the inverse of their probability.
        loss: of logits `[rows, classes]`, targets `[rows]` and weights `[rows]`.
        draw: options of the selection.
    """
    model = copy.deepcopy(model).train()
    inner = unwrapped(model)
    count = sum(int((batch["labels"][:, 1:] != -100).sum()) for batch in batches)
    draw = {"strategy": "supervised", "ratio": "labelled", "seed": 0, **draw}
    first_document = 0
    for batch in batches:
        supervised = supervised_positions(batch["labels"], causal=True)
        documents = documents_of(supervised, batch.get("attention_mask"), batch.get("position_ids"), first_document)
        first_document = int(documents.max()) + 1
        selection = select(supervised=supervised, documents=documents, **draw)
        index, targets, probability = selected_supervised_rows(batch["labels"], LossKind.CAUSAL, selection)
        arguments = {k: batch[k] for k in ("input_ids", "attention_mask", "position_ids") if k in batch}
        with reference_gradients(inner, selection.mask(supervised.shape[1])):
            logits = model(**arguments, use_cache=False).logits
            weights = 1 / probability if weighted else torch.ones_like(probability)
            (loss(logits.flatten(0, 1)[index], targets, weights) / count).backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def exact(model: nn.Module, batches: list[Tensors]) -> Tensors:
    """Gradients of the same loss by ordinary training: what a trainer that lost its selection would give."""
    model = copy.deepcopy(model).train()
    count = sum(int((batch["labels"][:, 1:] != -100).sum()) for batch in batches)
    for batch in batches:
        arguments = {k: batch[k] for k in ("input_ids", "attention_mask", "position_ids", "labels") if k in batch}
        model(**arguments, num_items_in_batch=count, use_cache=False).loss.backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def worst(got: Tensors, want: Tensors) -> float:
    """Largest relative error of a tensor; infinite if other parameters have gradients."""
    if got.keys() != want.keys():
        return float("inf")
    return max(float((got[k] - want[k]).norm() / want[k].norm()) for k in want)


@pytest.fixture(autouse=True)
def fresh_accelerate():
    """Accelerate keeps its state for the whole process; each test starts with none."""
    AcceleratorState._reset_state(reset_partial_state=True)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.fixture
def model() -> PreTrainedModel:
    """A llama in float64, in training mode."""
    return families.build("llama")


@pytest.fixture
def inputs(model: PreTrainedModel) -> Tensors:
    """Two padded sequences for it."""
    return families.sample_inputs(model)


@pytest.fixture(scope="session")
def foreign() -> SimpleNamespace:
    """The helpers above."""
    return SimpleNamespace(
        Captured=Captured,
        contributing=contributing,
        exact=exact,
        prompts_and_answers=prompts_and_answers,
        record_batches=record_batches,
        reference=reference,
        tiny_model=tiny_model,
        tokenized=tokenized,
        with_lora=with_lora,
        worst=worst,
    )
