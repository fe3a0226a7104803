"""Checks over several keys, by the section that they are about; importing this registers all of them."""

from framework.config.rules import cluster, data, logging, model, selection, sharding, training
from framework.config.rules.registry import CLASSIFICATION, TASK_FORMATS, TASK_METRICS, broken_rules

__all__ = [
    "CLASSIFICATION",
    "TASK_FORMATS",
    "TASK_METRICS",
    "broken_rules",
    "cluster",
    "data",
    "logging",
    "model",
    "selection",
    "sharding",
    "training",
]
