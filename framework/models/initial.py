"""A model without its tensors, and its tensors one by one: how ranks that keep shards start from the same weights."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from itertools import chain
from typing import Any

from peft import PeftModel
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from framework.config import Config
from framework.models.configured import configured_model
from framework.models.deferred import Deferred
from framework.models.stored import stored_weights_deferred

logger = logging.getLogger(__name__)

_ABOUT_META = re.compile(r"\bmeta tensor|\bmeta device|'Meta'")
"""What torch says of tensors without values."""

_SMALLEST = 2**14
"""Elements of the smallest tensor that is not held on the host: below are norms, biases and tables of positions."""


def sharded_model(
    config: Config,
    tokenizer: PreTrainedTokenizerBase | None = None,
    *,
    turn: Callable[[], AbstractContextManager[None]] = nullcontext,
) -> tuple[PreTrainedModel | PeftModel, Iterator[tuple[str, Tensor]] | None]:
    """The model of a run on the meta device, and its tensors one by one; raises as `configured_model` does.

    It is `configured_model` with its operators recorded (`Deferred`), so names, classes, dtypes, `requires_grad`, tied
    tensors and modes are the same, and the values are the same bits: of stored weights with transformers' renaming and
    conversion, of random weights, added tokens' rows and adapters.

    The host holds, beside the model's small tensors (fewer than 2**14 elements each) and indices that an adapter's code
    computes at once, one whole tensor and what one operator on the way to it takes: a merge of experts takes them all
    beside the result; a change of dtype, the tensor in both; an adapter's start that depends on a base weight (DoRA),
    that weight. Files are memory-mapped; a tensor of a file is read once for each tensor of the model that is made of
    it. Random weights are drawn twice, once to learn the generator's states; what is computed of weights by
    decomposition (PiSSA, OSF) is computed once for each tensor that is made of it.

    Every rank gets the whole model, and a warning says why, if its weights are not in safetensors files, or code on the
    way asks for what a tensor without values cannot give.

    Args:
        config: of the run, a classifier's with `data.label_names`.
        tokenizer: as for `configured_model`.
        turn: gives a context for what may download, such as one that lets a machine's first rank go first.

    Returns:
        The model in training mode, all of its parameters and buffers on the meta device, and an iterator over all of
        them: their first name in `named_parameters()` or `named_buffers()`, tied ones once, and the values, a CPU
        tensor of the same shape and dtype. Or the model on the CPU, and None.
    """
    deferred = Deferred(smallest=_SMALLEST)
    with turn() if config.model.path is not None else nullcontext():
        try:
            with deferred, stored_weights_deferred(deferred):
                model = configured_model(config, tokenizer)
        # Anything may be raised where code meets a tensor without values.
        except Exception as error:
            if not _for_want_of_values(error):
                raise
            return _whole(configured_model(config, tokenizer), f"it cannot be built without values ({error})")
    _compute_attributes(model, deferred)
    recorded = _bytes(model, deferred.holds)
    computed = _bytes(model, lambda tensor: tensor.numel() >= _SMALLEST and not deferred.holds(tensor))
    if computed > recorded:
        _replace(model, lambda tensor: deferred.value(tensor) if deferred.holds(tensor) else tensor)
        return _whole(model, "its weights are not in safetensors files")
    small = {name: tensor for name, tensor in _named(model) if not deferred.holds(tensor)}
    _replace(model, lambda tensor: tensor if deferred.holds(tensor) else tensor.to("meta"))
    # The tensors are taken now: engines replace those of the model before they ask for the first value.
    return model, _values([*_named(model)], small, deferred)


def _values(
    named: list[tuple[str, Tensor]], small: dict[str, Tensor], deferred: Deferred
) -> Iterator[tuple[str, Tensor]]:
    for name, tensor in named:
        yield name, small.pop(name) if name in small else deferred.value(tensor)


def _whole(model: Any, reason: str) -> tuple[Any, None]:
    logger.warning("every rank loads the whole model: %s", reason)
    return model, None


def _named(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Parameters and buffers by their first names, tied ones once."""
    yield from chain(model.named_parameters(), model.named_buffers())


def _bytes(model: nn.Module, which: Callable[[Tensor], bool]) -> int:
    return sum(tensor.nbytes for _, tensor in _named(model) if which(tensor))


def _replace(model: nn.Module, new: Callable[[Tensor], Tensor]) -> None:
    """Put other tensors in the place of a model's, with what is tied kept tied."""
    made: dict[Tensor, Tensor] = {}
    for module in model.modules():
        for tensors in (module._parameters, module._buffers):
            for name, tensor in tensors.items():
                if tensor is None:
                    continue
                if tensor not in made:
                    other = new(tensor.detach())
                    is_parameter = isinstance(tensor, nn.Parameter)
                    made[tensor] = nn.Parameter(other, tensor.requires_grad) if is_parameter else other
                tensors[name] = made[tensor]


def _compute_attributes(model: nn.Module, deferred: Deferred) -> None:
    """Give tensors that modules keep beside their parameters and buffers their values."""
    for module in model.modules():
        for name, value in vars(module).items():
            if isinstance(value, Tensor) and deferred.holds(value):
                setattr(module, name, deferred.value(value))
            elif isinstance(value, dict) and not name.startswith("_"):
                value.update({k: deferred.value(v) for k, v in value.items() if _recorded(v, deferred)})


def _recorded(value: Any, deferred: Deferred) -> bool:
    return isinstance(value, Tensor) and deferred.holds(value)


def _for_want_of_values(error: BaseException | None) -> bool:
    """Whether an error comes from a tensor on the meta device."""
    while error is not None:
        # What torch raises for an operator that needs values, and what others say of it in their own words.
        if isinstance(error, NotImplementedError) or _ABOUT_META.search(str(error)):
            return True
        error = error.__cause__ or error.__context__
    return False
