"""Saving, resuming and exporting: what a run leaves on the disk, complete or not at all."""

from framework.checkpoint.export import export_run
from framework.checkpoint.finding import compare_configs, find_best, find_checkpoint, find_step, truncate_metrics
from framework.checkpoint.layout import Checkpoint
from framework.checkpoint.random_state import capture_random_state, restore_random_state
from framework.checkpoint.ranking import best_checkpoint, is_among_best, is_better
from framework.checkpoint.saving import remove_leftovers, save_checkpoint, update_pointers
from framework.checkpoint.weights import WEIGHTS_FILE, load_weights, save_weights

__all__ = [
    "WEIGHTS_FILE",
    "Checkpoint",
    "best_checkpoint",
    "capture_random_state",
    "compare_configs",
    "export_run",
    "find_best",
    "find_checkpoint",
    "find_step",
    "is_among_best",
    "is_better",
    "load_weights",
    "remove_leftovers",
    "restore_random_state",
    "save_checkpoint",
    "save_weights",
    "truncate_metrics",
    "update_pointers",
]
