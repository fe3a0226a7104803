"""`transformers.Trainer` with token selection: gradients of a step against the slow reference."""

import copy
import json

import pytest
import torch
from transformers import DataCollatorForSeq2Seq, Trainer, TrainingArguments

import framework


def trainer_of(model, data, tokenizer, output, *, callbacks=(), model_init=None, **options):
    arguments = TrainingArguments(
        output_dir=str(output),
        per_device_train_batch_size=2,
        max_grad_norm=0.0,
        report_to="none",
        use_cpu=True,
        disable_tqdm=True,
        **{"max_steps": 1, "save_strategy": "no", **options},
    )
    return Trainer(
        model=model,
        model_init=model_init,
        args=arguments,
        train_dataset=data,
        data_collator=DataCollatorForSeq2Seq(tokenizer, pad_to_multiple_of=8),
        callbacks=[*callbacks],
    )


@pytest.mark.parametrize("enabled", ["before", "after"])
@pytest.mark.parametrize("options", [{}, {"gradient_checkpointing": True}, {"gradient_accumulation_steps": 2}])
@pytest.mark.parametrize("lora", [False, True])
def test_a_step(foreign, tiny_tokenizer, tmp_path, lora, options, enabled):
    model = foreign.tiny_model()
    model = foreign.with_lora(model) if lora else model
    twin = copy.deepcopy(model)
    captured = foreign.Captured()
    draw = {"strategy": "supervised", "ratio": 0.6, "seed": 3}
    if enabled == "before":
        framework.enable_token_selection(model, **draw)
    trainer = trainer_of(
        model, foreign.tokenized(tiny_tokenizer), tiny_tokenizer, tmp_path, callbacks=[captured], **options
    )
    if enabled == "after":
        framework.enable_token_selection(trainer.model, **draw)
    batches = foreign.record_batches(trainer)
    trainer.train()
    want = foreign.reference(twin, batches, **draw)
    assert len(batches) == options.get("gradient_accumulation_steps", 1)
    assert foreign.worst(captured.gradients, want) < 1e-5
    assert foreign.worst(foreign.exact(twin, batches), want) > 0.05


@pytest.mark.parametrize("lora", [False, True])
def test_a_step_without_logits(foreign, tiny_tokenizer, tmp_path, lora):
    model = foreign.with_lora(foreign.tiny_model()) if lora else foreign.tiny_model()
    twin, captured = copy.deepcopy(model), foreign.Captured()
    framework.enable_token_selection(model, fused_loss=True)
    data, options = foreign.tokenized(tiny_tokenizer), {"gradient_accumulation_steps": 2}
    trainer = trainer_of(model, data, tiny_tokenizer, tmp_path, callbacks=[captured], **options)
    batches = foreign.record_batches(trainer)
    trainer.train()
    assert foreign.worst(captured.gradients, foreign.reference(twin, batches)) < 1e-5


@pytest.mark.parametrize("first_enabled", [False, True])
def test_models_that_the_trainer_builds_over_one_config(foreign, tiny_tokenizer, tmp_path, first_enabled):
    twin, built = foreign.tiny_model(), []
    config = foreign.tiny_model().config
    draw = {"strategy": "supervised", "ratio": 0.6, "seed": 3}

    def model_init():
        model = type(twin)(config)
        model.load_state_dict(twin.state_dict())
        if built or first_enabled:
            framework.enable_token_selection(model, **draw)
        built.append(model)
        return model

    trainer = trainer_of(None, foreign.tokenized(tiny_tokenizer), tiny_tokenizer, tmp_path, model_init=model_init)
    captured = foreign.Captured()
    trainer.add_callback(captured)
    batches = foreign.record_batches(trainer)
    trainer.train()
    assert len(built) == 2 and trainer.model is built[1]
    assert foreign.worst(captured.gradients, foreign.reference(twin, batches, **draw)) < 1e-5


def losses(trainer):
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def test_a_resumed_run_draws_what_an_uninterrupted_one_does(foreign, tiny_tokenizer, tmp_path):
    def trained(directory, steps, resume=None, callback=True):
        model = foreign.tiny_model()
        selection = framework.enable_token_selection(model, strategy="uniform", ratio=0.4)
        trainer = trainer_of(
            model,
            foreign.tokenized(tiny_tokenizer, 16),
            tiny_tokenizer,
            tmp_path / directory,
            callbacks=[framework.TokenSelectionCallback(selection)] if callback else [],
            max_steps=steps,
            save_strategy="steps",
            save_steps=2,
            logging_steps=1,
            lr_scheduler_type="constant",
        )
        trainer.train(resume_from_checkpoint=resume)
        return losses(trainer)

    whole = trained("whole", 4)
    saved = str(tmp_path / "whole" / "checkpoint-2")
    assert trained("resumed", 4, resume=saved) == whole
    assert trained("without", 4, resume=saved, callback=False) != whole
    kept = json.loads((tmp_path / "whole" / "checkpoint-2" / "config.json").read_text())
    assert "selective" not in json.dumps(kept)


def test_evaluation_is_that_of_the_plain_model(foreign, tiny_tokenizer, tmp_path):
    data = foreign.tokenized(tiny_tokenizer)
    model = foreign.tiny_model()
    want = trainer_of(copy.deepcopy(model), data, tiny_tokenizer, tmp_path).evaluate(data)
    framework.enable_token_selection(model, strategy="uniform", ratio=0.4)
    got = trainer_of(model, data, tiny_tokenizer, tmp_path).evaluate(data)
    assert got["eval_loss"] == want["eval_loss"]


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"label_smoothing_factor": 0.1}, ValueError, "set label_smoothing_factor=0"),
        (
            {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"context_fn": tuple}},
            ValueError,
            "set gradient_checkpointing=False",
        ),
    ],
)
def test_what_cannot_work_is_refused(foreign, tiny_tokenizer, tmp_path, options, error, message):
    model = foreign.tiny_model()
    framework.enable_token_selection(model)
    trainer = trainer_of(model, foreign.tokenized(tiny_tokenizer), tiny_tokenizer, tmp_path, **options)
    with pytest.raises(error, match=message):
        trainer.train()


def test_a_loss_of_the_callers_own_is_refused(foreign, tiny_tokenizer, tmp_path):
    model = foreign.tiny_model()
    framework.enable_token_selection(model)
    trainer = trainer_of(model, foreign.tokenized(tiny_tokenizer), tiny_tokenizer, tmp_path)
    trainer.compute_loss_func = lambda outputs, labels, num_items_in_batch: outputs.logits.mean()
    with pytest.raises(ValueError, match="and no compute_loss_func"):
        trainer.train()


def test_checkpointing_of_a_part_of_the_model_is_noticed(foreign, tiny_tokenizer):
    model = foreign.tiny_model()
    framework.enable_token_selection(model)
    model.model._set_gradient_checkpointing(enable=True)
    ids = torch.randint(6, 90, (2, 8))
    with pytest.raises(RuntimeError, match=r"block model\.layers\.0 has lost its token-selective function"):
        model.train()(input_ids=ids, labels=ids)


@pytest.mark.parametrize("before", [False, True])
def test_checkpointing_is_afterwards_as_it_was_asked_for(foreign, before):
    model = foreign.tiny_model().train()
    if before:
        model._set_gradient_checkpointing(enable=True)
    framework.enable_token_selection(model)
    framework.disable_token_selection(model)
    assert [layer.gradient_checkpointing for layer in model.model.layers] == [before] * 2
    framework.enable_token_selection(model)
    model._set_gradient_checkpointing(enable=not before)
    assert [layer.gradient_checkpointing for layer in model.model.layers] == [True] * 2
    framework.disable_token_selection(model)
    assert [layer.gradient_checkpointing for layer in model.model.layers] == [not before] * 2


def test_replicas_of_data_parallel_are_refused(foreign):
    model = foreign.tiny_model().train()
    framework.enable_token_selection(model)
    ids = torch.randint(6, 90, (2, 8))
    replica = model._replicate_for_data_parallel()
    with pytest.raises(ValueError, match="set CUDA_VISIBLE_DEVICES to one GPU"):
        model.forward.__func__(replica, input_ids=ids, labels=ids)
