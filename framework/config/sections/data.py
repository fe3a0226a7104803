"""What a model is trained and evaluated on."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field

from framework.config.sections.base import CountOrZero, NonEmpty, Section

Format = Literal["messages", "sharegpt", "alpaca", "completion", "text", "classification", "image_folder"]


class SourceConfig(Section):
    """One source of data, where its path alone does not say enough."""

    path: NonEmpty
    """A file, a directory, or a name on the Hugging Face hub."""

    weight: Annotated[float, Field(gt=0)] | None = None
    """Share of the samples drawn, relative to the other sources' weights; sources start again when they are through.
    Null, for all of them: every sample once an epoch."""

    format: Literal["auto", Format] | None = None
    """Format of its records. Null: `data.format`."""

    subset: NonEmpty | None = None
    """Configuration of a data set that has several, such as "main"; for hub names and directories in the hub's
    layout."""

    split: NonEmpty | None = None
    """Which split, such as "train" or "train[:5%]", as `datasets.load_dataset` takes it. Null: "train" in `data.train`;
    in `data.eval` the only one there is."""

    revision: NonEmpty | None = None
    """Branch, tag or commit of a hub name. Null: its main branch."""


Sources = NonEmpty | Annotated[list[NonEmpty | SourceConfig], Field(min_length=1)]


def data_sources(value: Sources | list[dict[str, Any]] | None) -> tuple[SourceConfig, ...]:
    """The sources that `data.train` or `data.eval` names, whichever way; none for null.

    Args:
        value: of the key, valid by itself: of a loaded config, or the JSON value that a rule reads.
    """
    if value is None:
        return ()
    named = [value] if isinstance(value, str) else value
    return tuple(
        SourceConfig(path=each) if isinstance(each, str) else SourceConfig.model_validate(each) for each in named
    )


class DataConfig(Section):
    """What the model is trained and evaluated on."""

    train: Sources
    """A file, a directory or a hub name, or a list of these, each also as an object with `path` and options. Paths are
    relative to the current directory. Images: a directory with one sub-directory a class."""

    eval: Sources | None = None
    """The same for evaluation. Null: what `eval_fraction` holds out, if anything."""

    eval_fraction: Annotated[float, Field(gt=0, lt=1)] | None = None
    """Share of `train` that is held out for evaluation instead of trained on. A hash of a sample's text decides, so
    that equal samples are on the same side and further data moves none to the other. Null: nothing is held out."""

    format: Literal["auto", Format] = "auto"
    """Format of the records: `messages` (chat), `sharegpt`, `alpaca`, `completion` (prompt and completion), `text`;
    "auto" recognises it by the keys of each file's first record. Tasks other than causal_lm have one format each:
    `text` for masked_lm, `classification` (text, perhaps text_pair, and label), `image_folder` (CLASS/image.png)."""

    train_on: Literal["assistant", "last_assistant"] = "assistant"
    """Which turns of a conversation carry labels: all of the assistant's, or its last one."""

    sequence_length: Annotated[int, Field(ge=2)] | None = None
    """Longest sequence, in tokens. Needed for all but images, whose number of tokens the model sets."""

    packing: bool = False
    """Put several documents into one sequence, with attention and positions kept apart."""

    overlong: Literal["drop", "truncate"] = "drop"
    """What becomes of a sample that is longer than `sequence_length`: left out and counted, or cut at its end."""

    supervised_fraction: Annotated[float, Field(gt=0, le=1)] | None = None
    """Labelled tokens / all tokens of the rows that are trained, for the planner. Null: counted in a sample."""

    cache_dir: NonEmpty | None = "auto"
    """Directory of the token cache, from which a second start takes its tokens; "auto": `selectrain/tokens` in
    `$XDG_CACHE_HOME` or `~/.cache`. What is in it may be deleted at any time. Null: no cache, tokens are in memory."""

    workers: CountOrZero = 2
    """Threads that make batches ahead of their use; results do not depend on it. 0: each is made when it is needed."""

    label_names: Annotated[list[NonEmpty], Field(min_length=2)] | None = None
    """Names of the classes, in the order of their numbers. Null: those of the model's config if it names any, else the
    names found in `train`, sorted; a run's own config.json has them written out."""

    mask_probability: Annotated[float, Field(gt=0, lt=1)] | None = None
    """Share of a document's tokens that a masked LM has to find. Null: 0.15."""

    augmentation: Literal["none", "crop_flip"] = "none"
    """What training images go through first: nothing, or a random crop to 8-100 % of the area, with aspect ratio 3/4
    to 4/3, and a mirroring of every second one."""
