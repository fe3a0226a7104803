"""From a run's checkpoint to a directory that stock transformers or PEFT loads."""

from __future__ import annotations

import logging
import shutil
from pathlib import Path
from typing import Literal

import torch
from peft import PeftModel
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.image_processing_utils import BaseImageProcessor

from framework.checkpoint.disk import free_bytes, is_disk_full, readable_bytes, sync
from framework.checkpoint.finding import find_best, find_step
from framework.checkpoint.weights import WEIGHTS_FILE, load_weights, map_weights
from framework.config import Config, load_config
from framework.data import load_tokenizer
from framework.data.images import load_image_processor
from framework.errors import RunError, UserError
from framework.models import load_model
from framework.models.adapters import add_adapter
from framework.models.configuration import build_model, read_model_config
from framework.models.head import describe_classes, set_padding

logger = logging.getLogger(__name__)


def export_run(
    run_dir: Path, *, step: int | Literal["best"] | None = None, output: Path, merge_adapter: bool = False
) -> Path:
    """Write a checkpoint of a run as a Hugging Face directory, with tokenizer, chat template and generation config.

    Models of images come with their image processor instead. A classifier's config.json names its classes; beside an
    adapter it is written for that alone, to load the base model with.

    Full fine-tuning gives the model as safetensors. A run with an adapter gives the adapter, for
    `PeftModel.from_pretrained`, or with `merge_adapter` the whole model. Only merging reads the base model's weights;
    without it, the host holds no more than it maps from the checkpoint.

    Args:
        run_dir: The run directory, with `config.json` and `checkpoints/`.
        step: Which checkpoint; None for the newest complete one, `"best"` for the one with the best evaluation by the
            run's `checkpoint.best_metric`.
        output: The directory to write; must not exist or be empty. It appears complete or not at all.
        merge_adapter: Add the adapter to the base model's weights.

    Returns:
        `output`.

    Raises:
        UserError: There is no such run or checkpoint, the output is not empty, or there is no adapter to merge.
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
    weights = chosen.path / WEIGHTS_FILE
    tokenizer, processor = _tokenizer(config), _image_processor(config)
    build = _merged_model if merge_adapter else _mapped_model
    model = build(config, weights, None if tokenizer is None else tokenizer.pad_token_id)
    generation = _generation_config(model, config.model.path, tokenizer)
    temporary = output.with_name(f".{output.name}.tmp")
    try:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
        _write(model, tokenizer or processor, generation, temporary)
        for path in [*temporary.rglob("*"), temporary]:
            sync(path)
        temporary.rename(output)
        sync(output.parent)
    except BaseException as error:
        shutil.rmtree(temporary, ignore_errors=True)
        if is_disk_full(error):
            free = readable_bytes(free_bytes(output.parent))
            raise RunError(f"the disk is full: {output} cannot be written; {free} are free without it") from error
        if isinstance(error, OSError):
            raise RunError(f"cannot write {output}: {error}") from error
        raise
    return output


def _tokenizer(config: Config) -> PreTrainedTokenizerBase | None:
    source = config.model.tokenizer or config.model.path
    return None if source is None or config.model.task == "image_classification" else load_tokenizer(source)


def _image_processor(config: Config) -> BaseImageProcessor | None:
    if config.model.task != "image_classification":
        return None
    path = config.model.path
    return load_image_processor(path, read_model_config(path, None if path else config.model.from_config))


def _mapped_model(config: Config, weights: Path, pad_token_id: int | None) -> PreTrainedModel | PeftModel:
    """The model as the run built it, on the meta device but for what the checkpoint holds."""
    settings = config.model
    # As in training, the config at `path` counts where there is one.
    base = read_model_config(settings.path, None if settings.path else settings.from_config)
    describe_classes(base, task=settings.task, label_names=config.data.label_names)
    with torch.device("meta"):
        model: PreTrainedModel | PeftModel = build_model(
            base, task=settings.task, dtype=_weights_dtype(config), attention=settings.attention
        )
        if settings.task == "sequence_classification":
            set_padding(model, pad_token_id)
        if settings.adapter is not None:
            model = add_adapter(model, settings.adapter, task=settings.task)
    map_weights(weights, model)
    if isinstance(model, PeftModel):
        _name_base(model, settings.path)
    else:
        model.tie_weights()
    return model


def _merged_model(config: Config, weights: Path, pad_token_id: int | None) -> PreTrainedModel:
    settings = config.model
    model = load_model(
        path=settings.path,
        from_config=settings.from_config,
        task=settings.task,
        dtype=_weights_dtype(config),
        attention=settings.attention,
        seed=config.run.seed,
        adapter=settings.adapter,
        label_names=config.data.label_names,
        pad_token_id=pad_token_id,
    )
    load_weights(weights, model)
    merged: PreTrainedModel = model.merge_and_unload()
    return merged


def _weights_dtype(config: Config) -> torch.dtype:
    dtype: torch.dtype = getattr(torch, config.weights_dtype)
    return dtype


def _name_base(model: PeftModel, path: str | None) -> None:
    """Record the base model where it can be found from any directory."""
    if path is None:
        logger.warning(
            "the adapter's base model has random weights that are stored nowhere; use --merge-adapter for a model "
            "that loads by itself"
        )
    elif Path(path).expanduser().is_dir():
        model.peft_config["default"].base_model_name_or_path = str(Path(path).expanduser().resolve())


def _generation_config(
    model: PreTrainedModel | PeftModel, path: str | None, tokenizer: PreTrainedTokenizerBase | None
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
    directory = Path(path).expanduser()
    try:
        return GenerationConfig.from_pretrained(str(directory) if directory.is_dir() else path)
    except OSError:
        # Older models have none; transformers makes it from their config.
        return base.generation_config


def _write(
    model: PreTrainedModel | PeftModel,
    processing: PreTrainedTokenizerBase | BaseImageProcessor | None,
    generation: GenerationConfig | None,
    directory: Path,
) -> None:
    if isinstance(model, PeftModel):
        # Embeddings that were trained are among `modules_to_save`; "auto" would ask the hub about the base model.
        model.save_pretrained(str(directory), save_embedding_layers=False)
        base = model.get_base_model()
        if base.config.problem_type is not None:
            base.config.save_pretrained(directory)
    else:
        model.save_pretrained(directory)
    if generation is not None:
        generation.save_pretrained(directory)
    if processing is not None:
        processing.save_pretrained(directory)
