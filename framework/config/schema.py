"""A run as one value: its sections, what follows from them, and its hash."""

from __future__ import annotations

import hashlib
import json
from typing import Any, Literal

from pydantic import model_validator

from framework.config.rules import CLASSIFICATION, broken_rules
from framework.config.sections import (
    CheckpointConfig,
    ClusterConfig,
    DataConfig,
    HardwareConfig,
    LoggingConfig,
    ModelConfig,
    OptimizerConfig,
    PlannerConfig,
    RetentionConfig,
    RunConfig,
    ScheduleConfig,
    Section,
    SelectionConfig,
    ShardingConfig,
    TrainingConfig,
)
from framework.linear_names import Retained

RESULT_NEUTRAL_SECTIONS = frozenset({"checkpoint", "logging", "hardware", "planner", "cluster"})
"""Sections that say how a run is watched, saved or described, and leave its losses as they are."""

RESULT_NEUTRAL_KEYS = {
    "run": ("output_dir",),
    "model": ("offline",),
    "data": ("cache_dir", "workers", "supervised_fraction"),
    "retention": ("placement",),
}
"""Such keys of other sections."""

PLANNED_KEYS = (
    "selection.ratio",
    "retention.policy",
    "retention.retain_linears",
    "retention.placement",
    "sharding.engine",
    "sharding.zero_stage",
    "training.micro_batch_size",
)
"""Keys that may be "auto", which leaves them to the planner."""


class Config(Section):
    """A run of selectrain."""

    run: RunConfig
    """Where a run writes, and its randomness."""

    model: ModelConfig
    """The model and how its weights are held."""

    data: DataConfig
    """What the model is trained and evaluated on."""

    selection: SelectionConfig = SelectionConfig()
    """Which tokens receive gradient; without this section training is exact."""

    retention: RetentionConfig = RetentionConfig()
    """What a block keeps for its backward pass."""

    sharding: ShardingConfig = ShardingConfig()
    """Who holds what."""

    optimizer: OptimizerConfig
    """The update rule and the precision it works in."""

    schedule: ScheduleConfig = ScheduleConfig()
    """The learning rate over the steps."""

    training: TrainingConfig
    """Steps, batches and evaluation."""

    checkpoint: CheckpointConfig = CheckpointConfig()
    """When a run is saved."""

    logging: LoggingConfig = LoggingConfig()
    """What is written about a run."""

    hardware: HardwareConfig = HardwareConfig()
    """The machines a run is meant for, as a description."""

    planner: PlannerConfig = PlannerConfig()
    """What is chosen for the keys that are "auto"."""

    cluster: ClusterConfig = ClusterConfig()
    """How a run is handed to SLURM."""

    @model_validator(mode="after")
    def _check_rules(self) -> Config:
        problems = broken_rules(self._value)
        if problems:
            raise ValueError("; ".join(f"{key}: {message}" for key, message in problems))
        return self

    def _value(self, *key_path: str) -> Any:
        """The value of a key by its parts; None inside a section that is null."""
        value: Any = self
        for key in key_path:
            value = None if value is None else getattr(value, key)
        return value

    @property
    def open_keys(self) -> tuple[str, ...]:
        """Those of `PLANNED_KEYS` that are "auto": a run needs values for them, which the planner finds."""
        return tuple(key for key in PLANNED_KEYS if self._value(*key.split(".")) == "auto")

    @property
    def micro_batch_size(self) -> int:
        """`training.micro_batch_size` of a config in which it is not open."""
        size = self.training.micro_batch_size
        assert size != "auto", "training.micro_batch_size is open"
        return size

    def gradient_accumulation(self, ranks: int) -> int:
        """Micro-batches per optimiser step on each of so many ranks."""
        return self.training.global_batch_size // (self.micro_batch_size * ranks)

    @property
    def described_ranks(self) -> int:
        """Number of processes that the run is meant for: one on each accelerator, but for the single engine."""
        return 1 if self.sharding.engine == "single" else self.hardware.nodes * self.hardware.gpus_per_node

    @property
    def least_nodes(self) -> int:
        """The fewest machines that a submitted run starts on."""
        return self.cluster.min_nodes or self.hardware.nodes

    @property
    def shards_weights(self) -> bool:
        """Whether no rank holds the whole model."""
        return self.sharding.engine == "fsdp" or self.zero_stage == 3

    @property
    def zero_stage(self) -> int:
        """What the ranks hold a part of each, as a ZeRO stage, whatever the engine."""
        if self.sharding.engine == "single":
            return 0
        if self.sharding.engine == "fsdp":
            return 3 if self.sharding.reshard_after_forward else 2
        stage = self.sharding.zero_stage
        assert stage != "auto" and self.sharding.engine != "auto", "sharding is open"
        return 3 if stage is None else stage

    @property
    def resolved_ratio(self) -> float | Literal["labelled"]:
        """`selection.ratio` with the strategy's default in place of null."""
        ratio = self.selection.ratio
        assert ratio != "auto", "selection.ratio is open"
        if ratio is not None:
            return ratio
        return "labelled" if self.selection.strategy == "supervised" else 1.0

    @property
    def resolved_normalization(self) -> Literal["supervised", "selected"]:
        """`selection.normalization` with the strategy's default in place of null."""
        if self.selection.normalization is not None:
            return self.selection.normalization
        # A classifier's loss is of its pooled tokens, all of which are selected.
        biased = self.selection.strategy == "suffix" and self.model.task not in CLASSIFICATION
        return "selected" if biased else "supervised"

    @property
    def retained_linears(self) -> Retained:
        """`retention.retain_linears` of a config in which it is not open."""
        chosen = self.retention.retain_linears
        assert chosen != "auto", "retention.retain_linears is open"
        return chosen if isinstance(chosen, bool) else tuple(chosen)

    @property
    def mask_probability(self) -> float:
        """`data.mask_probability` with BERT's 15 % in place of null."""
        return 0.15 if self.data.mask_probability is None else self.data.mask_probability

    @property
    def weights_dtype(self) -> str:
        """Name of the weights' torch dtype, which `optimizer.precision` implies."""
        return "bfloat16" if self.optimizer.precision == "pure_bf16" else "float32"

    def with_label_names(self, names: list[str]) -> Config:
        """The same run with `data.label_names` written out."""
        return self.model_copy(update={"data": self.data.model_copy(update={"label_names": names})})

    def with_max_steps(self, steps: int) -> Config:
        """The same run with `training.epochs` replaced by the steps that they are."""
        training = self.training.model_copy(update={"max_steps": steps, "epochs": None})
        return self.model_copy(update={"training": training})

    def to_json(self) -> dict[str, Any]:
        """All settings, defaults included, as JSON values; loading them gives an equal config."""
        return self.model_dump(mode="json")

    def sha256(self) -> str:
        """Hash of the settings that determine the losses of a run, in hexadecimal.

        Left out are `RESULT_NEUTRAL_KEYS` and the sections in `RESULT_NEUTRAL_SECTIONS`.
        """
        settings = {
            name: {key: value for key, value in section.items() if key not in RESULT_NEUTRAL_KEYS.get(name, ())}
            for name, section in self.to_json().items()
            if name not in RESULT_NEUTRAL_SECTIONS
        }
        canonical = json.dumps(settings, sort_keys=True, separators=(",", ":"), allow_nan=False)
        return hashlib.sha256(canonical.encode()).hexdigest()
