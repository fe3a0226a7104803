"""Rules about sources, formats and what a task makes of them."""

from __future__ import annotations

from framework.config.rules.registry import CLASSIFICATION, TASK_FORMATS, rule
from framework.config.sections import Sources, data_sources


@rule("data.train", "data.eval", "data.format", "data.train_on")
def _train_on_is_for_conversations(
    train: Sources, eval: Sources | None, format: str, train_on: str
) -> tuple[str, str] | None:
    formats = {source.format or format for source in (*data_sources(train), *data_sources(eval))}
    if train_on == "assistant" or formats & {"auto", "messages", "sharegpt", "alpaca", "completion"}:
        return None
    return "data.train_on", f'"{train_on}" has no effect on the format {" or ".join(sorted(formats))}: leave it out'


@rule("data.train")
def _all_sources_are_weighted(train: Sources) -> tuple[str, str] | None:
    sources = data_sources(train)
    unweighted = [source.path for source in sources if source.weight is None]
    if unweighted and len(unweighted) < len(sources):
        return (
            "data.train",
            f"some sources have a weight, but not {', '.join(unweighted)}: give all of them one, or none",
        )
    return None


@rule("data.eval")
def _evaluation_has_no_weights(eval: Sources | None) -> tuple[str, str] | None:
    if any(source.weight is not None for source in data_sources(eval)):
        return "data.eval", "a weight has no effect in evaluation, which takes every sample once: leave it out"
    return None


@rule("data.eval", "data.eval_fraction")
def _one_evaluation_set(eval: Sources | None, eval_fraction: float | None) -> tuple[str, str] | None:
    if eval is not None and eval_fraction is not None:
        return "data.eval_fraction", "contradicts data.eval: give the evaluation data, or hold some of data.train out"
    return None


@rule("model.task", "data.format", "data.train", "data.eval")
def _formats_suit_task(task: str, format: str, train: Sources, eval: Sources | None) -> tuple[str, str] | None:
    wanted = TASK_FORMATS.get(task)
    formats: dict[str, set[str | None]] = {"data.format": {format}}
    formats["data.train"] = {source.format for source in data_sources(train)}
    formats["data.eval"] = {source.format for source in data_sources(eval)}
    for key, named in formats.items():
        for each in sorted(named - {None, "auto", wanted}, key=str):
            if wanted is not None:
                return key, f'the format "{each}" is not for model.task "{task}", whose format is "{wanted}"'
            if each in ("classification", "image_folder"):
                owner = next(name for name, its in TASK_FORMATS.items() if its == each)
                return key, f'the format "{each}" needs model.task "{owner}", which is "{task}"'
    return None


@rule("model.task", "data.train", "data.eval")
def _images_are_in_directories(task: str, train: Sources, eval: Sources | None) -> tuple[str, str] | None:
    if task == "image_classification":
        for key, sources in (("data.train", data_sources(train)), ("data.eval", data_sources(eval))):
            if any(source.subset or source.split or source.revision for source in sources):
                return key, "subset, split and revision have no effect on directories of images: leave them out"
    return None


@rule("model.task", "data.train_on")
def _turns_are_causal(task: str, train_on: str) -> tuple[str, str] | None:
    if train_on != "assistant" and task != "causal_lm":
        return "data.train_on", f'needs model.task "causal_lm", which is "{task}"'
    return None


@rule("model.task", "data.cache_dir")
def _classes_are_not_cached(task: str, cache_dir: str | None) -> tuple[str, str] | None:
    if cache_dir not in (None, "auto") and task in CLASSIFICATION:
        return "data.cache_dir", f'has no effect with model.task "{task}", whose tokens are in memory: leave it out'
    return None


@rule("model.task", "data.sequence_length")
def _tokens_have_a_limit(task: str, sequence_length: int | None) -> tuple[str, str] | None:
    if task == "image_classification":
        if sequence_length is not None:
            return (
                "data.sequence_length",
                "has no effect on images, whose number of tokens the model sets: leave it out",
            )
        return None
    return ("data.sequence_length", "missing, expected an integer of at least 2") if sequence_length is None else None


@rule("model.task", "data.packing")
def _packing_is_causal(task: str, packing: bool) -> tuple[str, str] | None:
    if packing and task != "causal_lm":
        return "data.packing", f'needs model.task "causal_lm", which is "{task}": one sample a row here'
    return None


@rule("model.task", "data.overlong")
def _images_are_never_overlong(task: str, overlong: str) -> tuple[str, str] | None:
    if overlong != "drop" and task == "image_classification":
        return "data.overlong", "has no effect on images: leave it out"
    return None


@rule("model.task", "data.label_names")
def _labels_are_for_classes(task: str, label_names: list[str] | None) -> tuple[str, str] | None:
    if label_names is None:
        return None
    if task not in CLASSIFICATION:
        return "data.label_names", f'has no effect with model.task "{task}": it is for {" and ".join(CLASSIFICATION)}'
    repeated = sorted({name for name in label_names if label_names.count(name) > 1})
    return ("data.label_names", f"repeats {', '.join(repeated)}") if repeated else None


@rule("model.task", "data.mask_probability")
def _masks_are_for_masked_lm(task: str, mask_probability: float | None) -> tuple[str, str] | None:
    if mask_probability is not None and task != "masked_lm":
        return "data.mask_probability", f'needs model.task "masked_lm", which is "{task}"'
    return None


@rule("model.task", "data.augmentation")
def _augmentation_is_for_images(task: str, augmentation: str) -> tuple[str, str] | None:
    if augmentation != "none" and task != "image_classification":
        return "data.augmentation", f'needs model.task "image_classification", which is "{task}"'
    return None
