"""The law of a run's step, from recorded steps of small models."""

from __future__ import annotations

import hashlib
import json
from dataclasses import replace
from importlib.metadata import version
from typing import Any, NamedTuple

import torch

from framework.config import AdapterConfig, Config
from framework.data import Batch
from framework.errors import UserError
from framework.planner.fake_ranks import first_of
from framework.planner.fitting import OF_BATCHES, Fitter, UnknownSizeError, stretch_of
from framework.planner.known_trials import known_trials
from framework.planner.law import BLOCKS, CHUNK, MIDDLES, PARTS, PASSES, STEP, Part, StepLaw, instances
from framework.planner.polynomials import Polynomial
from framework.planner.recorder import Change, RecordedPart, Sent
from framework.planner.recording import Recording, record_step
from framework.planner.small_models import PROBES, Family, Widths, gathers_nothing, probe_batch, probe_config
from framework.planner.symbols import batch_symbols
from framework.planner.uncomputed import Uncomputed
from framework.training.objective import draw_selection

RECORDING = 5
"""Counts changes of what a recording says of a step: laws of other numbers are not looked at."""

LIBRARIES = ("torch", "transformers", "peft")
"""Whose versions a law depends on."""


COMPUTED = 2048
"""Elements of the largest float tensor whose values a recording has, enough for weights of tokens and losses."""


def law_settings(config: Config, family: Family) -> dict[str, Any]:
    """What a law depends on, as JSON values: all that probes do not vary.

    Args:
        config: of the run.
        family: of its model.
    """
    model, adapter = config.model, config.model.adapter
    hybrid = {"hybrid": True} if config.sharding.replicas > 1 else {}
    alone = {"alone": True} if gathers_nothing(config) else {}
    corrected = {"corrected": True} if config.selection.correction else {}
    placed = {"placement": "host"} if config.retention.placement == "host" else {}
    return (
        hybrid
        | alone
        | corrected
        | placed
        | {
            "recording": RECORDING,
            "family": family.kept(),
            "task": model.task,
            "attention": model.attention,
            "adapter": None if adapter is None else _settings_of(adapter),
            "quantization": model.quantization,
            "sharding": config.sharding.model_dump(mode="json", exclude={"timeout_seconds", "replicas"}),
            "precision": config.optimizer.precision,
            "optimizer": config.optimizer.name,
            "clipping": config.training.max_grad_norm is not None,
            "packing": config.data.packing,
            "retention": config.retention.model_dump(mode="json", exclude={"placement"}),
            "strategy": config.selection.strategy,
            "tokentune": config.selection.tokentune,
            "normalization": config.resolved_normalization,
            "versions": {name: version(name).partition("+")[0] for name in LIBRARIES},
        }
    )


def _settings_of(adapter: AdapterConfig) -> dict[str, Any]:
    settings = adapter.model_dump(mode="json", exclude={"rank", "alpha"})
    return settings | {"dropout": adapter.dropout > 0}


def law_key(settings: dict[str, Any]) -> str:
    """A short name for settings, from their hash."""
    canonical = json.dumps(settings, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(canonical.encode()).hexdigest()[:16]


def extract_law(config: Config, family: Family) -> StepLaw:
    """The law of a run's step. The process must not be a rank of anything.

    Raises:
        UserError: the planner has no batches for the task.
        UnknownSizeError: a tensor's size is no polynomial in the symbols.
    """
    if config.model.task != "causal_lm":
        raise UserError(f"model.task: the planner knows causal_lm only, not {config.model.task}")
    with known_trials(config, family):
        recorded = [_recorded(config, family, widths) for widths in PROBES]
    recordings = [recording for _, recording in recorded]
    return fitted_law([sizes for sizes, _ in recorded], recordings)


def _recorded(config: Config, family: Family, widths: Widths) -> tuple[dict[str, float], Recording]:
    """A small model's step, and the sizes of its symbols."""
    small, batch = probe_config(config, family.small(widths), widths), probe_batch(widths, packed=config.data.packing)
    ranks, alone = small.described_ranks, small.sharding.engine == "single"
    with torch.random.fork_rng(devices=()), Uncomputed(COMPUTED), first_of(ranks, connected=not alone) as connected:
        torch.manual_seed(0)
        recording = record_step(small, batch, connected)
    sizes = recording.symbols | batch_symbols(batch) | selection_sizes(small, batch)
    sizes |= job_symbols(small, ranks)
    return sizes, recording


def job_symbols(config: Config, ranks: int) -> dict[str, float]:
    """Sizes that are neither the model's nor a batch's."""
    sizes: dict[str, float] = {}
    if config.model.adapter is not None and config.model.adapter.rank is not None:
        sizes["rank"] = config.model.adapter.rank
    if ranks > config.sharding.replicas:
        sizes["share"] = config.sharding.replicas / ranks
    return sizes


def selection_sizes(config: Config, batch: Batch) -> dict[str, float]:
    """The symbols that are a selection's, `labels` among them where it leaves some out; none for exact training."""
    selection = draw_selection(config, batch)
    if selection is None:
        return {}
    rows, slots = selection.positions.shape
    labels = int((selection.mask(batch.documents.shape[1]) & batch.supervised).sum())
    return {"rows": selection.selected_tokens, "slots": rows * slots, "labels": labels}


def fitted_law(samples: list[dict[str, float]], recordings: list[Recording]) -> StepLaw:
    """The polynomials of recordings whose allocations come in the same order.

    Args:
        samples: sizes of the symbols in each recording.
        recordings: of small models.
    """
    of_model = [{name: size for name, size in sample.items() if name not in OF_BATCHES} for sample in samples]
    chunks = [sizes | {CHUNK: sample["labels"]} for sizes, sample in zip(of_model, samples, strict=True)]
    fit = _Fit(Fitter(samples), Fitter(chunks))
    names = [part.name for part in recordings[0].parts]
    if names != [*PARTS, *PARTS, STEP]:
        raise UnknownSizeError(f"the parts of a step come in another order: {', '.join(names)}")
    blocks = [block for _, block in instances(BLOCKS)]
    fitted = [
        _fitted_part(fit, parts, block)
        for parts, block in zip(zip(*(r.parts for r in recordings), strict=True), [*blocks, *blocks, 0], strict=True)
    ]
    count = len(PARTS)
    passes = {
        name: dict(zip(PARTS, fitted[number * count : (number + 1) * count], strict=True))
        for number, name in enumerate(PASSES)
    }
    return StepLaw(passes, fitted[-1])


class _Fit(NamedTuple):
    """What finds polynomials in all sizes, and in those of a model and a chunk."""

    whole: Fitter
    chunk: Fitter


def _fitted_part(fit: _Fit, parts: tuple[RecordedPart, ...], block: int) -> Part:
    name, marks = parts[0].name, parts[0].marks
    if any(part.marks != marks for part in parts):
        raise UnknownSizeError(f"{name}: models of different sizes use their modules in different orders")
    stretches = []
    for recorded in zip(*(part.stretches for part in parts), strict=True):
        if len({tuple((change.bytes > 0, *change[1:]) for change in changes) for changes in recorded}) > 1:
            raise UnknownSizeError(f"{name}: models of different sizes allocate in different orders")
        try:
            stretches.append(stretch_of([_fitted(fit, changes) for changes in zip(*recorded, strict=True)]))
        except UnknownSizeError as error:
            raise UnknownSizeError(f"{name}: {error}") from error
    counted = [replace(mark, offset=None if mark.offset is None else mark.offset - block) for mark in marks]
    return Part(tuple(stretches), tuple(counted), _fitted_sent(fit, name, [part.sent for part in parts]))


def _fitted_sent(fit: _Fit, name: str, sent: list[list[Sent]]) -> tuple[Polynomial, ...]:
    """The bytes of each tensor that goes to the host."""
    if len({tuple(each.factor for each in tensors) for tensors in sent}) > 1:
        raise UnknownSizeError(f"{name}: models of different sizes send different tensors to the host")
    alike = [[Change(each.bytes, False, each.factor) for each in tensors] for tensors in sent]
    return tuple(_fitted(fit, changes) for changes in zip(*alike, strict=True))


def _fitted(fit: _Fit, changes: tuple[Change, ...]) -> Polynomial:
    _, repeated, factor, of_chunk = changes[0]
    found = (fit.chunk if of_chunk else fit.whole)([change.bytes for change in changes])
    if factor is not None:
        found = found.times(factor)
    return found.times(MIDDLES) if repeated else found
