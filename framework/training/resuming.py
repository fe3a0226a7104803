"""What a checkpoint says beyond weights, and whether a run may continue from it."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from typing import Any

import peft
import safetensors
import torch
import transformers

from framework import __version__
from framework.config import Config
from framework.data import TokenizedDataset
from framework.errors import UserError

# A checkpoint's tensors, or its position in the data, have no meaning under another value of these.
BINDING = (
    "model.path",
    "model.from_config",
    "model.task",
    "model.dtype",
    "model.adapter",
    "model.quantization",
    "data.sequence_length",
    "data.packing",
    "optimizer.name",
    "optimizer.precision",
)
# Where a run writes and how it is watched; changing these between two starts is ordinary.
UNREMARKABLE = ("run.output_dir", "checkpoint", "logging", "hardware", "training.max_steps")
ABSENT = "(absent)"


def manifest_of(config: Config, plan: dict[str, Any], data: TokenizedDataset, **progress: Any) -> dict[str, Any]:
    """The manifest of a checkpoint: enough to judge, without loading a tensor, what it is and who may continue it.

    Args:
        config: of the run.
        plan: what `plan.json` holds.
        data: the training set.
        progress: numbers of the run so far, and the engine's world size.
    """
    return progress | {
        "selection_seed": config.run.seed,
        "data_fingerprint": fingerprint(data),
        "config": config.to_json(),
        "config_sha256": config.sha256(),
        "plan": plan["chosen"],
        "versions": {
            "selectrain": __version__,
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "peft": peft.__version__,
            "safetensors": safetensors.__version__,
        },
    }


def fingerprint(data: TokenizedDataset) -> str:
    """A hash of the tokens, labels and bounds of a data set, whatever its files are called."""
    digest = hashlib.sha256()
    for array in (data.offsets, data.input_ids, data.supervised):
        digest.update(array.tobytes())
    return digest.hexdigest()


def check_resumable(manifest: dict[str, Any], config: Config, data: TokenizedDataset) -> list[str]:
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
    saved, current = manifest["config"], config.to_json()
    differences = [key for key in _differing(saved, current) if not _within(key, UNREMARKABLE)]
    lines = {key: f"{key}: {_at(saved, key)!r} in the checkpoint, {_at(current, key)!r} now" for key in differences}
    binding = [line for key, line in lines.items() if _within(key, BINDING)]
    if manifest["data_fingerprint"] != fingerprint(data):
        changed = [line for key, line in lines.items() if key.startswith("data.") and line not in binding]
        binding.extend(changed or ["data.train: the files hold other samples than when the checkpoint was saved"])
    if binding:
        raise UserError(
            "the checkpoint is of another run:\n"
            + "\n".join(f"  {line}" for line in binding)
            + "\ngive these their former values, choose another run.output_dir, or start over with --resume none"
        )
    # The same samples under another name are the same data.
    return [line for key, line in lines.items() if not _within(key, ("data.train", "data.format", "data.overlong"))]


def _differing(saved: Any, current: Any, prefix: str = "") -> Iterator[str]:
    """Dotted keys, two levels deep as the sections are, whose values are not equal."""
    for section in sorted(saved.keys() | current.keys()):
        key = f"{prefix}{section}"
        before, now = saved.get(section, ABSENT), current.get(section, ABSENT)
        if not prefix and isinstance(before, dict) and isinstance(now, dict):
            yield from _differing(before, now, f"{key}.")
        elif before != now:
            yield key


def _within(key: str, names: tuple[str, ...]) -> bool:
    return any(key == name or key.startswith(f"{name}.") for name in names)


def _at(values: dict[str, Any], key: str) -> Any:
    section, _, name = key.partition(".")
    return values.get(section, {}).get(name, ABSENT) if name else values.get(section, ABSENT)
