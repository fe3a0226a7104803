"""Loops with Accelerate and token selection: gradients of a step against the slow reference."""

import copy

import pytest
import torch
from accelerate import Accelerator
from torch.utils.data import DataLoader
from transformers import DataCollatorForSeq2Seq

import framework


def batches_of(foreign, tokenizer):
    collate = DataCollatorForSeq2Seq(tokenizer, pad_to_multiple_of=8)
    return DataLoader(foreign.tokenized(tokenizer), batch_size=2, collate_fn=collate)


@pytest.mark.parametrize(("precision", "tolerance"), [("no", 1e-5), ("bf16", 2e-2)])
@pytest.mark.parametrize("enabled", ["before", "after"])
@pytest.mark.parametrize("lora", [False, True])
def test_a_step_of_two_micro_batches(foreign, tiny_tokenizer, lora, enabled, precision, tolerance):
    model = foreign.tiny_model().train()
    model = foreign.with_lora(model) if lora else model
    twin = copy.deepcopy(model)
    draw = {"strategy": "supervised", "ratio": 0.6, "seed": 3}
    accelerator = Accelerator(cpu=True, mixed_precision=precision)
    if enabled == "before":
        framework.enable_token_selection(model, **draw)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    model, optimizer, loader = accelerator.prepare(model, optimizer, batches_of(foreign, tiny_tokenizer))
    if enabled == "after":
        framework.enable_token_selection(accelerator.unwrap_model(model), **draw)
    window = list(loader)
    count = sum((batch["labels"][:, 1:] != -100).sum() for batch in window)
    for batch in window:
        accelerator.backward(model(**batch, num_items_in_batch=count).loss)
    got = {name: p.grad for name, p in accelerator.unwrap_model(model).named_parameters() if p.grad is not None}
    with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
        want = foreign.reference(twin, window, **draw)
    assert foreign.worst(got, want) < tolerance


def test_without_its_wrapper_of_the_precision_the_selection_stays(foreign, tiny_tokenizer):
    model = foreign.tiny_model().train()
    twin = copy.deepcopy(model)
    framework.enable_token_selection(model)
    accelerator = Accelerator(cpu=True, mixed_precision="bf16")
    plain = accelerator.unwrap_model(accelerator.prepare(model), keep_fp32_wrapper=False)
    batch = next(iter(batches_of(foreign, tiny_tokenizer)))
    plain(**batch).loss.backward()
    got = {name: p.grad for name, p in plain.named_parameters() if p.grad is not None}
    assert foreign.worst(got, foreign.reference(twin, [batch])) < 1e-5


def test_disabled_inside_a_wrapper_the_model_trains_ordinarily(foreign, tiny_tokenizer):
    model = foreign.tiny_model().train()
    twin = copy.deepcopy(model)
    framework.enable_token_selection(model)
    prepared = Accelerator(cpu=True, mixed_precision="bf16").prepare(model)
    framework.disable_token_selection(model)
    batch = next(iter(batches_of(foreign, tiny_tokenizer)))
    prepared(**batch).loss.backward()
    got = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    with torch.autocast("cpu", torch.bfloat16):
        want = foreign.exact(twin, [batch])
    assert foreign.worst(got, want) < 2e-2


def test_the_draw_counter_is_saved_with_accelerates_state(foreign, tiny_tokenizer, tmp_path):
    model = foreign.tiny_model().train()
    selection = framework.enable_token_selection(model, strategy="uniform", ratio=0.4)
    accelerator = Accelerator(cpu=True)
    model = accelerator.prepare(model)
    accelerator.register_for_checkpointing(selection)
    batch = next(iter(batches_of(foreign, tiny_tokenizer)))
    model(**batch)
    accelerator.save_state(str(tmp_path))
    want = model(**batch).loss
    assert model(**batch).loss != want
    accelerator.load_state(str(tmp_path))
    assert model(**batch).loss == want
