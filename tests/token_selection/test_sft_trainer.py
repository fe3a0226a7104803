"""TRL's `SFTTrainer` with token selection: gradients of a step against the slow reference."""

import copy
import types

import pytest
from datasets import Dataset
from peft import LoraConfig
from trl import SFTConfig, SFTTrainer

import framework
from framework.training.loss import unwrapped

KINDS = {
    "plain": {},
    "checkpointing off": {"gradient_checkpointing": False},
    "packed": {"packing": True, "max_length": 64},
    "padding-free": {"padding_free": True, "max_length": None},
    "completion": {},
    "assistant": {"assistant_only_loss": True},
    "accumulated": {"gradient_accumulation_steps": 2},
}


def data_of(kind, pairs):
    if kind == "completion":
        return Dataset.from_list([{"prompt": prompt, "completion": answer} for prompt, answer in pairs])
    if kind == "assistant":
        turns = [({"role": "user", "content": p}, {"role": "assistant", "content": a}) for p, a in pairs]
        return Dataset.from_list([{"messages": [*turns[i], *turns[i - 1]]} for i in range(len(turns))])
    return Dataset.from_list([{"text": f"{prompt} {answer}"} for prompt, answer in pairs])


def trainer_of(model, data, tokenizer, output, *, callbacks=(), peft_config=None, **options):
    arguments = SFTConfig(
        output_dir=str(output),
        per_device_train_batch_size=2,
        max_steps=1,
        max_grad_norm=0.0,
        report_to="none",
        use_cpu=True,
        bf16=False,
        save_strategy="no",
        disable_tqdm=True,
        **options,
    )
    return SFTTrainer(
        model=model,
        args=arguments,
        train_dataset=data,
        processing_class=tokenizer,
        peft_config=peft_config,
        callbacks=[*callbacks],
    )


def without_fused_head(model):
    """A copy with the family's own forward: a copy of TRL's is still bound to the model it was made for."""
    twin = copy.deepcopy(model)
    del unwrapped(twin).forward
    return twin


@pytest.mark.parametrize("lora", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_a_step(foreign, tiny_tokenizer, tmp_path, kind, lora):
    captured = foreign.Captured()
    trainer = trainer_of(
        foreign.tiny_model(),
        data_of(kind, foreign.prompts_and_answers(8)),
        tiny_tokenizer,
        tmp_path,
        callbacks=[captured],
        peft_config=LoraConfig(r=4, target_modules="all-linear") if lora else None,
        **KINDS[kind],
    )
    foreign.contributing(trainer.model)
    twin = without_fused_head(trainer.model)
    selection = framework.enable_token_selection(trainer.model)
    batches = foreign.record_batches(trainer)
    trainer.train()
    want = foreign.reference(twin, batches)
    assert foreign.worst(captured.gradients, want) < 1e-5
    assert not selection.retention.fallbacks
    if kind in ("completion", "assistant"):  # of a plain text every token has a label: the selection is exact there
        assert foreign.worst(foreign.exact(twin, batches), want) > 0.05
    assert ("position_ids" in batches[0]) == (kind in ("packed", "padding-free"))


def dft(logits, targets, weights):
    """Dynamic fine-tuning (arXiv 2508.05629, equation 9): a token's loss times its probability, a constant."""
    log_probability = logits.log_softmax(-1).gather(1, targets[:, None])[:, 0]
    return -(log_probability * log_probability.exp().detach() * weights).sum()


def test_dynamic_fine_tuning_over_a_share_of_the_context(foreign, tiny_tokenizer, tmp_path):
    captured = foreign.Captured()
    data = data_of("completion", foreign.prompts_and_answers(8))
    trainer = trainer_of(foreign.tiny_model(), data, tiny_tokenizer, tmp_path, callbacks=[captured], loss_type="dft")
    twin = without_fused_head(trainer.model)
    draw = {"strategy": "supervised", "ratio": 0.6, "seed": 4}
    framework.enable_token_selection(trainer.model, **draw)
    batches = foreign.record_batches(trainer)
    trainer.train()
    assert foreign.worst(captured.gradients, foreign.reference(twin, batches, loss=dft, **draw)) < 1e-5


def test_uniform_selection_needs_a_loss_without_weights(foreign, tiny_tokenizer, tmp_path):
    captured = foreign.Captured()
    data = data_of("plain", foreign.prompts_and_answers(8))
    trainer = trainer_of(foreign.tiny_model(), data, tiny_tokenizer, tmp_path, callbacks=[captured])
    twin = without_fused_head(trainer.model)
    draw = {"strategy": "uniform", "ratio": 0.4, "seed": 4}
    framework.enable_token_selection(trainer.model, **draw)
    with pytest.raises(ValueError, match="use strategy='supervised', or normalization='selected'"):
        trainer.train()
    framework.disable_token_selection(trainer.model)
    framework.enable_token_selection(trainer.model, normalization="selected", **draw)
    batches = foreign.record_batches(trainer)
    trainer.train()
    assert foreign.worst(captured.gradients, foreign.reference(twin, batches, weighted=False, **draw)) < 1e-5


def test_enabled_before_the_trainer_takes_the_forward_it_says_so(foreign, tiny_tokenizer, tmp_path):
    model = foreign.tiny_model()
    framework.enable_token_selection(model)
    trainer = trainer_of(model, data_of("completion", foreign.prompts_and_answers(8)), tiny_tokenizer, tmp_path)
    with pytest.raises(
        RuntimeError, match=r"after constructing it: framework\.enable_token_selection\(trainer\.model\)"
    ):
        trainer.train()


def test_trls_selective_checkpointing_is_refused(foreign, tiny_tokenizer, tmp_path):
    trainer = trainer_of(
        foreign.tiny_model(),
        data_of("completion", foreign.prompts_and_answers(8)),
        tiny_tokenizer,
        tmp_path,
        gradient_checkpointing_kwargs={"selective": True},
    )
    framework.enable_token_selection(trainer.model)
    with pytest.raises(ValueError, match="set gradient_checkpointing=False"):
        trainer.train()


def test_disabled_again_the_trainer_has_its_own_forward(foreign, tiny_tokenizer, tmp_path):
    trainer = trainer_of(
        foreign.tiny_model(), data_of("completion", foreign.prompts_and_answers(8)), tiny_tokenizer, tmp_path
    )
    fused = trainer.model.forward
    framework.enable_token_selection(trainer.model)
    assert trainer.model.forward != fused
    framework.disable_token_selection(trainer.model)
    assert trainer.model.forward == fused


def test_the_chunked_loss_of_older_versions_is_refused(foreign):
    """Up to 1.14 TRL gave the model a forward that takes labels and forms no logits, without an argument to say so."""
    model = foreign.tiny_model()
    source = "def _chunked_ce_forward(self, *args, **kwargs): ..."
    names = {"__name__": "trl.trainer.sft_trainer"}
    exec(source, names)
    model.forward = types.MethodType(names["_chunked_ce_forward"], model)
    with pytest.raises(ValueError, match=r"use trl>=1\.16"):
        framework.enable_token_selection(model)
