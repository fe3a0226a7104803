"""The linear layer that makes logits, and apart from it what a model does to them afterwards.

Soft caps, scales and casts stand in the modelling file, between the layer's call and the logits that the model returns.
They are run by themselves as the model's own forward pass over stand-ins for its modules: none of these is called, so
that no hook of a sharding engine runs, however often it is done.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from peft.utils import ModulesToSaveWrapper
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.utils import ModelOutput

from framework.retention.blocks import backbone_of, outside_blocks


class OutputLayer:
    """A model's last linear layer, inside of whose call the loss can be taken.

    Attributes:
        linear: the layer.
    """

    def __init__(self, model: PreTrainedModel, linear: nn.Linear, name: str) -> None:
        """See `output_layer_of`.

        Args:
            model: the Hugging Face model with its head.
            linear: the layer, or the copy of it that PEFT trains.
            name: of the layer, or of what holds its copy.
        """
        self.linear = linear
        self._model = model
        self._chain = backbone_of(model).chain
        *holders, self._last = name.split(".")
        # The model, and what else a forward pass enters on its way to the layer.
        self._holders: list[nn.Module] = [model]
        for holder in holders:
            self._holders.append(self._holders[-1].get_submodule(holder))

    def after(self, raw: Tensor) -> Tensor:
        """The model's logits for what the layer gives, `[1, rows, classes]` both; the same tensor if nothing follows.

        With a graph if gradients are on.
        """
        return self._run(_Layer(self.linear, raw))

    def stands_alone(self) -> bool:
        """Whether the model calls the layer once, and makes its logits of nothing else that is trained."""
        own = {id(parameter) for parameter in self.linear.parameters()}
        others = (parameter for holder in self._holders for parameter in holder.parameters(recurse=False))
        if not all(id(parameter) in own for parameter in others):
            return False
        weight = self.linear.weight
        raw = torch.zeros(1, 1, self.linear.out_features, dtype=weight.dtype, device=weight.device, requires_grad=True)
        layer = _Layer(self.linear, raw)
        try:
            with torch.enable_grad():
                logits = self._run(layer)
        except Exception:
            # A modelling file may do anything with its modules, and what it does is no error without stand-ins.
            return False
        return layer.calls == 1 and logits.requires_grad and logits.shape[:-1] == raw.shape[:-1]

    def _run(self, layer: _Layer) -> Tensor:
        raw = layer.raw
        hidden = torch.zeros(*raw.shape[:-1], self.linear.in_features, dtype=raw.dtype, device=raw.device)
        ids = torch.zeros(raw.shape[:-1], dtype=torch.int64, device=raw.device)
        with self._stand_ins(layer, hidden):
            # The class's: what token selection or a trainer puts in its place makes a loss.
            output = type(self._model).forward(self._model, input_ids=ids)
        logits: Tensor = output[0] if isinstance(output, tuple) else output.logits
        return logits

    @contextmanager
    def _stand_ins(self, layer: _Layer, hidden: Tensor) -> Iterator[None]:
        """Within this context the model calls no module of its own."""
        with ExitStack() as stack:
            for holder, below in zip(self._holders, [*self._holders[1:], None], strict=True):
                children: dict[str, Any] = {}
                for name, child in holder._modules.items():
                    if child is below and below is not None:
                        children[name] = _Holder(below)
                    elif below is None and name == self._last:
                        children[name] = layer
                    elif child in self._chain:
                        children[name] = _Backbone(self._chain, child, hidden)
                    else:
                        children[name] = _pass
                stack.enter_context(_replaced(holder, children))
            yield


def output_layer_of(model: PreTrainedModel) -> OutputLayer | None:
    """The layer that makes a model's logits, if the loss can be taken inside of its call; else None.

    It must be a plain `nn.Linear`, or one that PEFT trains a copy of, which the model calls once and whose logits meet
    no other parameter afterwards. So quantised ones, those with an adapter, and a few families' (ESM adds a bias,
    MobileBERT never calls it) are none. The answer is the same on every rank.

    Args:
        model: with its head (not a PEFT wrapper).
    """
    top = linear = model.get_output_embeddings()
    if isinstance(top, ModulesToSaveWrapper):
        trained = top.active_adapters and not top.disable_adapters
        linear = top.modules_to_save[top.active_adapters[0]] if trained else None
    # Whatever has a forward of its own does something else than the product.
    if not isinstance(linear, nn.Linear) or type(linear).forward is not nn.Linear.forward or "forward" in vars(linear):
        return None
    name = next(name for name, module in outside_blocks(model) if module is top)
    layer = OutputLayer(model, linear, name)
    return layer if layer.stands_alone() else None


class _Layer:
    """Stands for the layer."""

    def __init__(self, linear: nn.Linear, raw: Tensor) -> None:
        self.linear, self.raw, self.calls = linear, raw, 0

    def __call__(self, *_: Any, **__: Any) -> Tensor:
        self.calls += 1
        return self.raw

    def __getattr__(self, name: str) -> Any:
        # Some models look up the weight's dtype.
        return getattr(self.linear, name)


class _Holder:
    """Stands for a module on the way to the layer: its forward without its hooks."""

    def __init__(self, module: nn.Module) -> None:
        self._module = module

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return type(self._module).forward(self._module, *args, **kwargs)


class _Backbone:
    """Stands for the backbone, or for a part of it that the model calls in its place."""

    def __init__(self, chain: tuple[nn.Module, ...], module: nn.Module, hidden: Tensor) -> None:
        self._chain, self._module, self._hidden = chain, module, hidden

    def __call__(self, *_: Any, **__: Any) -> _BackboneOutput:
        return _BackboneOutput(last_hidden_state=self._hidden)

    def __getattr__(self, name: str) -> Any:
        value = getattr(self._module, name)
        return _Backbone(self._chain, value, self._hidden) if isinstance(value, nn.Module) else value


@dataclass
class _BackboneOutput(ModelOutput):
    """Has hidden states, and None for whatever else a family's output has."""

    last_hidden_state: Tensor | None = None

    def __getattr__(self, name: str) -> None:
        if name.startswith("__"):
            raise AttributeError(name)


def _pass(hidden: Tensor, *_: Any, **__: Any) -> Tensor:
    """Stands for modules whose results come before the layer, and do not matter."""
    return hidden


@contextmanager
def _replaced(module: nn.Module, children: dict[str, Any]) -> Iterator[None]:
    """Within this context a module has these in place of its children."""
    plain = dict(module._modules)
    module._modules.update(children)
    try:
        yield
    finally:
        module._modules.update(plain)
