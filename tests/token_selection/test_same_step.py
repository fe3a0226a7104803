"""The same weights and the same conversations under every trainer: one gradient."""

import copy
import json

import torch
from accelerate import Accelerator
from datasets import Dataset
from torch.utils.data import DataLoader
from transformers import DataCollatorForSeq2Seq, Trainer, TrainingArguments
from trl import SFTConfig, SFTTrainer

import framework
from framework.config import load_config
from framework.data import load_dataset
from framework.sharding.ranks import Ranks
from framework.sharding.single import SingleEngine
from framework.training.loop import train_window
from framework.training.objective import Objective
from framework.training.optimizer import optimizer_factory
from framework.training.setup import make_loaders

STEP = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, "max_steps": 1, "max_grad_norm": 0.0}
FOUR_ROWS = {"global_batch_size": 4, "micro_batch_size": 2}
ONE_ROW = {"global_batch_size": 1, "micro_batch_size": 1}
QUIET = {"report_to": "none", "use_cpu": True, "save_strategy": "no", "disable_tqdm": True}


def conversations(foreign):
    """Four, with two answers each: one step's worth, whatever the order in which a trainer takes them."""
    pairs = foreign.prompts_and_answers(4)
    turns = [({"role": "user", "content": p}, {"role": "assistant", "content": a}) for p, a in pairs]
    return [[*turns[i], *turns[i - 1]] for i in range(len(turns))]


def tokenized(records, tokenizer):
    rows = []
    for messages in records:
        encoded = tokenizer.apply_chat_template(messages, return_dict=True, return_assistant_tokens_mask=True)
        marked = zip(encoded["input_ids"], encoded["assistant_masks"], strict=True)
        rows.append({"input_ids": encoded["input_ids"], "labels": [t if a else -100 for t, a in marked]})
    return Dataset.from_list(rows)


def under_trainer(foreign, model, records, tokenizer, output):
    captured = foreign.Captured()
    framework.enable_token_selection(model)
    Trainer(
        model=model,
        args=TrainingArguments(output_dir=str(output), **STEP, **QUIET),
        train_dataset=tokenized(records, tokenizer),
        data_collator=DataCollatorForSeq2Seq(tokenizer),
        callbacks=[captured],
    ).train()
    return captured.gradients


def under_sft_trainer(foreign, model, records, tokenizer, output, **options):
    captured = foreign.Captured()
    trainer = SFTTrainer(
        model=model,
        args=SFTConfig(output_dir=str(output), assistant_only_loss=True, bf16=False, **{**STEP, **options}, **QUIET),
        train_dataset=Dataset.from_list([{"messages": messages} for messages in records]),
        processing_class=tokenizer,
        callbacks=[captured],
    )
    framework.enable_token_selection(trainer.model)
    trainer.train()
    return captured.gradients


def under_accelerate(model, records, tokenizer):
    framework.enable_token_selection(model)
    accelerator = Accelerator(cpu=True)
    loader = DataLoader(tokenized(records, tokenizer), batch_size=2, collate_fn=DataCollatorForSeq2Seq(tokenizer))
    model, loader = accelerator.prepare(model.train(), loader)
    window = list(loader)
    count = sum((batch["labels"][:, 1:] != -100).sum() for batch in window)
    for batch in window:
        accelerator.backward(model(**batch, num_items_in_batch=count).loss)
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def in_our_loop(model, records, tokenizer, tmp_path, packing):
    (tmp_path / "data.jsonl").write_text("\n".join(json.dumps({"messages": each}) for each in records))
    settings = {
        "run": {"output_dir": str(tmp_path / "run")},
        "model": {"from_config": model.config.to_dict(), "tokenizer": "unused"},
        "data": {"train": str(tmp_path / "data.jsonl"), "sequence_length": 280, "packing": packing},
        "selection": {"strategy": "supervised"},
        "retention": {"policy": "selective", "retain_linears": True},
        "optimizer": {"learning_rate": 1e-3},
        "training": {"max_steps": 1, "max_grad_norm": None} | (ONE_ROW if packing else FOUR_ROWS),
    }
    (tmp_path / "config.json").write_text(json.dumps(settings))
    config = load_config(tmp_path / "config.json")
    data = load_dataset(config.data.train, tokenizer=tokenizer, sequence_length=280)
    loader, _ = make_loaders(config, data, tokenizer.pad_token_id)
    objective, engine = Objective(model.train(), config), SingleEngine("fp32", torch.device("cpu"))
    engine.prepare(model, optimizer_factory(config))
    gradients = {}
    step = engine.step

    def capture(**arguments):
        gradients.update({name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None})
        return step(**arguments)

    engine.step = capture
    window = loader.next_window()
    assert sum(len(batch.documents.unique()) - int((batch.documents < 0).any()) for batch in window) == 4
    train_window(engine, Ranks(), objective, window, 1e-3, None)
    return gradients


def test_every_trainer_gives_the_gradient_of_the_reference(foreign, tiny_tokenizer, tmp_path):
    model, records = foreign.tiny_model(), conversations(foreign)
    rows = tokenized(records, tiny_tokenizer)
    whole = dict(DataCollatorForSeq2Seq(tiny_tokenizer)([*rows]))
    want = foreign.reference(model, [whole])
    packed = {"packing": True, "max_length": 256, "per_device_train_batch_size": 4, "gradient_accumulation_steps": 1}
    found = {
        "Trainer": under_trainer(foreign, copy.deepcopy(model), records, tiny_tokenizer, tmp_path / "a"),
        "SFTTrainer": under_sft_trainer(foreign, copy.deepcopy(model), records, tiny_tokenizer, tmp_path / "b"),
        "packed": under_sft_trainer(foreign, copy.deepcopy(model), records, tiny_tokenizer, tmp_path / "c", **packed),
        "Accelerate": under_accelerate(copy.deepcopy(model), records, tiny_tokenizer),
        "ours": in_our_loop(copy.deepcopy(model), records, tiny_tokenizer, tmp_path, packing=False),
        "ours, packed": in_our_loop(copy.deepcopy(model), records, tiny_tokenizer, tmp_path, packing=True),
    }
    errors = {name: foreign.worst(gradients, want) for name, gradients in found.items()}
    assert max(errors.values()) < 1e-5, errors
    assert foreign.worst(foreign.exact(model, [whole]), want) > 0.05
