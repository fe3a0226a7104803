"""NF4: the frozen linear layers of the blocks in 4 bits, as QLoRA holds them (arXiv 2305.14314, section 3).

A matrix is cut into blocks of 64 elements in row-major order. An element is a 4-bit code, a quantile of the normal
distribution times its block's largest magnitude. These magnitudes, less their mean over the matrix, are held in 8 bits
in groups of 256 with a float32 scale each (double quantisation). An element takes
`4 + 8 / 64 + 32 / (64 * 256) = 4.127` bits. Values and kernels are those of bitsandbytes' `Linear4bit` with
`compress_statistics`; what holds them is not: its `Params4bit` keeps what it needs beside the tensor in Python, where
engines that shard parameters do not look. Here everything is an ordinary frozen parameter of bytes, whose first
dimension can be sharded and which a change of the model's dtype leaves alone.

Position among the transforms: after the base model's weights are loaded and tokens added, before the adapter.
"""

from __future__ import annotations

import functools
import logging
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from framework.errors import UserError
from framework.extras import bitsandbytes
from framework.retention.blocks import blocks_of
from framework.retention.linears import PackedLinear

logger = logging.getLogger(__name__)

BLOCK = 64
"""Elements of a matrix with a common magnitude."""
GROUP = 256
"""Magnitudes with a common scale."""

# Elements quantised at once: bounds the temporaries of bitsandbytes to a few times 64 MiB.
_SLAB = 1 << 24
_KERNEL_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# What the families call their numbers of experts, and the layers that choose among these.
_EXPERT_COUNTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
_GATE_WORDS = ("gate", "router", "classifier")
_LISTED_NAMES = 5


class Packed(NamedTuple):
    """A matrix in NF4: three uint8 tensors."""

    weight: Tensor
    """`[elements / 64, 32]`: a block a row, two codes a byte, the first in the upper half."""
    absmax: Tensor
    """`[elements / 64]`: the blocks' largest magnitudes in 8 bits."""
    scales: Tensor
    """`[groups + 1, 4]`: the bytes of float32 numbers, the groups' scales and the mean of the magnitudes."""


def packed_bytes(elements: int) -> int:
    """Bytes of a matrix in NF4.

    Args:
        elements: of the matrix, a multiple of `BLOCK`.
    """
    blocks = elements // BLOCK
    return elements // 2 + blocks + 4 * (-(-blocks // GROUP) + 1)


def pack(matrix: Tensor) -> Packed:
    """Quantise a matrix.

    Args:
        matrix: of any float dtype and shape, with a multiple of `BLOCK` elements; on the meta device only shapes count.

    Returns:
        Tensors on the device of `matrix`.
    """
    blocks = matrix.numel() // BLOCK
    if matrix.is_meta:
        shapes = ((blocks, BLOCK // 2), (blocks,), (-(-blocks // GROUP) + 1, 4))
        return Packed(*(torch.empty(shape, dtype=torch.uint8, device="meta") for shape in shapes))
    kernels = bitsandbytes().functional
    weight = torch.empty(blocks, BLOCK // 2, dtype=torch.uint8, device=matrix.device)
    magnitudes = torch.empty(blocks, dtype=torch.float32, device=matrix.device)
    slabs = zip(*(tensor.split(_SLAB // BLOCK) for tensor in (weight, magnitudes)), strict=True)
    elements = matrix.detach().reshape(-1).split(_SLAB)
    for slab, (codes, largest) in zip(elements, slabs, strict=True):
        quantised, state = kernels.quantize_4bit(slab.float(), blocksize=BLOCK, quant_type="nf4")
        codes.copy_(quantised.view_as(codes))
        largest.copy_(state.absmax)
    mean = magnitudes.mean()
    absmax, state = kernels.quantize_blockwise(magnitudes - mean, blocksize=GROUP)
    scales = torch.cat((state.absmax, mean.view(1))).view(torch.uint8).view(-1, 4)
    return Packed(weight, absmax, scales)


def unpack(packed: Packed, shape: tuple[int, int], dtype: torch.dtype) -> Tensor:
    """The matrix that `packed` holds.

    Args:
        packed: see `pack`.
        shape: of the matrix.
        dtype: of the result; float64 is computed in float32.
    """
    kernels = bitsandbytes().functional
    # A copy, because what an engine gathers may begin at any byte.
    scales = packed.scales.detach().clone().view(torch.float32).view(-1)
    groups = kernels.QuantState(
        absmax=scales[:-1], code=_magnitude_codes(scales.device), blocksize=GROUP, dtype=torch.float32
    )
    state = kernels.QuantState(
        absmax=packed.absmax.detach(),
        shape=torch.Size(shape),
        blocksize=BLOCK,
        quant_type="nf4",
        dtype=dtype if dtype in _KERNEL_DTYPES else torch.float32,
        offset=scales[-1],
        state2=groups,
    )
    # Not a single row, which bitsandbytes takes for a transposed matrix.
    return kernels.dequantize_4bit(packed.weight.detach().view(-1, 1), state).to(dtype)


@functools.cache
def _magnitude_codes(device: torch.device) -> Tensor:
    """The values of 8-bit codes, float32 `[256]`."""
    return bitsandbytes().functional.create_dynamic_map().to(device)


class NF4Linear(PackedLinear):
    """A frozen linear layer in NF4; the bias stays as it is.

    Args:
        linear: the layer that it takes the place of.
        packed: its matrix.
    """

    def __init__(self, linear: nn.Linear, packed: Packed) -> None:
        super().__init__(linear.in_features, linear.out_features, bias=False, device="meta")
        self.weight, self.absmax, self.scales = (nn.Parameter(tensor, requires_grad=False) for tensor in packed)
        self.bias = linear.bias
        self.train(linear.training)

    def matrix(self, dtype: torch.dtype) -> Tensor:
        """The matrix `[out_features, in_features]`, made anew by every call."""
        return unpack(Packed(self.weight, self.absmax, self.scales), (self.out_features, self.in_features), dtype)

    def forward(self, input: Tensor) -> Tensor:
        """`input [..., in_features]` to `[..., out_features]`."""
        if not input.is_floating_point():
            raise UserError(
                'model.quantization: "nf4" does not go with this family, which converts what a linear layer gets to '
                "the dtype of its weight; leave it out"
            )
        return super().forward(input)

    @property
    def elements(self) -> int:
        """Of the matrix."""
        return self.in_features * self.out_features


def quantize(model: PreTrainedModel) -> None:
    """Hold the linear layers of the model's blocks in NF4, in place, one after the other.

    Left as they are: all outside of the blocks, such as embeddings and heads; layers that choose among experts, or that
    the family keeps in float32; and what is no `nn.Linear`: stacked experts, GPT-2's transposed layers. A line in the
    log says what share of the blocks' matrices that is.

    Args:
        model: the base model; on the meta device its layers get empty parameters of the right shapes.

    Raises:
        UserError: there is nothing to quantise.
    """
    names = quantizable(model)
    if not names:
        raise UserError(
            f'model.quantization: "nf4" finds no linear layer in the blocks of {model.config.model_type}, whose '
            "matrices are held in another way; leave it out"
        )
    _report_rest(model, names)
    for name in names:
        parent, _, own = name.rpartition(".")
        linear = model.get_submodule(name)
        assert isinstance(linear, nn.Linear)
        setattr(model.get_submodule(parent), own, NF4Linear(linear, pack(linear.weight)))


def quantizable(model: PreTrainedModel) -> list[str]:
    """Full names of the layers that `quantize` replaces."""
    counts = {getattr(model.config.get_text_config(), name, None) for name in _EXPERT_COUNTS}
    kept = {*(model._keep_in_fp32_modules or ()), *(model._keep_in_fp32_modules_strict or ())}

    def stays(name: str, linear: nn.Linear) -> bool:
        own = name.rpartition(".")[2]
        is_gate = linear.out_features in counts and any(word in own for word in _GATE_WORDS)
        in_float32 = any(part in f"{name}.weight" for part in kept)
        return is_gate or in_float32 or linear.out_features == 1 or linear.weight.numel() % BLOCK != 0

    return [
        f"{block}.{name}"
        for block, module in blocks_of(model).items()
        for name, linear in module.named_modules()
        if type(linear) is nn.Linear and not stays(f"{block}.{name}", linear)
    ]


def quantized_elements(model: nn.Module) -> tuple[int, int]:
    """Elements of all matrices in NF4, and the bytes that hold them."""
    sizes = [module.elements for module in model.modules() if isinstance(module, NF4Linear)]
    return sum(sizes), sum(map(packed_bytes, sizes))


def _report_rest(model: PreTrainedModel, names: list[str]) -> None:
    """Say which matrices of the blocks stay in their dtype, and how much of all that is."""
    replaced = {f"{name}.weight" for name in names}
    matrices: dict[str, Any] = {
        f"{block}.{name}": parameter
        for block, module in blocks_of(model).items()
        for name, parameter in module.named_parameters()
        if parameter.dim() > 1
    }
    rest = {name: parameter.numel() for name, parameter in matrices.items() if name not in replaced}
    if rest:
        share = sum(rest.values()) / sum(parameter.numel() for parameter in matrices.values())
        kinds = [*dict.fromkeys(".".join(name.removesuffix(".weight").split(".")[-2:]) for name in rest)]
        listed = ", ".join(kinds[:_LISTED_NAMES]) + (" and others" if len(kinds) > _LISTED_NAMES else "")
        logger.warning(
            "model.quantization: %.1f%% of the blocks' weights stay in %s: %s",
            100 * share,
            str(model.dtype).removeprefix("torch."),
            listed,
        )
