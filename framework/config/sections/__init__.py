"""The sections of a config, each a typed object with a docstring under every key."""

from framework.config.sections.base import Section
from framework.config.sections.cluster import ClusterConfig
from framework.config.sections.data import DataConfig, Format, SourceConfig, Sources, data_sources
from framework.config.sections.model import AdapterConfig, ModelConfig
from framework.config.sections.run import HardwareConfig, LoggingConfig, PlannerConfig, ProfileConfig, RunConfig
from framework.config.sections.selection import RetentionConfig, SelectionConfig
from framework.config.sections.sharding import ShardingConfig
from framework.config.sections.training import (
    CheckpointConfig,
    EarlyStoppingConfig,
    LossScaleConfig,
    OptimizerConfig,
    ParameterGroupConfig,
    ScheduleConfig,
    TrainingConfig,
)

__all__ = [
    "AdapterConfig",
    "CheckpointConfig",
    "ClusterConfig",
    "DataConfig",
    "EarlyStoppingConfig",
    "Format",
    "HardwareConfig",
    "LoggingConfig",
    "LossScaleConfig",
    "ModelConfig",
    "OptimizerConfig",
    "ParameterGroupConfig",
    "PlannerConfig",
    "ProfileConfig",
    "RetentionConfig",
    "RunConfig",
    "ScheduleConfig",
    "Section",
    "SelectionConfig",
    "ShardingConfig",
    "SourceConfig",
    "Sources",
    "TrainingConfig",
    "data_sources",
]
