"""What a run would be, without training: the dry run and the view of samples."""

from __future__ import annotations

from pathlib import Path

from rich.console import Console
from torch import nn

from framework.config import Config, data_sources
from framework.data import load_dataset, load_tokenizer, show_samples
from framework.models import check_compatibility, read_architecture
from framework.sharding.precision import PRECISIONS
from framework.training.objective import draw_selection
from framework.training.parameter_groups import describe_groups, parameter_groups
from framework.training.plan import fidelity_class, state_bytes
from framework.training.progress import format_bytes
from framework.training.setup import make_loaders, tokenizer_source


def dry_run(config: Config) -> str:
    """Check a run as far as its architecture, and its files where they exist, and describe it.

    Reads neither weights nor data, and writes nothing.

    Raises:
        UserError: the run would be refused.
    """
    model = config.model
    groups: list[str] = []

    def examine(built: nn.Module) -> None:
        groups.extend(describe_groups(parameter_groups(built, config.optimizer), config.optimizer.learning_rate))

    architecture = read_architecture(
        path=model.path,
        from_config=model.from_config,
        task=model.task,
        attention=model.attention,
        adapter=model.adapter,
        examine=examine,
    )
    source = tokenizer_source(config)
    tokenizer = load_tokenizer(source) if Path(source).expanduser().is_dir() else None
    check_compatibility(architecture, tokenizer, config.data.sequence_length)

    training, trainable = config.training, architecture.trainable_parameters
    states = state_bytes(config.optimizer.precision, architecture.parameters, trainable)
    held = sum(states.values())
    lines = [
        f"architecture   {architecture.family}, {architecture.blocks} blocks, hidden size {architecture.hidden_size}",
        f"parameters     {architecture.parameters:,}, of which {trainable:,} are trained "
        f"({trainable / architecture.parameters:.2%})",
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
    sources = (*data_sources(config.data.train), *data_sources(config.data.eval))
    missing += [source.path for source in sources if not Path(source.path).expanduser().exists()]
    if missing:
        lines.append(f"not here       {', '.join(missing)}: needed to train, so not checked")
    return "\n".join(lines)


def inspect_data(config: Config, count: int, console: Console | None = None) -> None:
    """Print the first samples as they will be trained on, with labels and selection.

    Args:
        config: of the run.
        count: samples to print.
        console: where to; standard output by default.

    Raises:
        UserError: see `load_dataset`.
    """
    tokenizer = load_tokenizer(tokenizer_source(config))
    data = load_dataset(
        data_sources(config.data.train),
        tokenizer=tokenizer,
        sequence_length=config.data.sequence_length,
        format=config.data.format,
        overlong=config.data.overlong,
        train_on=config.data.train_on,
    )
    console = console or Console()
    console.print(f"data.train: {data.report.summary()}", markup=False, highlight=False)
    for name, format in data.report.formats.items():
        console.print(f"  {name}: {format}", markup=False, highlight=False)
    loader, _ = make_loaders(config, data, tokenizer.pad_token_id)
    while count > 0:
        for batch in loader.next_window():
            documents = len(batch.documents[batch.documents >= 0].unique())
            show_samples(batch, tokenizer, draw_selection(config, batch), console=console, count=min(count, documents))
            count -= documents
            if count <= 0:
                break
