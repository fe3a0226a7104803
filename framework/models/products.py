"""Matrix products of a model, counted from its modules: what floating-point operations are computed from.

A product with a matrix of m x n elements takes m * n multiply-adds a row, two floating-point operations each. Norms,
activations, embeddings, convolutions and state-space scans are left out, as everywhere in the field: PaLM
(arXiv 2204.02311, appendix B), Megatron-LM (arXiv 2205.05198, appendix A).

Adapters are counted by the linear layers and weight matrices that they hold, which is exact for LoRA. The others are
approximate: of gralora, oft, pvera, randlora, tinylora, unilora and vblora the matrices count as they are stored,
whatever products are made of them; those that keep bare parameters (ia3, hra, miss; boft, delora, fourierft, hira,
loha, lokr, shira and vera, among others) count none of their own.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from peft.utils import ModulesToSaveWrapper
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from framework.linear_names import retains
from framework.retention.linears import expert_paths, linear_paths


@dataclass(frozen=True)
class Products:
    """Multiply-adds that one row costs in a set of matrices.

    Attributes:
        forward: of all of them.
        trained: of those that receive a gradient.
    """

    forward: int = 0
    trained: int = 0

    def __add__(self, other: Products) -> Products:
        return Products(self.forward + other.forward, self.trained + other.trained)


class Reach(NamedTuple):
    """Which keys a query sees within its document; see `Attention`."""

    causal: bool = True
    window: int | None = None
    chunk: int | None = None


@dataclass(frozen=True)
class Attention:
    """The attention of a block.

    Attributes:
        heads: of the queries; grouped keys and values save memory, not products.
        key_size: elements of a head's query or key.
        value_size: elements of a head's value.
        causal: a query sees no key behind it.
        window: reach of a query, None for no limit. Causal: number of keys that it sees, itself included. Else: the
            largest distance of a key, in both directions.
        chunk: length of the pieces of a row beyond whose border no query sees; None for none.
    """

    heads: int
    key_size: int
    value_size: int
    causal: bool = True
    window: int | None = None
    chunk: int | None = None

    @property
    def reach(self) -> Reach:
        """What decides which pairs there are."""
        return Reach(self.causal, self.window, self.chunk)

    @property
    def pair(self) -> int:
        """Multiply-adds of a query-key pair, all heads: its score, and its share of the output."""
        return self.heads * (self.key_size + self.value_size)


class LinearLayer(NamedTuple):
    """A linear layer whose output can be retained.

    Attributes:
        path: within its block, see `framework.linear_names`.
        inputs: elements of a row that it is given.
        outputs: elements of a row that it gives.
    """

    path: str
    inputs: int
    outputs: int


@dataclass(frozen=True)
class BlockProducts:
    """One block.

    Attributes:
        name: its module's.
        products: of a row.
        attention: None for a block that mixes tokens in another way.
        differentiated: it or anything below it is trained, so that the backward pass goes through it.
        linears: those of the matrices whose outputs can be retained; the others are routers, and the experts that a row
            is routed to where these are not computed all together.
    """

    name: str
    products: Products
    attention: Attention | None
    differentiated: bool
    linears: tuple[LinearLayer, ...] = ()

    def retained(self, chosen: bool | Collection[str]) -> int:
        """Multiply-adds of a row in those linear layers that `retention.retain_linears` means."""
        return sum(each.inputs * each.outputs for each in self.linears if retains(chosen, each.path))


@dataclass(frozen=True)
class ModelProducts:
    """A whole model.

    Attributes:
        blocks: in order.
        body: matrices beside the blocks that every row passes.
        head: what makes logits out of the backbone's rows.
    """

    blocks: tuple[BlockProducts, ...]
    body: Products
    head: Products


def matrix_products(model: PreTrainedModel, blocks: Mapping[str, nn.Module]) -> ModelProducts:
    """Count a model of tokens, adapters included; its tensors may be on the meta device.

    Args:
        model: not sharded yet, nor token-selective; adapters in place, and what is frozen frozen.
        blocks: its blocks by name, in order.
    """
    config = model.config.get_text_config()
    inside = {id(module) for block in blocks.values() for module in block.modules()}
    backbone = model.base_model
    body_modules = {id(module) for module in backbone.modules()} - inside
    active = list(_active_modules(model))
    experts_per_token = getattr(config, "num_experts_per_tok", None) or 1

    def of(modules: Iterable[nn.Module]) -> Products:
        return sum((_products(module, experts_per_token) for module in modules), Products())

    differentiated = any(p.requires_grad for p in model.get_input_embeddings().parameters())
    counted = []
    for index, (name, block) in enumerate(blocks.items()):
        differentiated = differentiated or any(p.requires_grad for p in block.parameters())
        modules = list(_active_modules(block))
        paths = linear_paths(block)
        linears = [_linear(module, paths[module]) for module in modules if module in paths]
        for path, (module, matrix) in expert_paths(block).items():
            linears.append(_stacked(module, matrix, path, experts_per_token))
        attention = _attention(block, config, index)
        counted.append(BlockProducts(name, of(modules), attention, differentiated, tuple(linears)))
    return ModelProducts(
        blocks=tuple(counted),
        body=of(module for module in active if id(module) in body_modules),
        head=of(module for module in active if id(module) not in inside and id(module) not in body_modules),
    )


def _active_modules(module: nn.Module) -> Iterator[nn.Module]:
    """All modules that a forward pass calls: not the originals of those that PEFT trains a copy of."""
    yield module
    for name, child in module.named_children():
        if not (isinstance(module, ModulesToSaveWrapper) and name == "original_module"):
            yield from _active_modules(child)


def _linear(module: nn.Module, path: str) -> LinearLayer:
    if isinstance(module, Conv1D):
        return LinearLayer(path, *module.weight.shape)
    assert isinstance(module, nn.Linear)
    return LinearLayer(path, module.in_features, module.out_features)


def _stacked(module: nn.Module, matrix: str, path: str, experts_per_token: int) -> LinearLayer:
    """The experts that a row is sent to, as one layer."""
    _, outputs, inputs = getattr(module, matrix).shape
    if module.is_transposed:
        inputs, outputs = outputs, inputs
    return LinearLayer(path, inputs, experts_per_token * outputs)


def _products(module: nn.Module, experts_per_token: int) -> Products:
    """Of the module's own parameters."""
    if isinstance(module, nn.Linear):
        # A quantised weight has another shape than the matrix that it stands for.
        size = module.in_features * module.out_features
        return Products(size, size * module.weight.requires_grad)
    if isinstance(module, Conv1D):
        size = module.weight.numel()
        return Products(size, size * module.weight.requires_grad)
    if isinstance(module, nn.Embedding | nn.modules.conv._ConvNd):
        return Products()
    found = Products()
    for name, parameter in module.named_parameters(recurse=False):
        if parameter.dim() == 3:
            # Experts as transformers stacks them, [experts, …, …]; a row passes through some of them.
            size = parameter.numel() // parameter.shape[0] * experts_per_token
        elif parameter.dim() == 2 and name == "weight":
            # A router, [experts, hidden].
            size = parameter.numel()
        else:
            continue
        found += Products(size, size * parameter.requires_grad)
    return found


def _attention(block: nn.Module, config: Any, index: int) -> Attention | None:
    """What the block's attention module and the config say about it.

    `is_causal` is what transformers' attention functions read from every module that calls them.
    """
    module = next((module for module in block.modules() if hasattr(module, "is_causal")), None)
    if module is None:
        return None
    heads = config.num_attention_heads
    size = getattr(module, "head_dim", None) or getattr(config, "head_dim", None) or config.hidden_size // heads
    kind = (getattr(config, "layer_types", None) or {index: "sliding_attention"})[index]
    return Attention(
        heads=heads,
        key_size=getattr(module, "qk_head_dim", size),
        value_size=getattr(module, "v_head_dim", size),
        causal=module.is_causal,
        window=getattr(config, "sliding_window", None) or None if kind == "sliding_attention" else None,
        chunk=getattr(config, "attention_chunk_size", None) if kind == "chunked_attention" else None,
    )
