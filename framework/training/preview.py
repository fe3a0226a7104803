"""What a run would be, without training: the dry run and the view of samples."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from rich.console import Console
from torch import nn

from framework.config import Config, data_sources
from framework.data import shares_of, show_images, show_samples
from framework.data.images import processed_shape
from framework.data.masking import Masking
from framework.hub import local_directory
from framework.linear_names import Retained
from framework.models import (
    Architecture,
    check_compatibility,
    configured_architecture,
    configured_image_processor,
    configured_tokenizer,
    tokenizer_source,
)
from framework.models.wrapping import unwrapped
from framework.retention import blocks_of
from framework.retention.linears import check_retained
from framework.sharding.deepspeed_config import OwnOptions
from framework.sharding.engines import engine_options, model_sizes
from framework.sharding.precision import PRECISIONS
from framework.training.eight_bit import eight_bit_state_bytes
from framework.training.objective import draw_selection
from framework.training.parameter_groups import describe_groups, parameter_groups
from framework.training.plan import fidelity_class, state_bytes
from framework.training.progress import format_bytes
from framework.training.run_data import load_run_data

POOLED_TOKENS = {"first": "the first token", "last": "the last token", "mean": "the mean of all tokens"}


def dry_run(config: Config, ranks: int | None = None, own_options: OwnOptions | None = None) -> str:
    """Check a run as far as its architecture, and its files where they exist, and describe it.

    Reads neither weights nor data, and writes nothing.

    Args:
        config: of the run.
        ranks: number of processes; None for as many as `hardware` describes.
        own_options: a user's own options of DeepSpeed.

    Raises:
        UserError: the run would be refused.
    """
    ranks = config.described_ranks if ranks is None else ranks
    groups: list[str] = []
    optimizer_bytes: list[int] = []

    def examine(built: nn.Module) -> None:
        if config.retention.policy == "selective":
            check_retained(blocks_of(unwrapped(built)).values(), config.retained_linears)
        groups.extend(describe_groups(parameter_groups(built, config.optimizer), config.optimizer.learning_rate))
        if config.optimizer.name == "adamw_8bit":
            trained = (parameter for parameter in built.parameters() if parameter.requires_grad)
            optimizer_bytes.append(eight_bit_state_bytes(trained))

    architecture, missing = _checked_architecture(config, examine)
    engine_options(config, model_sizes(architecture), ranks, own_options)
    training, trainable = config.training, architecture.trainable_parameters
    states = state_bytes(
        config,
        architecture.parameters,
        trainable,
        ranks,
        quantized=architecture.quantized_parameters,
        quantized_bytes=architecture.quantized_bytes,
        optimizer_bytes=next(iter(optimizer_bytes), None),
    )
    held = sum(states.values())
    lines = [
        f"architecture   {architecture.family}, {architecture.blocks} blocks, hidden size {architecture.hidden_size}",
        f"parameters     {architecture.parameters:,}, of which {trainable:,} are trained "
        f"({trainable / architecture.parameters:.2%})",
        *_model_lines(config, architecture),
        f"batch          {training.global_batch_size} sequences a step = {training.micro_batch_size} (micro-batch) x "
        f"{config.gradient_accumulation(ranks)} (accumulation) x {ranks} (rank{'s' if ranks > 1 else ''}), "
        f"of {_length(config, architecture)}",
        *_task_lines(config, architecture),
        f"steps          {training.max_steps or f'{training.epochs:g} epochs; data.train says how many steps'}",
        f"selection      {config.selection.strategy}, ratio {config.resolved_ratio}: {fidelity_class(config)}",
        f"retention      {config.retention.policy}"
        + _linears(config.retained_linears)
        + (f", keys and values in {config.retention.kv_format}" if config.retention.policy == "selective" else ""),
        f"engine         {_engine(config)}, precision {config.optimizer.precision}: "
        f"weights {_weights(config)}, computation {PRECISIONS[config.optimizer.precision].autocast or 'the same'}",
        *(f"optimizer      {group}" for group in groups),
        f"memory         {format_bytes(held)}{' a rank' if ranks > 1 else ''} without activations: "
        + ", ".join(f"{name} {format_bytes(size)}" for name, size in states.items()),
    ]
    mixed = [each for each in data_sources(config.data.train) if each.weight is not None]
    if mixed:
        shares = zip(shares_of([each.weight for each in mixed]), mixed, strict=True)
        lines.append(f"mixture        {', '.join(f'{share:.1%} {each.path}' for share, each in shares)}")
    sources = (*data_sources(config.data.train), *data_sources(config.data.eval))
    missing += [source.path for source in sources if not Path(source.path).expanduser().exists()]
    if missing:
        lines.append(f"not here       {', '.join(missing)}: needed to train, so not checked")
    return "\n".join(lines)


def _engine(config: Config) -> str:
    """The engine with the options that say who holds what, and where."""
    sharding = config.sharding
    parts = [sharding.engine]
    if sharding.engine == "deepspeed":
        parts.append(f"ZeRO stage {config.zero_stage}")
    if sharding.replicas > 1:
        parts.append(f"{sharding.replicas} copies")
    if not sharding.reshard_after_forward:
        parts.append("gathered weights kept until the backward pass")
    offloaded = [name for name in ("optimizer", "parameters") if getattr(sharding, f"offload_{name}")]
    if offloaded:
        parts.append(f"{' and '.join(offloaded)} on the host")
    return ", ".join(parts)


def _weights(config: Config) -> str:
    """The dtype of the weights, and of the copies that are updated in their place."""
    computing = PRECISIONS[config.optimizer.precision].autocast
    if config.sharding.engine == "deepspeed" and config.zero_stage > 0 and computing is not None:
        return f"{computing} beside masters in {config.weights_dtype}"
    return config.weights_dtype


def _model_lines(config: Config, architecture: Architecture) -> list[str]:
    """What a config adds to its model."""
    lines, adapter, tokens = [], config.model.adapter, config.model.added_tokens
    if quantized := architecture.quantized_parameters:
        bits = 8 * architecture.quantized_bytes / quantized
        lines.append(
            f"quantization   {config.model.quantization}: {quantized:,} parameters in {bits:.3f} bits each, "
            f"{format_bytes(architecture.quantized_bytes)}"
        )
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
        UserError: see `load_run_data`.
    """
    console = console or Console()

    def report(line: str) -> None:
        # What is shown are samples of the training set.
        if not line.startswith("data.eval"):
            console.print(line, markup=False, highlight=False)

    data = load_run_data(config, report)
    loader, _ = data.loaders()
    for name, format in data.train.report.formats.items():
        console.print(f"  {name}: {format}", markup=False, highlight=False)
    while count > 0:
        for batch in loader.next_window():
            documents = len(batch.documents[batch.documents >= 0].unique())
            selection, shown = draw_selection(config, batch), min(count, documents)
            if data.tokenizer is None:
                show_images(batch, data.train, data.config.data.label_names, selection, console=console, count=shown)
            else:
                show_samples(
                    batch,
                    data.tokenizer,
                    selection,
                    console=console,
                    count=shown,
                    label_names=data.config.data.label_names,
                )
            count -= documents
            if count <= 0:
                break


def _checked_architecture(config: Config, examine: Callable[[nn.Module], None]) -> tuple[Architecture, list[str]]:
    """The architecture, found to go with the tokenizer or image processor, and which of these is not here."""
    model, data = config.model, config.data
    pixels, tokenizer, missing = None, None, []
    if model.task == "image_classification":
        if model.path is None or local_directory(model.path) is not None:
            pixels = processed_shape(configured_image_processor(config))
        else:
            missing.append(f"image processor of {model.path}")
    elif local_directory(tokenizer_source(config)) is not None:
        tokenizer = configured_tokenizer(config)
    else:
        missing.append(f"tokenizer {tokenizer_source(config)}")
    architecture = configured_architecture(config, tokenizer, pixels=pixels, examine=examine)
    if data.sequence_length is not None:
        check_compatibility(architecture, tokenizer, data.sequence_length)
    if model.task == "masked_lm" and tokenizer is not None:
        Masking.of_tokenizer(tokenizer, probability=config.mask_probability, seed=config.run.seed)
    return architecture, missing


def _linears(chosen: Retained) -> str:
    if not chosen:
        return ""
    return ", linear outputs retained" if chosen is True else f", outputs of {', '.join(chosen)} retained"


def _length(config: Config, architecture: Architecture) -> str:
    if config.model.task != "image_classification":
        return f"up to {config.data.sequence_length} tokens"
    return f"{architecture.image_tokens} tokens" if architecture.image_tokens else "as many tokens as the model makes"


def _task_lines(config: Config, architecture: Architecture) -> list[str]:
    """What is particular to the task."""
    if config.model.task == "masked_lm":
        return [f"task           masked_lm, {config.mask_probability:.0%} of the tokens to be found"]
    if architecture.pooling is None:
        return []
    names = config.data.label_names
    classes = f"{len(names)} classes" if names else "classes as in the model's config or data.train, not read"
    return [f"task           {config.model.task}, {classes}, head on {POOLED_TOKENS[architecture.pooling]}"]
