"""What a run's task makes of its data: the samples, and how batches are made of them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from framework.config import Config, SourceConfig, data_sources
from framework.data import (
    Batch,
    Collate,
    Dataset,
    Loader,
    TokenCache,
    TokenizedDataset,
    default_cache_directory,
    hold_out,
    language_collate,
    load_dataset,
    load_sources,
    source_lines,
)
from framework.data.classes import ClassLabels, counted
from framework.data.classification import collate_classification, load_classification
from framework.data.images import (
    Augmentation,
    collate_images,
    load_image_folder,
    processed_shape,
)
from framework.data.masking import Masking, collate_masked, maskable
from framework.models import (
    Architecture,
    check_compatibility,
    configured_architecture,
    configured_classes,
    configured_image_processor,
    configured_tokenizer,
)
from framework.models.head import known_classes
from framework.sharding.place import Place
from framework.sharding.ranks import Ranks
from framework.training.setup import ALONE, make_loaders

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Report = Callable[[str], None]


@dataclass(frozen=True)
class RunData:
    """The data of a run.

    Attributes:
        config: of the run, with `data.label_names` written out.
        train: the training set.
        eval: the evaluation set, or None.
        collate: makes training batches.
        evaluation_collate: makes evaluation batches.
        tokenizer: None for images.
    """

    config: Config
    train: Dataset
    eval: Dataset | None
    collate: Collate
    evaluation_collate: Collate
    tokenizer: PreTrainedTokenizerBase | None

    def loaders(self, place: Place = ALONE) -> tuple[Loader, Callable[..., Iterator[Batch]]]:
        """See `make_loaders`, for the rank at `place`."""
        return make_loaders(
            self.config,
            self.train,
            self.pad_token_id,
            collate=self.collate,
            evaluation_collate=self.evaluation_collate,
            place=place,
        )

    @property
    def pad_token_id(self) -> int | None:
        """The tokenizer's padding token; None for images."""
        return None if self.tokenizer is None else self.tokenizer.pad_token_id


def shared_run_data(config: Config, ranks: Ranks, report: Report) -> RunData:
    """The same on every rank. With a token cache one rank of each machine fills it, which the others then read.

    Args:
        config: Of the run.
        ranks: Of the run.
        report: Takes a line for the log.

    Raises:
        UserError: See `load_run_data`.
    """
    with ranks.in_turn() if config.data.cache_dir is not None else nullcontext():
        data = load_run_data(config, report)
    ranks.meet()
    return data


def load_run_data(config: Config, report: Report) -> RunData:
    """Load training and evaluation data as the task wants it; what became of the records is reported.

    Args:
        config: Of the run.
        report: Takes a line for the log.

    Raises:
        UserError: Data, tokenizer or image processor are missing or broken, or do not go with the model.
    """
    load = {
        "causal_lm": _language,
        "masked_lm": _language,
        "sequence_classification": _texts,
        "image_classification": _images,
    }[config.model.task]
    return load(config, report)


def _language(config: Config, report: Report) -> RunData:
    """Tokens with a label each, of a causal or masked language model."""
    data, masked = config.data, config.model.task == "masked_lm"
    tokenizer, _ = _tokenizer(config)
    collate = language_collate(data.sequence_length, tokenizer.pad_token_id, packing=data.packing)
    load: Callable[..., Dataset] = partial(
        load_dataset,
        tokenizer=tokenizer,
        sequence_length=data.sequence_length,
        format="text" if masked else data.format,
        overlong=data.overlong,
        train_on=data.train_on,
        cache=_token_cache(config, tokenizer),
    )
    if masked:
        masking = Masking.of_tokenizer(tokenizer, probability=config.mask_probability, seed=config.run.seed)
        collate = partial(collate_masked, collate, masking)
        load = partial(_load_maskable, load, masking)
    whole = load_sources(data_sources(data.train), partial(load, option="data.train"))
    train, evaluation = _split(config, whole, load)
    _report(report, train, evaluation)
    return RunData(config, train, evaluation, collate, collate, tokenizer)


def _load_maskable(
    load: Callable[..., TokenizedDataset], masking: Masking, source: SourceConfig, *, option: str
) -> TokenizedDataset:
    return maskable(load(source, option=option), masking, option)


def _token_cache(config: Config, tokenizer: PreTrainedTokenizerBase) -> TokenCache | None:
    cache_dir = config.data.cache_dir
    if cache_dir is None:
        return None
    directory = default_cache_directory() if cache_dir == "auto" else Path(cache_dir).expanduser()
    return TokenCache(directory, tokenizer)


def _texts(config: Config, report: Report) -> RunData:
    """Texts with one class each."""
    data = config.data
    tokenizer, architecture = _tokenizer(config)
    load = partial(
        load_classification, tokenizer=tokenizer, sequence_length=data.sequence_length, overlong=data.overlong
    )
    config, train, evaluation = _classified(load, config, report)
    collate = partial(
        collate_classification,
        sequence_length=data.sequence_length,
        pad_token_id=tokenizer.pad_token_id,
        pooling=architecture.pooling,
        token_types=architecture.token_types,
    )
    return RunData(config, train, evaluation, collate, collate, tokenizer)


def _images(config: Config, report: Report) -> RunData:
    """Images with one class each."""
    processor = configured_image_processor(config)
    architecture = configured_architecture(config, None, with_adapter=False, pixels=processed_shape(processor))
    config, train, evaluation = _classified(_load_images, config, report)
    collate = partial(
        collate_images, processor=processor, tokens=architecture.image_tokens, pooling=architecture.pooling
    )
    augmented = collate
    if config.data.augmentation == "crop_flip":
        augmented = partial(collate, augmentation=Augmentation(config.run.seed))
    return RunData(config, train, evaluation, augmented, collate, None)


def _load_images(source: SourceConfig, *, labels: ClassLabels, option: str) -> Dataset:
    return load_image_folder(source.path, labels=labels, option=option)


def _tokenizer(config: Config) -> tuple[PreTrainedTokenizerBase, Architecture]:
    """The tokenizer, and the architecture that it was found to go with."""
    tokenizer = configured_tokenizer(config)
    architecture = configured_architecture(config, tokenizer, with_adapter=False)
    assert config.data.sequence_length is not None, "a rule of the config"
    check_compatibility(architecture, tokenizer, config.data.sequence_length)
    return tokenizer, architecture


def _classified(load: Callable[..., Dataset], config: Config, report: Report) -> tuple[Config, Dataset, Dataset | None]:
    """The data sets of a classifier, and the config with the names of their classes."""
    known, count = known_classes(config.data.label_names, configured_classes(config))
    labels = ClassLabels(known, count)
    whole = load_sources(data_sources(config.data.train), partial(load, labels=labels, option="data.train"))
    names = labels.settle("data.train")
    # The evaluation set may lack classes, but have no others.
    evaluation_labels = ClassLabels(names)
    train, evaluation = _split(config, whole, partial(load, labels=evaluation_labels))
    evaluation_labels.settle("data.eval")
    _report(report, train, evaluation)
    report(f"data.train: {counted(train.classes, names)}")
    return config.with_label_names(names), train, evaluation


def _split(config: Config, whole: Dataset, load: Callable[..., Dataset]) -> tuple[Dataset, Dataset | None]:
    """Training and evaluation set, from what `data.train` names and what `load` makes of a source of `data.eval`."""
    if config.data.eval_fraction is not None:
        return hold_out(whole, config.data.eval_fraction)
    if config.data.eval is None:
        return whole, None
    return whole, load_sources(data_sources(config.data.eval), partial(load, option="data.eval"))


def _report(report: Report, train: Dataset, evaluation: Dataset | None) -> None:
    for line in (train.report.summary(), *source_lines(train)):
        report(f"data.train: {line}")
    if evaluation is not None:
        report(f"data.eval: {evaluation.report.summary()}")
