"""The update rule, steps, evaluation and checkpoints."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from framework.config.sections.base import Auto, Count, CountOrZero, NonEmpty, Section


class ParameterGroupConfig(Section):
    """Parameters with a learning rate or a weight decay of their own."""

    pattern: NonEmpty
    """A regular expression that is searched for in the full names of trainable parameters, such as "lora_B". A
    parameter belongs to the first group that matches it."""

    learning_rate: Annotated[float, Field(gt=0)] | None = None
    """Their peak learning rate; the schedule's shape is the same for all. Null: `optimizer.learning_rate`."""

    learning_rate_scale: Annotated[float, Field(gt=0)] | None = None
    """The same as a multiple of `optimizer.learning_rate`."""

    weight_decay: Annotated[float, Field(ge=0)] | None = None
    """Weight decay of all of them, norms and biases included. Null: as if they were in no group."""


class LossScaleConfig(Section):
    """How the loss scale of float16 follows the gradients: halved when they overflow, doubled when they do not."""

    initial: Annotated[float, Field(gt=0)] = 65536.0
    """The scale of the first step."""

    growth_interval: Count = 2000
    """Steps in a row without overflow after which the scale is doubled."""

    minimum: Annotated[float, Field(gt=0)] = 1.0
    """The scale falls no lower; an overflow at it counts as a step that is not finite (`training.non_finite`)."""


class OptimizerConfig(Section):
    """The update rule and the precision it works in."""

    name: Literal["adamw", "adamw_8bit"] = "adamw"
    """AdamW; biases, norms and other one-dimensional parameters are not decayed. `adamw_8bit` holds its moments in
    8 bits (bitsandbytes), but for tensors of fewer than 4096 elements."""

    learning_rate: Annotated[float, Field(gt=0)]
    """Peak learning rate."""

    betas: tuple[Annotated[float, Field(ge=0, lt=1)], Annotated[float, Field(ge=0, lt=1)]] = (0.9, 0.95)
    """Decay rates of the running averages of the gradient and of its square."""

    epsilon: Annotated[float, Field(gt=0)] = 1e-8
    """Added to the denominator of the update."""

    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    """Decoupled weight decay, scaled by the learning rate."""

    decay_embeddings: bool = True
    """Whether embeddings decay like other matrices; with tied embeddings this includes the head."""

    groups: list[ParameterGroupConfig] = []
    """Parameters with a learning rate or a weight decay of their own."""

    precision: Literal["fp32", "fp32_master", "pure_bf16", "fp16"] = "fp32"
    """`fp32`: everything in float32. `fp32_master`: float32 weights, bfloat16 computation. `pure_bf16`: bfloat16
    weights, updated with stochastic rounding. `fp16`: float32 weights, float16 computation with loss scaling."""

    loss_scale: Annotated[float, Field(gt=0)] | LossScaleConfig | None = None
    """With `fp16`: a number for a constant scale, or how the scale follows the gradients. Null: the latter with its
    defaults."""


class ScheduleConfig(Section):
    """The learning rate over the steps."""

    kind: Literal["constant", "linear", "cosine"] = "cosine"
    """Shape of the decay after the warm-up."""

    warmup_steps: CountOrZero = 0
    """Steps of linear rise to the peak."""

    warmup_ratio: Annotated[float, Field(gt=0, lt=1)] | None = None
    """The same as a share of all steps, rounded up, instead of `warmup_steps`."""

    final_ratio: Annotated[float, Field(ge=0, le=1)] = 0.0
    """Learning rate at the last step / peak learning rate; without effect on a constant schedule."""


class EarlyStoppingConfig(Section):
    """When training ends for want of improvement. What counts are the evaluations of `training.eval_every_steps`."""

    patience: Count
    """Training ends after so many evaluations in a row without improvement."""

    min_delta: Annotated[float, Field(ge=0)] = 0.0
    """A change for the better counts as an improvement if it is larger than this."""

    metric: NonEmpty = "loss"
    """The figure that is to improve: "loss", or another one of the task's evaluation, of which higher is better."""


class TrainingConfig(Section):
    """Steps, batches and evaluation."""

    max_steps: Count | None = None
    """Optimiser steps; a step that is skipped counts. Null: `epochs` says how many."""

    epochs: Annotated[float, Field(gt=0)] | None = None
    """Passes over `data.train` instead of `max_steps`, rounded up to whole steps; a run's own config.json has their
    number of steps written out."""

    global_batch_size: Count
    """Sequences per optimiser step."""

    micro_batch_size: Count | Auto
    """Sequences per forward and backward pass; divides `global_batch_size`. "auto": the planner chooses."""

    max_grad_norm: Annotated[float, Field(gt=0)] | None = 1.0
    """Gradients are scaled down to this norm. Null: no clipping."""

    deterministic: bool = False
    """Use deterministic kernels only, so that a repeated run gives the same losses to the bit."""

    compile: bool = False
    """Run the model's blocks through torch.compile, under every policy, but for attention and layers that token
    selection retains. The first step takes a minute or more. Plans count what operators allocate one by one."""

    non_finite: Literal["stop", "skip"] = "stop"
    """What a loss or gradient that is not finite does: stop the run, or skip the step: weights, optimiser state and the
    learning rates of other steps are as if it had not been."""

    max_skipped_steps: Count = 10
    """With `non_finite` "skip": so many steps in a row that are not finite stop the run nevertheless."""

    eval_every_steps: CountOrZero = 0
    """Steps between evaluations; 0: at the end only."""

    eval_before_training: bool = False
    """Evaluate before the first step too; neither `early_stopping` nor `checkpoint.keep_best` looks at it."""

    early_stopping: EarlyStoppingConfig | None = None
    """Null: training goes on to the last step."""

    eval_max_samples: Count | None = None
    """Evaluate on the first so many samples. Null: all."""


class CheckpointConfig(Section):
    """When a run is saved."""

    every_steps: CountOrZero = 0
    """Steps between checkpoints; 0: only at the end or when stopped."""

    asynchronous: bool = False
    """Copy what is saved to the host's memory and write it while training goes on; the checkpoint is complete some
    steps later. Takes as much more memory on the host as its ranks save."""

    keep_last: Count = 2
    """Number of newest checkpoints that are kept."""

    keep_best: CountOrZero = 0
    """Number of best checkpoints that are kept beside them, and `checkpoints/best` names the best one. With it, a step
    whose evaluation puts it among them is saved, whatever `every_steps` says."""

    best_metric: NonEmpty = "loss"
    """With `keep_best`: the figure that counts: "loss", or another one of the task's evaluation, of which higher is
    better."""
