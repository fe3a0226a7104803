"""TRL's trainers on pairs of answers: `DPOTrainer` against the slow reference, `RewardTrainer` refused."""

import copy

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig
from torch.nn import functional
from transformers import LlamaForSequenceClassification
from trl import DPOConfig, DPOTrainer, RewardConfig, RewardTrainer

import framework
from framework.retention.reference import reference_gradients
from framework.selection import supervised_positions
from framework.training.loss import unwrapped

OPTIONS = {
    "per_device_train_batch_size": 2,
    "max_steps": 1,
    "max_grad_norm": 0.0,
    "report_to": "none",
    "use_cpu": True,
    "bf16": False,
    "save_strategy": "no",
    "disable_tqdm": True,
}


def preferences(foreign):
    pairs = foreign.prompts_and_answers(4)
    rows = [{"prompt": p, "chosen": f" {a}", "rejected": f" {pairs[i - 1][1]}s"} for i, (p, a) in enumerate(pairs)]
    return Dataset.from_list(rows)


def log_probabilities(model, batch, labels):
    """Sum over the labels of each sequence, `[batch]`."""
    logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], use_cache=False).logits
    losses = functional.cross_entropy(logits[:, :-1].transpose(1, 2), labels[:, 1:], reduction="none")
    return -losses.sum(1)


@pytest.mark.parametrize("lora", [False, True])
def test_a_step_of_dpo(foreign, tiny_tokenizer, tmp_path, lora):
    captured = foreign.Captured()
    trainer = DPOTrainer(
        model=foreign.tiny_model(),
        ref_model=foreign.tiny_model() if not lora else None,
        args=DPOConfig(output_dir=str(tmp_path), beta=0.5, **OPTIONS),
        train_dataset=preferences(foreign),
        processing_class=tiny_tokenizer,
        peft_config=LoraConfig(r=4, target_modules="all-linear") if lora else None,
        callbacks=[captured],
    )
    foreign.contributing(trainer.model)
    twin = copy.deepcopy(trainer.model).train()
    del unwrapped(twin).forward
    framework.enable_token_selection(trainer.model)
    batches = foreign.record_batches(trainer)
    trainer.train()

    (batch,) = batches
    labels = batch["input_ids"].masked_fill(batch["completion_mask"] == 0, -100)
    supervised = supervised_positions(labels, causal=True)
    with torch.no_grad():
        before = log_probabilities(foreign.tiny_model(), batch, labels)

    def gradients(selected):
        twin.zero_grad(set_to_none=True)
        with reference_gradients(unwrapped(twin), selected):
            chosen, rejected = (log_probabilities(twin, batch, labels) - before).chunk(2)
        (-functional.logsigmoid(0.5 * (chosen - rejected)).mean()).backward()
        return {name: p.grad for name, p in twin.named_parameters() if p.grad is not None}

    assert foreign.worst(captured.gradients, gradients(supervised)) < 1e-5
    assert foreign.worst(captured.gradients, gradients(torch.ones_like(supervised))) > 0.05


def test_the_reward_trainer_is_refused(foreign, tiny_tokenizer, tmp_path):
    model = LlamaForSequenceClassification(foreign.tiny_model(num_labels=1).config)
    trainer = RewardTrainer(
        model=model,
        args=RewardConfig(output_dir=str(tmp_path), **OPTIONS),
        train_dataset=preferences(foreign),
        processing_class=tiny_tokenizer,
    )
    framework.enable_token_selection(trainer.model)
    with pytest.raises(ValueError, match="forward got no labels"):
        trainer.train()
