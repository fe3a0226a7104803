"""From a run's checkpoint to a directory that stock transformers or PEFT loads."""

from __future__ import annotations

import copy
import logging
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

from peft import PeftModel
from transformers import GenerationConfig, PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from framework.checkpoint.disk import free_bytes, is_disk_full, readable_bytes, sync
from framework.checkpoint.finding import find_best, find_step
from framework.checkpoint.stored import StoredFragments
from framework.checkpoint.tensor_files import write_assembled
from framework.checkpoint.weights import WEIGHTS_FILE, load_weights, map_weights
from framework.config import Config, load_config
from framework.errors import RunError, UserError
from framework.hub import HubOptions, local_directory, source_name
from framework.models import (
    configured_empty_model,
    configured_image_processor,
    configured_model,
    configured_tokenizer,
)
from framework.models.adapters import changes_base_weights, starts_from_base_weights
from framework.models.configured import base_config, hub_options

logger = logging.getLogger(__name__)

# In the directory that is being written: what several ranks saved, as one file to map, until the output is complete.
_ASSEMBLED = ".assembled"


def export_run(
    run_dir: Path, *, step: int | Literal["best"] | None = None, output: Path, merge_adapter: bool = False
) -> Path:
    """Write a checkpoint of a run as a Hugging Face directory, with tokenizer, chat template and generation config.

    Models of images come with their image processor instead. A classifier's config.json names its classes; beside an
    adapter it is written for that alone, to load the base model with.

    Full fine-tuning gives the model as safetensors. A run with an adapter gives the adapter, for
    `PeftModel.from_pretrained`, or with `merge_adapter` the whole model. Only merging, and the few methods that start
    from the base model's weights, read these; else the host holds no more than it maps from the checkpoint. What
    several ranks saved is first copied into one file, with at most one tensor in memory; the disk must hold it beside
    the output until that is complete. An adapter of a model with added tokens is for a base model whose embedding is
    resized to as many rows. One that was trained beside quantised weights is merged into the weights that these were
    made from.

    Args:
        run_dir: The run directory, with `config.json` and `checkpoints/`.
        step: Which checkpoint; None for the newest complete one, `"best"` for the one with the best evaluation by the
            run's `checkpoint.best_metric`.
        output: The directory to write; must not exist or be empty. It appears complete or not at all.
        merge_adapter: Add the adapter to the base model's weights.

    Returns:
        `output`.

    Raises:
        UserError: There is no such run or checkpoint, the output is not empty, or there is no adapter to merge, or none
            that can be merged.
        RunError: The disk is full or cannot be written.
    """
    if not (run_dir / "config.json").is_file():
        raise UserError(f"--run: {run_dir} is not a run directory: it has no config.json")
    config = load_config(run_dir / "config.json")
    if merge_adapter and config.model.adapter is None:
        raise UserError(f"--merge-adapter: {run_dir} trained all weights, there is no adapter to merge")
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise UserError(f"--output: {output} exists and is not an empty directory; give another one")
    chosen = find_best(run_dir, config.checkpoint.best_metric) if step == "best" else find_step(run_dir, step)
    settings = config.model
    images = settings.task == "image_classification"
    tokenizer = configured_tokenizer(config) if not images and (settings.tokenizer or settings.path) else None
    processing = configured_image_processor(config) if images else tokenizer
    with _temporary_directory(output) as temporary:
        weights = chosen.weights()
        model: PreTrainedModel | PeftModel
        if merge_adapter:
            model = _merged_model(config, weights, tokenizer)
        elif settings.adapter is not None and starts_from_base_weights(settings.adapter):
            model = _loaded_model(config, weights, tokenizer)
        else:
            with _disk_errors(output):
                weights = _in_one_file(weights, temporary / _ASSEMBLED)
            model = _mapped_model(config, weights, tokenizer)
        if isinstance(model, PeftModel):
            _name_base(model, settings.path, settings.revision)
        start = _start_of(config, tokenizer) if isinstance(model, PeftModel) else None
        generation = _generation_config(model, settings.path, hub_options(settings), tokenizer)
        companions = (_classifier_config(model, config), generation, processing)
        with _disk_errors(output):
            _write(model, start, companions, temporary)
            shutil.rmtree(temporary / _ASSEMBLED, ignore_errors=True)
            for path in [*temporary.rglob("*"), temporary]:
                sync(path)
            temporary.rename(output)
            sync(output.parent)
    return output


def _temporary_of(output: Path) -> Path:
    return output.with_name(f".{output.name}.tmp")


@contextmanager
def _temporary_directory(output: Path) -> Iterator[Path]:
    """Where the output is written; gone after an error."""
    temporary = _temporary_of(output)
    try:
        with _disk_errors(output):
            shutil.rmtree(temporary, ignore_errors=True)
            temporary.mkdir(parents=True)
        yield temporary
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


@contextmanager
def _disk_errors(output: Path) -> Iterator[None]:
    """Within this context only the output is written, and errors of the disk are about that."""
    try:
        yield
    except Exception as error:
        if is_disk_full(error):
            shutil.rmtree(_temporary_of(output), ignore_errors=True)
            free = readable_bytes(free_bytes(output.parent))
            raise RunError(f"the disk is full: {output} cannot be written; {free} are free without it") from error
        if isinstance(error, OSError):
            raise RunError(f"cannot write {output}: {error}") from error
        raise


def _in_one_file(weights: StoredFragments, directory: Path) -> StoredFragments:
    """The same weights as whole tensors in one file, which can be mapped; as it is if they are in one already."""
    if len(weights.paths) == 1:
        return weights
    directory.mkdir()
    write_assembled(directory / WEIGHTS_FILE, weights)
    return StoredFragments(directory, "model")


def _mapped_model(
    config: Config, weights: StoredFragments, tokenizer: PreTrainedTokenizerBase | None
) -> PreTrainedModel | PeftModel:
    """The model as the run built it, on the meta device but for what the checkpoint holds."""
    model = configured_empty_model(config, tokenizer, quantized=False)
    map_weights(weights, model)
    if not isinstance(model, PeftModel):
        model.tie_weights()
    return model


def _loaded_model(
    config: Config, weights: StoredFragments, tokenizer: PreTrainedTokenizerBase | None
) -> PreTrainedModel | PeftModel:
    """The model of the checkpoint, with all of its weights, not quantised."""
    model = configured_model(config, tokenizer, quantized=False)
    load_weights(weights, model)
    return model


def _merged_model(
    config: Config, weights: StoredFragments, tokenizer: PreTrainedTokenizerBase | None
) -> PreTrainedModel:
    """The base model with the adapter merged into its weights.

    Raises:
        UserError: The method cannot be merged, or not with these options or layers.
    """
    model = _loaded_model(config, weights, tokenizer)
    try:
        merged: PreTrainedModel = model.merge_and_unload()
    # PEFT's ways to say so: not implemented (a RuntimeError) for a method, the rest for layers or options of one.
    except (ValueError, RuntimeError, AttributeError) as error:
        assert config.model.adapter is not None
        raise UserError(
            f"--merge-adapter: PEFT cannot merge this {config.model.adapter.kind} adapter: {error}; export it without "
            "--merge-adapter, and load it beside its base model"
        ) from error
    return merged


def _start_of(config: Config, tokenizer: PreTrainedTokenizerBase | None) -> PeftModel | None:
    """The adapter before its first step, if what it started with was taken out of the base model's weights."""
    adapter = config.model.adapter
    return configured_model(config, tokenizer) if adapter is not None and changes_base_weights(adapter) else None


def _classifier_config(model: PreTrainedModel | PeftModel, config: Config) -> PreTrainedConfig | None:
    """What a classifier's base model is loaded with, beside an adapter; None if there is no need of it."""
    if not isinstance(model, PeftModel):
        return None
    described: PreTrainedConfig = copy.deepcopy(model.get_base_model().config)
    if config.model.added_tokens:
        # The base model has the rows of its files when it is loaded, and grows afterwards.
        described.get_text_config().vocab_size = base_config(config).get_text_config().vocab_size
    return None if described.problem_type is None else described


def _name_base(model: PeftModel, path: str | None, revision: str | None) -> None:
    """Record the base model where it can be found from any directory."""
    if path is None:
        logger.warning(
            "the adapter's base model has random weights that are stored nowhere; use --merge-adapter for a model "
            "that loads by itself"
        )
    elif (directory := local_directory(path)) is not None:
        model.peft_config["default"].base_model_name_or_path = str(directory.resolve())
    model.peft_config["default"].revision = revision


def _generation_config(
    model: PreTrainedModel | PeftModel, path: str | None, hub: HubOptions, tokenizer: PreTrainedTokenizerBase | None
) -> GenerationConfig | None:
    """The base model's generation config; for a model from a config alone, one that stops where the tokenizer says."""
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    if not base.can_generate():
        return None
    if path is None:
        generation: GenerationConfig = base.generation_config
        if tokenizer is not None:
            generation.bos_token_id = tokenizer.bos_token_id
            generation.eos_token_id = tokenizer.eos_token_id
            generation.pad_token_id = tokenizer.pad_token_id
        return generation
    try:
        with hub.access():
            return GenerationConfig.from_pretrained(
                source_name(path), revision=hub.revision or "main", local_files_only=hub.offline
            )
    except OSError:
        # Older models have none; transformers makes it from their config.
        return base.generation_config


def _write(
    model: PreTrainedModel | PeftModel, start: PeftModel | None, companions: Iterable[Any], directory: Path
) -> None:
    """Write the model, or its adapter, and whatever else there is with a `save_pretrained`."""
    if start is not None:
        _write_as_lora(model, start, directory)
    elif isinstance(model, PeftModel):
        # Embeddings that were trained are among `modules_to_save`; "auto" would ask the hub about the base model.
        model.save_pretrained(str(directory), save_embedding_layers=False)
    else:
        model.save_pretrained(directory)
    for companion in companions:
        if companion is not None:
            companion.save_pretrained(directory)


def _write_as_lora(model: PeftModel, start: PeftModel, directory: Path) -> None:
    """Write an adapter that took its start out of the base weights as a LoRA of twice the rank for the base as it is.

    PEFT's own conversion (`LoraModel.subtract_mutated_init`). Loading such an adapter as it is would take the start out
    of the weights again, by a decomposition that is drawn at random in part and differs between machines.
    """
    with tempfile.TemporaryDirectory() as initial:
        start.save_pretrained(initial, save_embedding_layers=False)
        model.save_pretrained(
            str(directory), save_embedding_layers=False, path_initial_model_for_weight_conversion=initial
        )
