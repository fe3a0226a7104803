"""Saving, resuming and exporting: what a run leaves on the disk, complete or not at all."""

from framework.checkpoint.export import export_run
from framework.checkpoint.finding import compare_configs, find_best, find_checkpoint, find_step, truncate_metrics
from framework.checkpoint.layout import Checkpoint, DamagedCheckpointError
from framework.checkpoint.publishing import remove_leftovers, update_pointers
from framework.checkpoint.random_state import (
    capture_random_state,
    restore_random_state,
    resume_random_state,
    seed_generators,
)
from framework.checkpoint.ranking import best_checkpoint, is_among_best, is_better
from framework.checkpoint.saver import CheckpointSaver
from framework.checkpoint.saving import save_checkpoint
from framework.checkpoint.stored import StoredFragments
from framework.checkpoint.weights import WEIGHTS_FILE, load_weights

__all__ = [
    "WEIGHTS_FILE",
    "Checkpoint",
    "CheckpointSaver",
    "DamagedCheckpointError",
    "StoredFragments",
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
    "resume_random_state",
    "save_checkpoint",
    "seed_generators",
    "truncate_metrics",
    "update_pointers",
]
