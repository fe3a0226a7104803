"""The sections of a config: every key, its type, its default and what it means."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from framework.config.adapters import ADAPTER_METHODS

NonEmpty = Annotated[str, Field(min_length=1)]
Paths = NonEmpty | Annotated[list[NonEmpty], Field(min_length=1)]
Count = Annotated[int, Field(ge=1)]
CountOrZero = Annotated[int, Field(ge=0)]
Format = Literal["messages", "sharegpt", "alpaca", "completion", "text", "classification", "image_folder"]


class Section(BaseModel):
    """What all sections share: frozen, strict types, no unknown keys, no NaN or infinity."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, strict=True, allow_inf_nan=False, use_attribute_docstrings=True
    )


class RunConfig(Section):
    """Where a run writes, and its randomness."""

    output_dir: NonEmpty
    """The run directory, relative to the current directory."""

    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0
    """Seeds random initialisation, the order of the samples, the selection and dropout."""


class AdapterConfig(Section):
    """An adapter of PEFT: the weights of the model are frozen, and what the method adds to them is trained."""

    kind: Annotated[str, Field(json_schema_extra={"enum": [*ADAPTER_METHODS]})]
    """The method, by PEFT's name in lower case; "dora" is LoRA with separate magnitudes."""

    rank: Count | None = None
    """Inner dimension of the method's matrices; for methods that have one, which need it."""

    alpha: Annotated[float, Field(gt=0)] | None = None
    """Scale of the method's update, in most as alpha / rank; for methods that have one, which need it."""

    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Probability of the method's own dropout (of an input of LoRA's matrices); 0 for methods that have none."""

    target_modules: Paths | None = None
    """Modules that get an adapter: "all-linear" (all but the head), a regular expression over full module names, or a
    list of module names. Null: what suits the method, "all-linear" for most, the norms for `ln_tuning`, the layers of
    its paper for `ia3` in families that PEFT knows, the token embedding for `trainable_tokens`."""

    modules_to_save: list[NonEmpty] = []
    """Names of modules that are trained in full and saved with the adapter, such as a classification head."""

    options: dict[str, Any] = {}
    """Further options of the method by the names of its PEFT config, such as {"use_rslora": true}."""


class ModelConfig(Section):
    """The model and how its weights are held."""

    path: NonEmpty | None = None
    """A local directory or a hub name, with weights. Without it, `from_config` alone gives random weights."""

    from_config: dict[str, Any] | None = None
    """A Hugging Face config as an object, with `model_type`. Alone: random initialisation. Together with `path`: the
    architecture, so that checking a run needs no weights, which come from `path` when training."""

    task: Literal["causal_lm", "masked_lm", "sequence_classification", "image_classification"] = "causal_lm"
    """The head on the model. The classifiers give one class to a text (or a pair of texts) or to an image."""

    dtype: Literal["float32", "bfloat16", "float16"] | None = None
    """Type of the weights. Null: what `optimizer.precision` implies."""

    tokenizer: NonEmpty | None = None
    """A local directory or a hub name. Null: `path`. Images need none: their processor comes from `path`, or resizes to
    the model's `image_size` and normalises to -1 … 1 where there is no `path`."""

    revision: NonEmpty | None = None
    """Branch, tag or commit of `path` on the hub, for config, weights, tokenizer and code. Null: the main branch."""

    offline: bool = False
    """Never ask the network: model and tokenizer are local directories or in the hub's cache."""

    trust_remote_code: bool = False
    """Run the Python files that come with the model or the tokenizer, where its config names them (`auto_map`)."""

    added_tokens: list[NonEmpty] = []
    """Tokens that the tokenizer gets besides its own, each one token wherever it stands in a text. Their embeddings
    start as the mean of the others. With an adapter only their rows are trained, or the whole embedding where
    `adapter.modules_to_save` names it."""

    pad_vocabulary_to: Count | None = None
    """With `added_tokens`: round the number of rows of the embedding up to a multiple of this."""

    attention: Literal["sdpa", "eager"] = "sdpa"
    """Attention kernel: torch's scaled dot product attention, or plain matrix products."""

    adapter: AdapterConfig | None = None
    """Null: all weights are trained."""

    quantization: None = None
    """Weights are not quantised."""


class SourceConfig(Section):
    """One source of data, where its path alone does not say enough."""

    path: NonEmpty
    """A file, a directory, or a name on the Hugging Face hub."""

    weight: Annotated[float, Field(gt=0)] | None = None
    """Share of the samples drawn, relative to the other sources' weights; sources start again when they are through.
    Null, for all of them: every sample once an epoch."""

    format: Literal["auto", Format] | None = None
    """Format of its records. Null: `data.format`."""

    subset: NonEmpty | None = None
    """Configuration of a data set that has several, such as "main"; for hub names and directories in the hub's
    layout."""

    split: NonEmpty | None = None
    """Which split, such as "train" or "train[:5%]", as `datasets.load_dataset` takes it. Null: "train" in `data.train`;
    in `data.eval` the only one there is."""

    revision: NonEmpty | None = None
    """Branch, tag or commit of a hub name. Null: its main branch."""


Sources = NonEmpty | Annotated[list[NonEmpty | SourceConfig], Field(min_length=1)]


def data_sources(value: Sources | list[dict[str, Any]] | None) -> tuple[SourceConfig, ...]:
    """The sources that `data.train` or `data.eval` names, whichever way; none for null.

    Args:
        value: of the key, valid by itself: of a loaded config, or the JSON value that a rule reads.
    """
    if value is None:
        return ()
    named = [value] if isinstance(value, str) else value
    return tuple(
        SourceConfig(path=each) if isinstance(each, str) else SourceConfig.model_validate(each) for each in named
    )


class DataConfig(Section):
    """What the model is trained and evaluated on."""

    train: Sources
    """A file, a directory or a hub name, or a list of these, each also as an object with `path` and options. Paths are
    relative to the current directory. Images: a directory with one sub-directory a class."""

    eval: Sources | None = None
    """The same for evaluation. Null: what `eval_fraction` holds out, if anything."""

    eval_fraction: Annotated[float, Field(gt=0, lt=1)] | None = None
    """Share of `train` that is held out for evaluation instead of trained on. A hash of a sample's text decides, so
    that equal samples are on the same side and further data moves none to the other. Null: nothing is held out."""

    format: Literal["auto", Format] = "auto"
    """Format of the records: `messages` (chat), `sharegpt`, `alpaca`, `completion` (prompt and completion), `text`;
    "auto" recognises it by the keys of each file's first record. Tasks other than causal_lm have one format each:
    `text` for masked_lm, `classification` (text, perhaps text_pair, and label), `image_folder` (CLASS/image.png)."""

    train_on: Literal["assistant", "last_assistant"] = "assistant"
    """Which turns of a conversation carry labels: all of the assistant's, or its last one."""

    sequence_length: Annotated[int, Field(ge=2)] | None = None
    """Longest sequence, in tokens. Needed for all but images, whose number of tokens the model sets."""

    packing: bool = False
    """Put several documents into one sequence, with attention and positions kept apart."""

    overlong: Literal["drop", "truncate"] = "drop"
    """What becomes of a sample that is longer than `sequence_length`: left out and counted, or cut at its end."""

    cache_dir: NonEmpty | None = "auto"
    """Directory of the token cache, from which a second start takes its tokens; "auto": `selectrain/tokens` in
    `$XDG_CACHE_HOME` or `~/.cache`. What is in it may be deleted at any time. Null: no cache, tokens are in memory."""

    workers: CountOrZero = 2
    """Threads that make batches ahead of their use; results do not depend on it. 0: each is made when it is needed."""

    label_names: Annotated[list[NonEmpty], Field(min_length=2)] | None = None
    """Names of the classes, in the order of their numbers. Null: those of the model's config if it names any, else the
    names found in `train`, sorted; a run's own config.json has them written out."""

    mask_probability: Annotated[float, Field(gt=0, lt=1)] | None = None
    """Share of a document's tokens that a masked LM has to find. Null: 0.15."""

    augmentation: Literal["none", "crop_flip"] = "none"
    """What training images go through first: nothing, or a random crop to 8-100 % of the area, with aspect ratio 3/4
    to 4/3, and a mirroring of every second one."""


class SelectionConfig(Section):
    """Which tokens receive gradient. Without this section training is exact."""

    strategy: Literal["none", "supervised", "uniform", "bernoulli"] = "none"
    """`none`: all tokens, exact. `supervised`: every labelled token, and a share of the context up to `ratio`.
    `uniform`: a fixed count per sequence, without replacement. `bernoulli`: each token independently."""

    ratio: Annotated[float, Field(gt=0, le=1)] | Literal["labelled"] | None = None
    """Selected tokens / all tokens that are not padding; "labelled" selects the labelled tokens only. Null: 1 for
    `none`, "labelled" for `supervised`; `uniform` and `bernoulli` need a number."""

    tokentune: bool = False
    """With `uniform`: always select the first and the last token, as the reference code of TokenTune does."""

    normalization: Literal["supervised", "selected"] = "supervised"
    """`supervised`: the weighted sum of the selected losses over the count of all supervised tokens. `selected`:
    TokenTune's mean over the selected supervised tokens."""


class RetentionConfig(Section):
    """What a block keeps for its backward pass."""

    policy: Literal["all", "checkpoint", "selective"] = "all"
    """`all`: ordinary autograd. `checkpoint`: the block's input, the rest is recomputed. `selective`: the inputs of
    the selected rows and the keys and values of all, the selected rows are replayed."""

    retain_linears: bool = False
    """With `selective`: also keep the linear layers' outputs at selected rows, so that no product is recomputed."""

    kv_format: Literal["model", "int8"] = "model"
    """With `selective`: format of the retained keys and values; "model" is the type that the model computes in."""


class ShardingConfig(Section):
    """Who holds what."""

    engine: Literal["single"] = "single"
    """`single`: one process holds everything."""

    zero_stage: Annotated[int, Field(ge=0, le=0)] = 0
    """Nothing is sharded by the single engine."""

    offload_optimizer: bool = False
    """The single engine keeps the optimiser's state on its device: false only."""


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

    name: Literal["adamw"] = "adamw"
    """AdamW; biases, norms and other one-dimensional parameters are not decayed."""

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

    micro_batch_size: Count
    """Sequences per forward and backward pass; divides `global_batch_size`."""

    max_grad_norm: Annotated[float, Field(gt=0)] | None = 1.0
    """Gradients are scaled down to this norm. Null: no clipping."""

    deterministic: bool = False
    """Use deterministic kernels only, so that a repeated run gives the same losses to the bit."""

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

    keep_last: Count = 2
    """Number of newest checkpoints that are kept."""

    keep_best: CountOrZero = 0
    """Number of best checkpoints that are kept beside them, and `checkpoints/best` names the best one. With it, a step
    whose evaluation puts it among them is saved, whatever `every_steps` says."""

    best_metric: NonEmpty = "loss"
    """With `keep_best`: the figure that counts: "loss", or another one of the task's evaluation, of which higher is
    better."""


class ProfileConfig(Section):
    """A profile of some steps, which are slower for it."""

    start: Count = 10
    """First step that is profiled; the one before warms the profiler up."""

    steps: Count = 3
    """Number of profiled steps."""

    shapes: bool = False
    """Also record the shapes of operators' inputs."""

    memory: bool = False
    """Also record what operators allocate."""


class LoggingConfig(Section):
    """What is written about a run."""

    every_steps: Count = 1
    """Steps between lines of metrics."""

    track_cpu_memory: bool = False
    """Without an accelerator: measure live tensor bytes, which slows each step down."""

    trackers: list[Literal["tensorboard", "wandb"]] = []
    """Where metrics go besides `metrics.jsonl`: TensorBoard event files in the run directory, Weights & Biases."""

    project: NonEmpty | None = None
    """With the tracker `wandb`: the project. Null: what W&B's environment variables say."""

    run_name: NonEmpty | None = None
    """With the tracker `wandb`: the run's name. Null: the name of the run directory."""

    profile: ProfileConfig | None = None
    """Trace of the operators of some steps, written to `profile/` in the run directory. Null: none."""

    memory_snapshot: bool | Count = False
    """On CUDA: remember where every tensor was allocated, which costs a little time, and write it to `memory/` in the
    run directory when memory runs out (true), or after this step, too."""


class HardwareConfig(Section):
    """The machines a run is meant for, as a description."""

    nodes: Count = 1
    """Machines."""

    gpus_per_node: Count = 1
    """Accelerators per machine."""

    gpu_memory: Annotated[str, Field(pattern=r"^[0-9]+(\.[0-9]+)?(GiB|MiB|GB|MB)$", examples=["80GiB"])] | None = None
    """Memory of one accelerator, such as "80GiB". Null: not described."""
