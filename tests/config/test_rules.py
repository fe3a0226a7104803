"""Keys that do not go together."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from framework.config import Config, load_config

Write = Callable[[str], Path]
Problems = Callable[..., list[str]]


def test_rules_hold_for_configs_made_in_python(settings: dict[str, Any]) -> None:
    bad = settings | {"training": {"max_steps": 1, "global_batch_size": 8, "micro_batch_size": 3}}
    with pytest.raises(ValueError, match=r"3 does not divide training\.global_batch_size, which is 8"):
        Config.model_validate(bad)


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (
            ["selection.ratio=auto"],
            'selection.ratio: "auto" has no effect with selection.strategy "none": name a strategy',
        ),
        (
            ["selection.strategy=uniform", "selection.ratio=auto", "retention.policy=checkpoint"],
            'retention.policy: "checkpoint" is for exact training, but selection.strategy "uniform" without '
            'selection.ratio 1.0 leaves tokens out: set retention.policy "selective", or selection.strategy "none"',
        ),
        (
            ["sharding.zero_stage=auto"],
            'sharding.zero_stage: "auto" needs sharding.engine "deepspeed", which is "single"',
        ),
        (
            ["training.micro_batch_size=3"],
            "training.micro_batch_size: 3 does not divide training.global_batch_size, which is 8",
        ),
        (
            ['data.train=[{"path": "a", "weight": 2}, "b", {"path": "c"}]'],
            "data.train: some sources have a weight, but not b, c: give all of them one, or none",
        ),
        (
            ['data.eval=[{"path": "a", "weight": 2}]'],
            "data.eval: a weight has no effect in evaluation, which takes every sample once: leave it out",
        ),
        (
            ["data.eval=a", "data.eval_fraction=0.1"],
            "data.eval_fraction: contradicts data.eval: give the evaluation data, or hold some of data.train out",
        ),
        (
            ["model.path=null"],
            "model.path: missing: give model.path (weights), model.from_config (random weights), or both",
        ),
        (['model.from_config={"vocab_size": 9}'], 'model.from_config: needs "model_type", such as "llama"'),
        (
            ["model.dtype=bfloat16"],
            'model.dtype: "bfloat16" contradicts optimizer.precision "fp32", which holds weights in float32: '
            "leave model.dtype out, or change the precision",
        ),
        (
            ["model.dtype=float32", "optimizer.precision=pure_bf16"],
            'model.dtype: "float32" contradicts optimizer.precision "pure_bf16", which holds weights in bfloat16: '
            "leave model.dtype out, or change the precision",
        ),
        (
            ["model.quantization=nf4"],
            'model.quantization: "nf4" needs model.adapter: quantised weights cannot be trained',
        ),
        (
            ["model.quantization=nf4", 'model.adapter={"kind": "hra", "rank": 2}'],
            'model.adapter.kind: does not go with model.quantization "nf4": "hra" computes with the weights of its '
            "layers; use one of lora, ia3, vera, randlora, oft, boft, fourierft, ln_tuning, miss, trainable_tokens, "
            "beft, c3a, gralora, pvera, road, vblora, waveft",
        ),
        (
            [
                "model.quantization=nf4",
                'model.adapter={"kind": "lora", "rank": 2, "alpha": 4, "options": {"use_dora": true}}',
            ],
            'model.adapter.options.use_dora: does not go with model.quantization "nf4": with this value it computes '
            "with the weights of its layers; leave it out",
        ),
        (
            ["optimizer.name=adamw_8bit", "optimizer.precision=pure_bf16"],
            'optimizer.name: "adamw_8bit" does not go with optimizer.precision "pure_bf16": it rounds weights to the '
            'nearest, where bfloat16 ones need stochastic rounding; use "adamw", or precision "fp32_master"',
        ),
        (
            ["selection.ratio=0.25"],
            'selection.ratio: 0.25 has no effect with selection.strategy "none": name a strategy',
        ),
        (
            ["selection.ratio=labelled", "selection.strategy=uniform", "retention.policy=selective"],
            'selection.ratio: "labelled" needs selection.strategy "supervised", which is "uniform"',
        ),
        (
            ["selection.strategy=suffix", "retention.policy=selective"],
            'selection.ratio: missing: selection.strategy "suffix" needs a number in (0, 1], or "auto"',
        ),
        (
            [
                "selection.strategy=suffix",
                "selection.ratio=0.5",
                "selection.normalization=supervised",
                "retention.policy=selective",
            ],
            'selection.normalization: "supervised" makes up for labels that are left out by chance, and '
            'selection.strategy "suffix" leaves the same ones out for certain: set it to "selected", or leave it out',
        ),
        (['logging.trackers=["wandb", "wandb"]'], "logging.trackers: names a tracker twice"),
        (
            ['logging.trackers=["tensorboard"]', "logging.project=x"],
            'logging.project: has no effect without "wandb" among logging.trackers',
        ),
        (["logging.run_name=x"], 'logging.run_name: has no effect without "wandb" among logging.trackers'),
        (
            ['logging.profile={"start": 99, "steps": 3}'],
            "logging.profile: ends with step 101, but training.max_steps is 10",
        ),
        (
            ["logging.profile={}", "training.max_steps=11"],
            "logging.profile: ends with step 12, but training.max_steps is 11",
        ),
        (
            ["logging.memory_snapshot=101"],
            "logging.memory_snapshot: step 101 is beyond training.max_steps, which is 10",
        ),
        (["selection.tokentune=true"], 'selection.tokentune: needs selection.strategy "uniform", which is "none"'),
        (
            ["selection.strategy=supervised", "retention.policy=checkpoint"],
            'retention.policy: "checkpoint" is for exact training, but selection.strategy "supervised" without '
            'selection.ratio 1.0 leaves tokens out: set retention.policy "selective", or selection.strategy "none"',
        ),
        (
            ['retention.retain_linears=["down_proj"]', "retention.policy=checkpoint"],
            'retention.retain_linears: needs retention.policy "selective", which is "checkpoint"',
        ),
        (
            ["retention.kv_format=int8", "retention.policy=checkpoint"],
            'retention.kv_format: "int8" needs retention.policy "selective", which is "checkpoint"',
        ),
        (
            ["training.compile=true", "sharding.engine=deepspeed"],
            "training.compile: sharding.zero_stage 3 gathers weights by hooks inside of blocks, which cannot be "
            'compiled: set it to false, or sharding.engine to "fsdp", which shards as much',
        ),
        (
            ["training.compile=true", "logging.track_cpu_memory=true"],
            "logging.track_cpu_memory: cannot see into operators that training.compile fuses: set it to false",
        ),
        (
            ["retention.placement=host", "retention.policy=checkpoint"],
            'retention.placement: "host" needs retention.policy "selective", which is "checkpoint"',
        ),
        (
            ["data.train_on=last_assistant", "data.format=text"],
            'data.train_on: "last_assistant" has no effect on the format text: leave it out',
        ),
        (
            ["data.train_on=last_assistant", 'data.train=[{"path": "a", "format": "text"}]', "data.format=text"],
            'data.train_on: "last_assistant" has no effect on the format text: leave it out',
        ),
        (
            ["model.task=masked_lm", "data.format=completion"],
            'data.format: the format "completion" is not for model.task "masked_lm", whose format is "text"',
        ),
        (
            ["data.format=image_folder"],
            'data.format: the format "image_folder" needs model.task "image_classification", which is "causal_lm"',
        ),
        (
            ["model.task=masked_lm", 'data.train=["a.jsonl", {"path": "b.jsonl", "format": "messages"}]'],
            'data.train: the format "messages" is not for model.task "masked_lm", whose format is "text"',
        ),
        (
            [
                "model.task=image_classification",
                "data.sequence_length=null",
                'data.train=[{"path": "images", "split": "train"}]',
            ],
            "data.train: subset, split and revision have no effect on directories of images: leave them out",
        ),
        (
            ["model.task=masked_lm", "data.train_on=last_assistant"],
            'data.train_on: needs model.task "causal_lm", which is "masked_lm"',
        ),
        (
            ["model.task=sequence_classification", "data.cache_dir=some/where"],
            'data.cache_dir: has no effect with model.task "sequence_classification", whose tokens are in memory: '
            "leave it out",
        ),
        (
            ["data.sequence_length=null"],
            "data.sequence_length: missing, expected an integer of at least 2",
        ),
        (
            ["model.task=masked_lm", "data.packing=true"],
            'data.packing: needs model.task "causal_lm", which is "masked_lm": one sample a row here',
        ),
        (
            ["model.task=image_classification", "data.sequence_length=null", "model.tokenizer=some/tokenizer"],
            "model.tokenizer: has no effect on images: leave it out",
        ),
        (
            ["model.task=image_classification", "data.sequence_length=null", "data.overlong=truncate"],
            "data.overlong: has no effect on images: leave it out",
        ),
        (
            ['data.label_names=["no", "yes"]'],
            'data.label_names: has no effect with model.task "causal_lm": it is for sequence_classification and '
            "image_classification",
        ),
        (
            ["model.task=sequence_classification", 'data.label_names=["no", "yes", "no"]'],
            "data.label_names: repeats no",
        ),
        (["data.mask_probability=0.2"], 'data.mask_probability: needs model.task "masked_lm", which is "causal_lm"'),
        (
            ["data.augmentation=crop_flip"],
            'data.augmentation: needs model.task "image_classification", which is "causal_lm"',
        ),
        (
            [
                "model.task=sequence_classification",
                "selection.strategy=uniform",
                "selection.ratio=0.5",
                "retention.policy=selective",
                "selection.normalization=selected",
            ],
            'selection.normalization: "selected" has no effect with model.task "sequence_classification": the pooled '
            "token, which alone carries a label, is always selected",
        ),
        (
            ["sharding.offload_optimizer=true"],
            'sharding.offload_optimizer: sharding.engine "single" cannot offload: set it to false',
        ),
        (
            ["training.max_steps=null"],
            "training.max_steps: missing: give training.max_steps, or training.epochs",
        ),
        (
            ["training.epochs=2"],
            "training.epochs: contradicts training.max_steps, which is 10: leave one of them out",
        ),
        (
            ["schedule.warmup_steps=3", "schedule.warmup_ratio=0.1"],
            "schedule.warmup_ratio: contradicts schedule.warmup_steps, which is 3: leave one out",
        ),
        (
            ["training.max_skipped_steps=3"],
            'training.max_skipped_steps: needs training.non_finite "skip", which is "stop"',
        ),
        (
            ["training.eval_before_training=true"],
            "training.eval_before_training: needs data.eval or data.eval_fraction",
        ),
        (["training.eval_every_steps=5"], "training.eval_every_steps: needs data.eval or data.eval_fraction"),
        (
            ['training.early_stopping={"patience": 3}'],
            "training.early_stopping: compares evaluations on the way: needs data.eval or data.eval_fraction",
        ),
        (
            ["checkpoint.keep_best=1", "data.eval=eval.jsonl"],
            "checkpoint.keep_best: compares evaluations on the way: needs training.eval_every_steps of at least 1",
        ),
        (
            ["checkpoint.keep_best=1", "checkpoint.best_metric=bleu", "data.eval=e", "training.eval_every_steps=5"],
            'checkpoint.keep_best: checkpoint.best_metric "bleu" is not measured with model.task "causal_lm", but loss',
        ),
        (
            ['training.early_stopping={"patience": 3, "metric": "f1"}', "data.eval=e", "training.eval_every_steps=5"],
            'training.early_stopping: metric "f1" is not measured with model.task "causal_lm", but loss',
        ),
        (["checkpoint.best_metric=accuracy"], "checkpoint.best_metric: needs checkpoint.keep_best of at least 1"),
        (
            ["optimizer.decay_embeddings=false"],
            "optimizer.decay_embeddings: has no effect with optimizer.weight_decay 0",
        ),
        (
            [
                'optimizer.groups=[{"pattern": "a", "learning_rate": 1, "learning_rate_scale": 2}, '
                '{"pattern": "b("}, {"pattern": "c", "weight_decay": 0}]'
            ],
            'optimizer.groups: group "a" has both learning_rate and learning_rate_scale: leave one of them out; group '
            '"b(" is not a regular expression: missing ), unterminated subpattern at position 1; group "b(" needs '
            "learning_rate, learning_rate_scale or weight_decay",
        ),
        (["optimizer.loss_scale=128"], 'optimizer.loss_scale: needs optimizer.precision "fp16", which is "fp32"'),
        (
            ['optimizer.loss_scale={"initial": 0.5}', "optimizer.precision=fp16"],
            "optimizer.loss_scale: initial 0.5 is below minimum 1.0",
        ),
    ],
)
def test_keys_that_contradict_each_other(small: Path, overrides: list[str], expected: str, problems: Problems) -> None:
    assert problems(small, *overrides) == [f"--set: {expected}"]


def test_data_that_is_held_out_is_evaluation_data(small: Path) -> None:
    overrides = ["data.eval_fraction=0.1", "training.eval_every_steps=5", "training.eval_before_training=true"]
    config = load_config(small, [*overrides, 'training.early_stopping={"patience": 3}', "checkpoint.keep_best=1"])
    assert config.checkpoint.keep_best == 1


def test_rule_on_the_file_names_the_line_of_the_key(write: Write, problems: Problems, settings: dict[str, Any]) -> None:
    text = json.dumps(settings, indent=1).replace('"micro_batch_size": 2', '"micro_batch_size": 5')
    number = next(index for index, line in enumerate(text.splitlines(), start=1) if "micro" in line)
    assert problems(write(text)) == [
        f"line {number}: training.micro_batch_size: 5 does not divide training.global_batch_size, which is 8"
    ]


def test_misspelt_key_is_not_blamed_on_the_default_in_its_place(small: Path, problems: Problems) -> None:
    assert problems(small, "selection.strategy=supervised", "retention.polcy=selective") == [
        "--set: retention.polcy: unknown key, did you mean retention.policy?"
    ]


def test_ratio_one_is_exact_under_any_policy(small: Path) -> None:
    for strategy in ("supervised", "uniform", "bernoulli", "suffix"):
        config = load_config(small, [f"selection.strategy={strategy}", "selection.ratio=1"])
        assert config.resolved_ratio == 1.0
    assert load_config(small, ["retention.policy=selective"]).resolved_ratio == 1.0
    supervised = ["selection.strategy=supervised", "retention.policy=selective"]
    assert load_config(small, supervised).resolved_ratio == "labelled"
    assert load_config(small, [*supervised, "selection.ratio=0.5"]).resolved_ratio == 0.5


def test_the_mean_of_a_suffix_is_over_its_own_labels(small: Path) -> None:
    suffix = ["selection.strategy=suffix", "selection.ratio=0.5", "retention.policy=selective"]
    assert load_config(small, suffix).resolved_normalization == "selected"
    assert load_config(small, [*suffix, "model.task=sequence_classification"]).resolved_normalization == "supervised"
    uniform = ["selection.strategy=uniform", *suffix[1:]]
    assert load_config(small, uniform).resolved_normalization == "supervised"
    assert load_config(small, [*uniform, "selection.normalization=selected"]).resolved_normalization == "selected"


def test_train_on_needs_one_source_of_conversations(small: Path) -> None:
    for source in ('"a"', '[{"path": "a", "format": "messages"}]', '[{"path": "a", "format": "text"}, "b"]'):
        config = load_config(small, ["data.train_on=last_assistant", f"data.train={source}"])
        assert config.data.train_on == "last_assistant"
    evaluated = ['data.train=[{"path": "a", "format": "text"}]', 'data.eval=[{"path": "b", "format": "alpaca"}]']
    load_config(small, ["data.train_on=last_assistant", *evaluated])


def test_images_have_no_sequence_length(small: Path, problems: Problems) -> None:
    (problem,) = problems(small, "model.task=image_classification")
    assert problem.endswith("has no effect on images, whose number of tokens the model sets: leave it out")
    config = load_config(small, ["model.task=image_classification", "data.sequence_length=null"])
    assert config.data.sequence_length is None


def test_a_masked_lm_hides_fifteen_percent_unless_told(small: Path) -> None:
    assert load_config(small, ["model.task=masked_lm"]).mask_probability == 0.15
    assert load_config(small, ["model.task=masked_lm", "data.mask_probability=0.4"]).mask_probability == 0.4


def test_length_in_epochs(small: Path) -> None:
    config = load_config(small, ["training.max_steps=null", "training.epochs=2.5"])
    assert (config.training.max_steps, config.training.epochs) == (None, 2.5)
    resolved = config.with_max_steps(40)
    assert (resolved.training.max_steps, resolved.training.epochs) == (40, None)
    assert Config.model_validate_json(json.dumps(resolved.to_json())) == resolved


def test_a_loss_scale_is_a_number_or_options(small: Path) -> None:
    for value, expected in (("128", 128.0), ('{"growth_interval": 5}', {"initial": 65536.0, "growth_interval": 5})):
        scale = load_config(small, ["optimizer.precision=fp16", f"optimizer.loss_scale={value}"]).optimizer.loss_scale
        found = scale if isinstance(scale, float) else scale.model_dump(exclude={"minimum"})
        assert found == expected
