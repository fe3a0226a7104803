"""`transformers.Trainer` with token selection on models that are not causal: against the slow reference."""

import copy

import pytest
import torch
from datasets import Dataset
from transformers import (
    BertConfig,
    BertForMaskedLM,
    BertForSequenceClassification,
    DataCollatorWithPadding,
    Trainer,
    TrainingArguments,
)

import framework
from framework.retention.reference import reference_gradients
from framework.selection import Selection
from framework.training.loss import LossKind, rows_loss, selected_supervised_rows

SIZES = {
    "vocab_size": 106,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
}
STILL = {
    "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
    "initializer_range": 0.2,
}


def train(foreign, model, rows, output, collator):
    captured = foreign.Captured()
    arguments = TrainingArguments(
        output_dir=str(output),
        per_device_train_batch_size=2,
        gradient_accumulation_steps=2,
        max_steps=1,
        max_grad_norm=0.0,
        report_to="none",
        use_cpu=True,
        save_strategy="no",
        disable_tqdm=True,
        remove_unused_columns=False,
    )
    trainer = Trainer(model=model, args=arguments, train_dataset=rows, data_collator=collator, callbacks=[captured])
    batches = foreign.record_batches(trainer)
    trainer.train()
    return captured.gradients, batches


@pytest.fixture
def model():
    torch.manual_seed(1)
    return BertForMaskedLM(BertConfig(**SIZES, **STILL))


def test_masked_language_model(foreign, model, tiny_tokenizer, tmp_path):
    twin = copy.deepcopy(model)
    rows = []
    for prompt, answer in foreign.prompts_and_answers(4):
        ids = tiny_tokenizer(f"{prompt} {answer}")["input_ids"][:24]
        ids += [0] * (24 - len(ids))
        masked = [i % 5 == len(rows) % 3 and token != 0 for i, token in enumerate(ids)]
        rows.append(
            {
                "input_ids": [5 if hidden else token for token, hidden in zip(ids, masked, strict=True)],
                "labels": [token if hidden else -100 for token, hidden in zip(ids, masked, strict=True)],
                "attention_mask": [int(token != 0) for token in ids],
            }
        )
    framework.enable_token_selection(model)
    got, batches = train(foreign, model, Dataset.from_list(rows), tmp_path, None)
    count = sum(int((batch["labels"] != -100).sum()) for batch in batches)
    for batch in batches:
        selection = Selection.of_mask(batch["labels"] != -100, torch.ones(2, 24))
        index, targets, _ = selected_supervised_rows(batch["labels"], LossKind.OWN, selection)
        with reference_gradients(twin, selection.mask(24)):
            logits = twin(batch["input_ids"], batch["attention_mask"]).logits
            (rows_loss(logits.flatten(0, 1)[index], targets) / count).backward()
    assert foreign.worst(got, {name: p.grad for name, p in twin.named_parameters() if p.grad is not None}) < 1e-5


def test_sequence_classifier(foreign, tiny_tokenizer, tmp_path):
    torch.manual_seed(1)
    model = BertForSequenceClassification(BertConfig(**SIZES, **STILL, num_labels=3))
    twin = copy.deepcopy(model)
    texts = [prompt for prompt, _ in foreign.prompts_and_answers(4)]
    rows = [{"input_ids": tiny_tokenizer(text)["input_ids"], "labels": i % 3} for i, text in enumerate(texts)]
    framework.enable_token_selection(model)
    got, batches = train(foreign, model, Dataset.from_list(rows), tmp_path, DataCollatorWithPadding(tiny_tokenizer))
    for batch in batches:
        mask = torch.zeros(batch["input_ids"].shape, dtype=torch.bool)
        mask[:, 0] = True  # the token that BERT pools
        with reference_gradients(twin, mask):
            (twin(**batch).loss / len(batches)).backward()
    assert foreign.worst(got, {name: p.grad for name, p in twin.named_parameters() if p.grad is not None}) < 1e-5
