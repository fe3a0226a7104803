"""What a checkpoint says beyond weights, whether a run may continue from it, and how it does."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from framework.checkpoint import (
    Checkpoint,
    DamagedCheckpointError,
    compare_configs,
    find_checkpoint,
    resume_random_state,
)
from framework.config import Config
from framework.data import Dataset, Loader
from framework.errors import UserError
from framework.sharding.protocol import Engine
from framework.sharding.ranks import Ranks
from framework.training.progress import Reporter

# A checkpoint's tensors, or its position in the data, have no meaning under another value of these.
BINDING = (
    "model.path",
    "model.revision",
    "model.from_config",
    "model.task",
    "model.dtype",
    "model.adapter",
    "model.added_tokens",
    "model.pad_vocabulary_to",
    "model.quantization",
    "data.sequence_length",
    "data.packing",
    "data.label_names",
    "optimizer.name",
    "optimizer.precision",
)
# Where a run writes and how it is watched; changing these between two starts is ordinary.
UNREMARKABLE = (
    "run.output_dir",
    "model.offline",
    "data.cache_dir",
    "data.workers",
    "checkpoint",
    "logging",
    "hardware",
    "cluster",
    "training.max_steps",
)
# How the samples came about; what counts is the samples themselves.
DATA_SOURCES = ("data.train", "data.format", "data.overlong", "data.train_on", "data.eval_fraction", "model.tokenizer")


def manifest_of(config: Config, plan: dict[str, Any], data: Dataset, **progress: Any) -> dict[str, Any]:
    """The manifest of a checkpoint: enough to judge, without loading a tensor, what it is and who may continue it.

    Args:
        config: of the run.
        plan: what `plan.json` holds.
        data: the training set.
        progress: numbers of the run so far.
    """
    manifest = progress | {
        "selection_seed": config.run.seed,
        "data_fingerprint": data.fingerprint,
        "config": config.to_json(),
        "config_sha256": config.sha256(),
        "plan": plan["chosen"],
    }
    if "made_for" in plan:
        # By the planner: a run that goes on takes it again.
        manifest["planned"] = {key: value for key, value in plan.items() if key not in ("chosen", "plans")}
    return manifest


def resumable_checkpoint(
    run_dir: Path, resume: str, config: Config, train_data: Dataset, ranks: Ranks, reporter: Reporter
) -> Checkpoint | None:
    """The checkpoint that all ranks continue from: the one that `find_checkpoint` finds for the first of them.

    Args:
        run_dir: the run directory.
        resume: see `framework.train`.
        config: of the run.
        train_data: its training set.
        ranks: of the run.
        reporter: told of differences that change the run from here on.

    Raises:
        UserError: as for `find_checkpoint` and `check_resumable`, on all ranks; or a rank does not see the checkpoint.
    """
    found, problem = None, None
    if ranks.is_first:
        try:
            found = find_checkpoint(run_dir, resume)
        except UserError as error:
            problem = str(error)
    path, problem = ranks.broadcast((found and found.path.resolve(), problem))
    if problem is not None:
        raise UserError(problem)
    if path is None:
        return None
    if found is None:
        try:
            found = Checkpoint.read(path)
        except DamagedCheckpointError as error:
            raise UserError(
                f"{path} is no complete checkpoint for rank {ranks.rank}: {error}; run.output_dir must be on a file "
                "system that all machines share"
            ) from error
    for difference in check_resumable(found.manifest, config, train_data):
        reporter.line(f"warning: resuming with another setting: {difference}")
    return found


def resume_from(
    checkpoint: Checkpoint, config: Config, engine: Engine, ranks: Ranks, loader: Loader, reporter: Reporter
) -> None:
    """Put engine, loader and random states where the checkpoint has them."""
    state = checkpoint.load_state()
    engine.load(checkpoint.weights(), checkpoint.optimizer(), state["engine"])
    loader.load_state_dict(state["loader"])
    if not resume_random_state(state["random"], ranks, seed=config.run.seed, step=checkpoint.step):
        reporter.line(
            f"the checkpoint is of {checkpoint.world_size} ranks and this run has {ranks.world_size}: "
            "dropout draws other masks from here on"
        )
    reporter.line(f"resuming from {checkpoint.path}, step {checkpoint.step}")


def check_resumable(manifest: dict[str, Any], config: Config, data: Dataset) -> list[str]:
    """Compare a checkpoint with the run that wants to continue it.

    Args:
        manifest: of the checkpoint.
        config: of the run.
        data: its training set.

    Returns:
        Differences that change the run from here on but not the meaning of what was saved, a line each.

    Raises:
        UserError: the checkpoint is of another model, optimiser or data set; all differences are named.
    """
    saved = with_defaults(manifest["config"])
    changes = {line.partition(":")[0]: line for line in compare_configs(saved, config.to_json())}
    binding = [line for key, line in changes.items() if within(key, BINDING)]
    if manifest["data_fingerprint"] != data.fingerprint:
        sources = [line for key, line in changes.items() if within(key, DATA_SOURCES)]
        binding.extend(sources or ["data.train: the files hold other samples than when the checkpoint was saved"])
    if binding:
        raise UserError(
            "the checkpoint is of another run (its value -> this run's):\n"
            + "\n".join(f"  {line}" for line in binding)
            + "\ngive these their former values, choose another run.output_dir, or start over with --resume none"
        )
    # The same samples under another name are the same data.
    return [line for key, line in changes.items() if not within(key, (*UNREMARKABLE, *DATA_SOURCES))]


def with_defaults(saved: dict[str, Any]) -> dict[str, Any]:
    """A saved config with the defaults of keys that did not exist when it was saved: they are no difference."""
    try:
        return Config.model_validate_json(json.dumps(saved)).to_json()
    except ValidationError:
        # It has a key or a value that this version refuses, which is a difference to name.
        return saved


def within(key: str, names: tuple[str, ...]) -> bool:
    """Whether a key is one of these, or in a section that is."""
    return any(key == name or key.startswith(f"{name}.") for name in names)
