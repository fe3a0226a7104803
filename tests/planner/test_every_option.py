"""Every key of a config is in the ledger, or listed here with the reason why it is not.

A key that is in neither list fails the first test: whoever adds one decides. Those of the ledger have a value with
which it is another one, or another law is asked for.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any, get_args

import pytest
from pydantic import BaseModel

from framework.config import Config
from framework.models.configured import base_config
from framework.planner.choice import Choice
from framework.planner.extraction import law_key, law_settings
from framework.planner.kinds import config_of_law, kind_of
from framework.planner.planning import PlannedJob
from framework.planner.small_models import Family

LLAMA = {
    "model_type": "llama",
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 5,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 128,
    "max_position_embeddings": 512,
}
LORA = {"kind": "lora", "rank": 4, "alpha": 8.0}

IN_LEDGER: dict[str, list[dict[str, Any]]] = {
    "model.from_config": [{}, {"model.from_config": LLAMA | {"num_hidden_layers": 6}}],
    "model.attention": [{}, {"model.attention": "eager"}],
    "model.adapter": [{}, {"model.adapter": LORA}],
    "model.adapter.kind": [{"model.adapter": LORA}, {"model.adapter": {"kind": "vera", "rank": 4}}],
    "model.adapter.rank": [{"model.adapter": LORA}, {"model.adapter": LORA | {"rank": 8}}],
    "model.adapter.dropout": [{"model.adapter": LORA}, {"model.adapter": LORA | {"dropout": 0.1}}],
    "model.adapter.target_modules": [
        {"model.adapter": LORA},
        {"model.adapter": LORA | {"target_modules": ["q_proj"]}},
    ],
    "model.adapter.modules_to_save": [
        {"model.adapter": LORA},
        {"model.adapter": LORA | {"modules_to_save": ["lm_head"]}},
    ],
    "model.adapter.options": [
        {"model.adapter": LORA},
        {"model.adapter": LORA | {"options": {"use_dora": True}}},
    ],
    "model.quantization": [{"model.adapter": LORA}, {"model.adapter": LORA, "model.quantization": "nf4"}],
    "data.sequence_length": [{}, {"data.sequence_length": 96}],
    "data.packing": [{}, {"data.packing": True}],
    "selection.strategy": [
        {"selection.strategy": "uniform", "retention.policy": "selective", "selection.ratio": 0.5},
        {"selection.strategy": "suffix", "retention.policy": "selective", "selection.ratio": 0.5},
    ],
    "selection.ratio": [
        {"selection.strategy": "uniform", "retention.policy": "selective", "selection.ratio": 0.5},
        {"selection.strategy": "uniform", "retention.policy": "selective", "selection.ratio": 0.6},
    ],
    "selection.normalization": [
        {"selection.strategy": "uniform", "retention.policy": "selective", "selection.ratio": 0.5},
        {
            "selection.strategy": "uniform",
            "retention.policy": "selective",
            "selection.ratio": 0.5,
            "selection.normalization": "selected",
        },
    ],
    "selection.correction": [
        {"selection.strategy": "uniform", "retention.policy": "selective", "selection.ratio": 0.5},
        {
            "selection.strategy": "uniform",
            "retention.policy": "selective",
            "selection.ratio": 0.5,
            "selection.correction": 1.0,
        },
    ],
    "selection.tokentune": [
        {"selection.strategy": "uniform", "retention.policy": "selective", "selection.ratio": 0.5},
        {
            "selection.strategy": "uniform",
            "retention.policy": "selective",
            "selection.ratio": 0.5,
            "selection.tokentune": True,
        },
    ],
    "retention.policy": [{}, {"retention.policy": "checkpoint"}],
    "retention.retain_linears": [
        {"retention.policy": "selective"},
        {"retention.policy": "selective", "retention.retain_linears": True},
        {"retention.policy": "selective", "retention.retain_linears": ["down_proj"]},
        {"retention.policy": "selective", "retention.retain_linears": ["down_proj", "self_attn.o_proj"]},
    ],
    "retention.kv_format": [
        {"retention.policy": "selective"},
        {"retention.policy": "selective", "retention.kv_format": "int8"},
        {"retention.policy": "selective", "retention.kv_format": "int4"},
        {"retention.policy": "selective", "retention.kv_format": "recompute"},
    ],
    "retention.placement": [
        {"retention.policy": "selective"},
        {"retention.policy": "selective", "retention.placement": "host"},
    ],
    "sharding.engine": [{}, {"sharding.engine": "fsdp"}],
    "sharding.zero_stage": [
        {"sharding.engine": "deepspeed"},
        {"sharding.engine": "deepspeed", "sharding.zero_stage": 2},
    ],
    "sharding.reshard_after_forward": [
        {"sharding.engine": "fsdp"},
        {"sharding.engine": "fsdp", "sharding.reshard_after_forward": False},
    ],
    "sharding.replicas": [{"sharding.engine": "fsdp"}, {"sharding.engine": "fsdp", "sharding.replicas": 2}],
    "sharding.offload_optimizer": [
        {"sharding.engine": "deepspeed"},
        {"sharding.engine": "deepspeed", "sharding.offload_optimizer": True},
    ],
    "sharding.offload_parameters": [
        {"sharding.engine": "deepspeed", "sharding.offload_optimizer": True},
        {"sharding.engine": "deepspeed", "sharding.offload_optimizer": True, "sharding.offload_parameters": True},
    ],
    "optimizer.name": [{}, {"optimizer.name": "adamw_8bit"}],
    "optimizer.precision": [{}, {"optimizer.precision": "pure_bf16"}],
    "optimizer.groups": [
        {"sharding.engine": "deepspeed", "sharding.zero_stage": 1},
        {
            "sharding.engine": "deepspeed",
            "sharding.zero_stage": 1,
            "optimizer.groups": [{"pattern": "q_proj", "learning_rate": 1e-5}],
        },
    ],
    "training.global_batch_size": [{}, {"training.global_batch_size": 2}],
    "training.micro_batch_size": [{}, {"training.micro_batch_size": 2}],
    "training.max_grad_norm": [{}, {"training.max_grad_norm": None}],
    "hardware.nodes": [{"sharding.engine": "fsdp"}, {"sharding.engine": "fsdp", "hardware.nodes": 2}],
    "hardware.gpus_per_node": [{"sharding.engine": "fsdp"}, {"sharding.engine": "fsdp", "hardware.gpus_per_node": 4}],
}
"""Of each key runs that differ in it (and in what it needs), whose ledgers differ."""

NOT_IN_LEDGER = {
    "run.output_dir": "a place",
    "run.seed": "values, not sizes",
    "model.path": "what it describes counts as `model.from_config` does",
    "model.pad_vocabulary_to": "as `model.added_tokens`",
    "model.dtype": "no other than `optimizer.precision` implies",
    "model.task": "the planner refuses others than causal_lm",
    "model.tokenizer": "text becomes tokens before a step",
    "model.revision": "as `model.path`",
    "model.offline": "as `model.path`",
    "model.trust_remote_code": "as `model.path`",
    "model.added_tokens": "rows of the embedding, which the model is built with",
    "model.adapter.alpha": "a factor",
    "data.train": "rows are taken to be full",
    "data.eval": "an evaluation keeps nothing for a backward pass, and its head goes in chunks",
    "data.eval_fraction": "as `data.eval`",
    "data.format": "text becomes tokens before a step",
    "data.train_on": "the labelled share, which the planner measures",
    "data.overlong": "rows are taken to be full",
    "data.supervised_fraction": "the labelled share",
    "data.cache_dir": "a place",
    "data.workers": "the host's memory",
    "data.label_names": "another task's",
    "data.mask_probability": "another task's",
    "data.augmentation": "another task's",
    "sharding.timeout_seconds": "waiting",
    "optimizer.learning_rate": "a factor",
    "optimizer.betas": "a factor",
    "optimizer.epsilon": "a factor",
    "optimizer.weight_decay": "a factor; which parameters decay makes groups, whatever it is",
    "optimizer.decay_embeddings": "moves parameters between two groups",
    "optimizer.groups.pattern": "with `optimizer.groups`",
    "optimizer.groups.learning_rate": "a factor",
    "optimizer.groups.learning_rate_scale": "a factor",
    "optimizer.groups.weight_decay": "a factor",
    "optimizer.loss_scale": "a factor",
    "optimizer.loss_scale.initial": "a factor",
    "optimizer.loss_scale.growth_interval": "a factor",
    "optimizer.loss_scale.minimum": "a factor",
    "schedule.kind": "a factor",
    "schedule.warmup_steps": "a factor",
    "schedule.warmup_ratio": "a factor",
    "schedule.final_ratio": "a factor",
    "training.max_steps": "a number of steps that are alike",
    "training.epochs": "a number of steps that are alike",
    "training.deterministic": "kernels of another order, whose outputs are as large",
    "training.compile": "a plan counts what operators allocate one by one",
    "training.non_finite": "what happens to a step that is not finite",
    "training.max_skipped_steps": "what happens to a step that is not finite",
    "training.eval_every_steps": "as `data.eval`",
    "training.eval_before_training": "as `data.eval`",
    "training.early_stopping": "a number of steps that are alike",
    "training.early_stopping.patience": "a number of steps that are alike",
    "training.early_stopping.min_delta": "a number of steps that are alike",
    "training.early_stopping.metric": "a number of steps that are alike",
    "training.eval_max_samples": "as `data.eval`",
    "checkpoint.every_steps": "tensors are written one by one",
    "checkpoint.asynchronous": "a copy in the host's memory",
    "checkpoint.keep_last": "files",
    "checkpoint.keep_best": "files",
    "checkpoint.best_metric": "files",
    "logging.every_steps": "lines",
    "logging.track_cpu_memory": "watches",
    "logging.trackers": "lines",
    "logging.project": "lines",
    "logging.run_name": "lines",
    "logging.profile": "the host's memory",
    "logging.profile.start": "the host's memory",
    "logging.profile.steps": "the host's memory",
    "logging.profile.shapes": "the host's memory",
    "logging.profile.memory": "the host's memory",
    "logging.memory_snapshot": "the host's memory",
    "hardware.gpu_memory": "the budget",
    "hardware.host_memory": "the host's budget",
    "cluster.min_nodes": "plans are made for each number of machines",
    "cluster.time": "where and when, not what",
    "cluster.partition": "where and when, not what",
    "cluster.account": "where and when, not what",
    "cluster.qos": "where and when, not what",
    "cluster.gpu_option": "the same accelerators",
    "cluster.gpu_type": "`hardware` or `--device` says what it has",
    "cluster.cpus_per_node": "processors",
    "cluster.launcher": "the same ranks",
    "cluster.setup": "before the ranks",
    "cluster.stop_seconds": "where and when, not what",
    "cluster.max_requeues_without_progress": "where and when, not what",
    "cluster.sbatch": "where and when, not what",
    "planner.objective": "what is chosen, not what it takes",
    "planner.max_slowdown": "what is chosen, not what it takes",
    "planner.top": "what is listed",
}
"""Every other key, and why the device's memory at a step does not depend on it."""


def keys_of(model: type[BaseModel], before: str = "") -> Iterator[str]:
    """The keys of a config, those of optional sections with the section itself."""
    for name, field in model.model_fields.items():
        parts = [field.annotation, *get_args(field.annotation)]
        sections = [part for part in parts if isinstance(part, type) and issubclass(part, BaseModel)]
        for section in sections:
            yield from keys_of(section, f"{before}{name}.")
        if not sections or len(parts) > 1:
            yield before + name


def config_of(changes: dict[str, Any]) -> Config:
    values: dict[str, Any] = {
        "run": {"output_dir": "unused"},
        "model": {"from_config": LLAMA, "tokenizer": "unused"},
        "data": {"train": "unused", "sequence_length": 64},
        "optimizer": {"learning_rate": 1e-3},
        "training": {"max_steps": 1, "global_batch_size": 16, "micro_batch_size": 1},
    }
    ranks = 2 if changes.get("sharding.engine") else 1
    for key, value in ({"hardware.gpus_per_node": ranks} | changes).items():
        section, name = key.split(".")
        values.setdefault(section, {})[name] = value
    return Config.model_validate(values)


def asked_for(changes: dict[str, Any]) -> tuple[object, ...]:
    """All that a run's ledger comes from: the law by its name, the choice, the model's sizes, what an engine holds."""
    config = config_of(changes)
    job = PlannedJob(config, 0.5, lambda line: None)
    choice = Choice.of(config, config.described_ranks, 0.5)
    law = law_key(law_settings(config_of_law(config, kind_of(choice)), Family(base_config(config))))
    holder = job.memory._holders.of(choice, [])
    held = job.memory._holders.sharded(choice) if holder is None else (holder.held(), holder.on_host())
    return law, choice, json.dumps(job.memory.sizes(choice)), str(held)


def test_every_key_is_in_the_ledger_or_has_a_reason():
    keys = set(keys_of(Config))
    assert not set(IN_LEDGER) & set(NOT_IN_LEDGER)
    assert set(IN_LEDGER) | set(NOT_IN_LEDGER) == keys


@pytest.mark.parametrize("key", IN_LEDGER)
def test_another_value_is_another_ledger(key):
    ledgers = [asked_for(changes) for changes in IN_LEDGER[key]]
    assert len(ledgers) == len(set(ledgers)) > 1


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("model.tokenizer", "other"),
        ("optimizer.betas", (0.8, 0.9)),
        ("optimizer.weight_decay", 0.5),
        ("training.deterministic", True),
        ("training.non_finite", "skip"),
        ("checkpoint.asynchronous", True),
        ("logging.every_steps", 7),
        ("sharding.timeout_seconds", 5),
    ],
)
def test_other_keys_leave_it_alone(key, value):
    assert key in NOT_IN_LEDGER
    assert asked_for({}) == asked_for({key: value})
