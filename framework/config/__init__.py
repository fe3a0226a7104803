"""The typed description of a run: schema, loading, overrides, messages. Does not import torch."""

from framework.config.load import ConfigError, load_config
from framework.config.schema import Config
from framework.config.sections import (
    AdapterConfig,
    CheckpointConfig,
    DataConfig,
    EarlyStoppingConfig,
    HardwareConfig,
    LoggingConfig,
    LossScaleConfig,
    ModelConfig,
    OptimizerConfig,
    ParameterGroupConfig,
    RetentionConfig,
    RunConfig,
    ScheduleConfig,
    SelectionConfig,
    ShardingConfig,
    SourceConfig,
    TrainingConfig,
    data_sources,
)

__all__ = [
    "AdapterConfig",
    "CheckpointConfig",
    "Config",
    "ConfigError",
    "DataConfig",
    "EarlyStoppingConfig",
    "HardwareConfig",
    "LoggingConfig",
    "LossScaleConfig",
    "ModelConfig",
    "OptimizerConfig",
    "ParameterGroupConfig",
    "RetentionConfig",
    "RunConfig",
    "ScheduleConfig",
    "SelectionConfig",
    "ShardingConfig",
    "SourceConfig",
    "TrainingConfig",
    "data_sources",
    "load_config",
]
