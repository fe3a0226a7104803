"""What a run would be, without training: the dry run and the view of samples."""

from __future__ import annotations

from pathlib import Path

from rich.console import Console
from torch import nn

from framework.config import Config
from framework.data import load_dataset, show_samples
from framework.models import (
    Architecture,
    check_compatibility,
    configured_architecture,
    configured_tokenizer,
    has_local_tokenizer,
    tokenizer_source,
)
from framework.sharding.precision import PRECISIONS
from framework.training.objective import draw_selection
from framework.training.parameter_groups import describe_groups, parameter_groups
from framework.training.plan import fidelity_class, state_bytes
from framework.training.progress import format_bytes
from framework.training.setup import make_loaders


def dry_run(config: Config) -> str:
    """Check a run as far as its architecture, and its files where they exist, and describe it.

    Reads neither weights nor data, and writes nothing.

    Raises:
        UserError: the run would be refused.
    """
    groups: list[str] = []

    def examine(built: nn.Module) -> None:
        groups.extend(describe_groups(parameter_groups(built, config.optimizer), config.optimizer.learning_rate))

    source = tokenizer_source(config)
    tokenizer = configured_tokenizer(config) if has_local_tokenizer(config) else None
    architecture = configured_architecture(config, tokenizer, examine=examine)
    check_compatibility(architecture, tokenizer, config.data.sequence_length)

    training, trainable = config.training, architecture.trainable_parameters
    states = state_bytes(config.optimizer.precision, architecture.parameters, trainable)
    held = sum(states.values())
    lines = [
        f"architecture   {architecture.family}, {architecture.blocks} blocks, hidden size {architecture.hidden_size}",
        f"parameters     {architecture.parameters:,}, of which {trainable:,} are trained "
        f"({trainable / architecture.parameters:.2%})",
        *_model_lines(config, architecture),
        f"batch          {training.global_batch_size} sequences a step = {training.micro_batch_size} (micro-batch) x "
        f"{config.gradient_accumulation} (accumulation) x 1 (rank), of up to {config.data.sequence_length} tokens",
        f"steps          {training.max_steps or f'{training.epochs:g} epochs; data.train says how many steps'}",
        f"selection      {config.selection.strategy}, ratio {config.resolved_ratio}: {fidelity_class(config)}",
        f"retention      {config.retention.policy}"
        + (", linear outputs retained" if config.retention.retain_linears else "")
        + (f", keys and values in {config.retention.kv_format}" if config.retention.policy == "selective" else ""),
        f"engine         {config.sharding.engine}, precision {config.optimizer.precision}: "
        f"weights {config.weights_dtype}, computation {PRECISIONS[config.optimizer.precision].autocast or 'the same'}",
        *(f"optimizer      {group}" for group in groups),
        f"memory         {format_bytes(held)} without activations: "
        + ", ".join(f"{name} {format_bytes(size)}" for name, size in states.items()),
    ]
    missing = [] if tokenizer else [f"tokenizer {source}"]
    for paths in (config.data.train, config.data.eval):
        listed = [paths] if isinstance(paths, str) else paths or []
        missing += [path for path in listed if not Path(path).expanduser().exists()]
    if missing:
        lines.append(f"not here       {', '.join(missing)}: needed to train, so not checked")
    return "\n".join(lines)


def _model_lines(config: Config, architecture: Architecture) -> list[str]:
    """What a config adds to its model."""
    lines, adapter, tokens = [], config.model.adapter, config.model.added_tokens
    if adapter is not None:
        numbers = [f"{name} {value}" for name in ("rank", "alpha") if (value := getattr(adapter, name)) is not None]
        lines.append(f"adapter        {', '.join([adapter.kind, *numbers])}")
    if tokens:
        lines.append(f"added tokens   {', '.join(tokens)}; the embedding has {architecture.vocab_size:,} rows")
    return lines


def inspect_data(config: Config, count: int, console: Console | None = None) -> None:
    """Print the first samples as they will be trained on, with labels and selection.

    Args:
        config: of the run.
        count: samples to print.
        console: where to; standard output by default.

    Raises:
        UserError: see `load_dataset`.
    """
    tokenizer = configured_tokenizer(config)
    data = load_dataset(
        config.data.train,
        tokenizer=tokenizer,
        sequence_length=config.data.sequence_length,
        format=config.data.format,
        overlong=config.data.overlong,
    )
    console = console or Console()
    console.print(f"data.train: {data.report.summary()}", markup=False, highlight=False)
    loader, _ = make_loaders(config, data, tokenizer.pad_token_id)
    while count > 0:
        for batch in loader.next_window():
            documents = len(batch.documents[batch.documents >= 0].unique())
            show_samples(batch, tokenizer, draw_selection(config, batch), console=console, count=min(count, documents))
            count -= documents
            if count <= 0:
                break
