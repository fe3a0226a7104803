"""What of a recorded step depends on which linear outputs are retained, and on the format of keys and values."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn

from framework.models.wrapping import unwrapped
from framework.planner.options import COMPUTED, RETAINED
from framework.planner.recorder import Recorder
from framework.retention import blocks_of, linears
from framework.retention.block_pass import BlockPass, Phase


@contextmanager
def options_of(model: nn.Module, recorder: Recorder) -> Iterator[None]:
    """Within this context the recorder hears what is retained, and when a replay makes use of it.

    Args:
        model: the engine's; its linear layers may be retained.
        recorder: that hears.
    """
    paths = {
        module: path
        for block in blocks_of(unwrapped(model)).values()
        for module, path in linears.linear_paths(block).items()
    }
    plain_pass = linears._through_pass
    plain_backward = linears.KnownOutput.backward
    # Bytes that a computed product would have of a weight's copy in another dtype, and the symbol, by the weight.
    copies: dict[Tensor, tuple[int, str]] = {}

    def through_pass(current: BlockPass, module: nn.Module, x: Tensor, *others: Any) -> Tensor:
        kept = current.linears[module]
        if current.phase is Phase.REPLAY and kept and kept[0] is not None:
            recorder.complete(kept[0], COMPUTED + paths[module])
            if _keeps_copy(module, kept[0], x):
                weight: Any = module.weight
                copies[weight] = weight.numel() * kept[0].element_size(), COMPUTED + paths[module]
                recorder.assume(*copies[weight])
        output = plain_pass(current, module, x, *others)
        if current.phase is Phase.RECORD and kept[-1] is not None:
            recorder.scale(kept[-1], RETAINED + paths[module])
        return output

    def backward(ctx: Any, grad: Tensor) -> Any:
        copied = copies.pop(ctx.saved_tensors[1], None)
        if copied is not None:
            # This function makes a copy of its own for as long as it runs.
            size, symbol = copied
            recorder.assume(-size, symbol)
        return plain_backward(ctx, grad)

    with (
        mock.patch.object(linears, "_through_pass", through_pass),
        mock.patch.object(linears.KnownOutput, "backward", staticmethod(backward)),
    ):
        yield


def _keeps_copy(module: nn.Module, output: Tensor, x: Tensor) -> bool:
    """Whether autocast would make a copy of a weight for a product, and keep it for the gradient of its input."""
    packed = isinstance(module, linears.PackedLinear)
    return not packed and torch.is_grad_enabled() and x.requires_grad and module.weight.dtype != output.dtype
