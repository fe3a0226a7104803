"""The sizes that byte counts are polynomials in: of a model, of a batch, of a job."""

from __future__ import annotations

from torch import nn

from framework.data import Batch
from framework.models.wrapping import unwrapped
from framework.planner.small_models import Family
from framework.retention import blocks_of


def model_symbols(model: nn.Module) -> dict[str, float]:
    """Widths and numbers of elements of a model with its adapter; it may be on the meta device.

    Args:
        model: as it is trained.
    """
    inner = unwrapped(model)
    blocks = [*blocks_of(inner).values()]
    middle = blocks[len(blocks) // 2]
    parameters = [*model.parameters()]
    trained = [parameter for parameter in parameters if parameter.requires_grad]
    block = [*middle.parameters()]
    sizes = {
        "parameters": _elements(parameters),
        "trained": _elements(trained),
        "trained_tensors": len(trained),
        "packed": sum(p.numel() for p in parameters if not p.is_floating_point()),
        "buffers": sum(buffer.nbytes for buffer in model.buffers()),
        "block": _elements(block),
        "block_trained": _elements([p for p in block if p.requires_grad]),
        "block_packed": sum(p.numel() for p in block if not p.is_floating_point()),
    }
    return Family(inner.config).sizes_of_model() | {symbol: float(size) for symbol, size in sizes.items()}


def batch_symbols(batch: Batch) -> dict[str, float]:
    """Of one micro-batch, without a selection."""
    rows, tokens = batch.documents.shape
    return {"batch": rows, "tokens": tokens, "real": batch.tokens, "labels": batch.supervised_tokens}


def _elements(parameters: list[nn.Parameter]) -> int:
    return sum(parameter.numel() for parameter in parameters if parameter.is_floating_point())
