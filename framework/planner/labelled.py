"""The labelled share of a run's data: as the config says, counted in a sample, or the most that it can be."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from framework.config import Config, SourceConfig, data_sources
from framework.data import Dataset, JoinedDataset, Loader, load_dataset, shares_of
from framework.data.order import OPEN_BINS
from framework.data.sources import list_parts
from framework.errors import UserError
from framework.hub import local_directory
from framework.models import configured_tokenizer, tokenizer_source

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

SAMPLES = 512
"""That are read, of all sources together."""

LEAST_SAMPLES = 32
"""Of each source."""


@dataclass(frozen=True)
class LabelledShare:
    """A labelled share and how it came about.

    Attributes:
        value: labelled tokens / all tokens of the rows that are trained.
        source: for people, one line.
        assumed: it is neither given nor counted.
    """

    value: float
    source: str
    assumed: bool = False


def labelled_share_of(config: Config) -> float:
    """Labelled tokens / all tokens of the rows that a run is trained on.

    What `data.supervised_fraction` says, else what is counted in `SAMPLES` samples: the first ones of every file,
    through the run's own tokenizer, template, truncation, packing and padding. The same for the same data on every rank
    and at every start, whether or not the token cache has it. Data is read from wherever the run would read it.

    Args:
        config: of the run; its micro-batch may be open, and is then taken to be one sequence.

    Raises:
        UserError: there is no tokenizer or no data, records are broken, or the task is another one than causal_lm.
    """
    given = config.data.supervised_fraction
    return _counted(config) if given is None else given


def share_for_planning(config: Config, given: float | None = None) -> LabelledShare:
    """The labelled share to plan with; nothing is downloaded for it.

    Without data or tokenizer on this machine it is taken to be 1: no share needs more memory or time.

    Args:
        config: of the run.
        given: `--labelled-share`, which goes before everything else.

    Raises:
        UserError: `given` is no share, or as for `labelled_share_of`.
    """
    if given is not None:
        if not 0 < given <= 1:
            raise UserError(f"--labelled-share: {given:g} is not above 0 and at most 1")
        return LabelledShare(given, f"labelled share: {given:.1%}, as --labelled-share says")
    if (fraction := config.data.supervised_fraction) is not None:
        return LabelledShare(fraction, f"labelled share: {fraction:.1%}, as data.supervised_fraction says")
    missing = _missing(config)
    if missing:
        return LabelledShare(
            1.0,
            f"labelled share: 100 % assumed, the most there can be: {', '.join(missing)} not here. "
            "--set data.supervised_fraction=0.3 would say that it is 30 %",
            assumed=True,
        )
    counted = _counted(config)
    return LabelledShare(counted, f"labelled share: {counted:.1%} of the tokens, in a sample of data.train")


def _missing(config: Config) -> list[str]:
    """What of data and tokenizer is not on this machine."""
    sources = [source.path for source in data_sources(config.data.train)]
    missing = [path for path in sources if not Path(path).expanduser().exists()]
    named = config.model.tokenizer or config.model.path
    if named is None:
        missing.append("a tokenizer")
    elif local_directory(tokenizer_source(config)) is None:
        missing.append(f"the tokenizer {named}")
    return missing


def _counted(config: Config) -> float:
    """In batches of the sampled data as the run makes them."""
    data, training = config.data, config.training
    if config.model.task != "causal_lm" or data.sequence_length is None:
        raise UserError(f"model.task: the planner knows causal_lm only, not {config.model.task}")
    tokenizer = configured_tokenizer(config)
    dataset = _sampled(config, tokenizer, data.sequence_length)
    micro_batch_size = training.micro_batch_size if isinstance(training.micro_batch_size, int) else 1

    def loader(global_batch_size: int) -> Loader:
        return Loader(
            dataset,
            sequence_length=data.sequence_length,
            packing=data.packing,
            global_batch_size=global_batch_size,
            micro_batch_size=micro_batch_size,
            seed=config.run.seed,
            pad_token_id=tokenizer.pad_token_id,
        )

    rows = len(loader(micro_batch_size).sequences(0))
    if data.packing and len(dataset) >= SAMPLES:
        # The last rows would be filled up with samples that were not read.
        rows = max(1, rows - OPEN_BINS)
    window = min(training.global_batch_size, max(1, rows // micro_batch_size) * micro_batch_size)
    drawn, labelled, tokens = loader(window), 0, 0
    for _ in range(max(1, rows // window)):
        for batch in drawn.next_window():
            labelled += batch.supervised_tokens
            tokens += batch.documents.numel()
    return labelled / tokens


def _sampled(config: Config, tokenizer: PreTrainedTokenizerBase, sequence_length: int) -> Dataset:
    """The first samples of all sources, which are drawn as often as in the run."""
    data, sources = config.data, data_sources(config.data.train)
    parts = [
        load_dataset(
            source,
            tokenizer=tokenizer,
            sequence_length=sequence_length,
            format=data.format,
            overlong=data.overlong,
            train_on=data.train_on,
            most=max(LEAST_SAMPLES, SAMPLES // len(sources)),
        )
        for source in sources
    ]
    if len(parts) == 1:
        return parts[0]
    weights = [source.weight for source in sources if source.weight is not None]
    if not weights:
        # By the samples that a source's bytes hold, where tokens have as many bytes in all sources.
        sizes = [_bytes(source) for source in sources]
        mean = sum(sizes) / max(1, sum(map(bool, sizes))) or 1.0
        weights = [(size or mean) * len(part) / part.report.tokens for size, part in zip(sizes, parts, strict=True)]
    return JoinedDataset(parts, shares=shares_of(weights))


def _bytes(source: SourceConfig) -> int:
    """Of a source's files; 0 where it has none."""
    paths = [part.path for part in list_parts(source, option="data.train")]
    return sum(path.stat().st_size for path in paths if path is not None)
