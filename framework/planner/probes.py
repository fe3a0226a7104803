"""What calibration measures, one function a figure."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch.nn.functional import scaled_dot_product_attention

from framework.hardware import Device
from framework.planner.profile import FEW_ROWS
from framework.planner.stopwatch import Stopwatch
from framework.planner.work import KERNELS_OF_A_BLOCK
from framework.sharding.ranks import Ranks

MIB = 2**20

BLOCKS = 8
"""Of the model whose operators are timed; what is outside of them counts as theirs."""

ATTENTION_PRODUCTS = 7
"""Of a pair of a query and a key: two forward; backward four, and the scores once more (arXiv 2307.08691, 2.3.2)."""


TIMED_BLOCKS = 4
"""Of the model whose operators that are bound by memory are timed."""


class BlockTime(NamedTuple):
    """Of blocks' forward and backward pass.

    Attributes:
        seconds: that they take.
        products: floating-point operations of products with weights.
        attention: floating-point operations of attention, of all pairs.
        elements: rows between blocks, in elements of all blocks.
    """

    seconds: float
    products: int
    attention: int
    elements: int


def dtypes_of(device: torch.device, kind: Device) -> list[str]:
    """The dtypes whose products are measured, by the names of `Profile.matrix_efficiency`."""
    if device.type == "cpu":
        return ["float32", "bfloat16", "float16"]
    return ["bfloat16"] * kind.bfloat16 + ["float16", "float32"] + ["tf32"] * (kind.tf32 is not None)


def peak_of(kind: Device, dtype: str) -> float:
    """The device's peak rate of products in a dtype of `dtypes_of`."""
    rate = kind.peak("float32", tf32=True) if dtype == "tf32" else kind.peak(dtype)
    assert rate is not None
    return rate


def large_product_rate(watch: Stopwatch, dtype: str) -> tuple[int, float]:
    """Edge of the largest square matrices whose product fits the limit, and its floating-point operations a second."""
    found = (0, 0.0)
    for edge in (2048, 4096, 8192) if watch.device.type == "cuda" else (256, 512, 1024, 2048):
        seconds = _product_seconds(watch, dtype, edge, edge)
        found = (edge, 2 * edge**3 / seconds)
        if 8 * seconds > watch.limit:
            break
    return found


def few_rows_rate(watch: Stopwatch, dtype: str) -> float:
    """Floating-point operations a second of `FEW_ROWS` rows times a square weight."""
    edge = 4096 if watch.device.type == "cuda" else 512
    return 2 * FEW_ROWS * edge**2 / _product_seconds(watch, dtype, FEW_ROWS, edge)


def attention_rate(watch: Stopwatch, dtype: str, *, masked: bool) -> float:
    """Floating-point operations a second of causal attention, forward and backward.

    Args:
        watch: to time with.
        dtype: that it computes in.
        masked: by a mask of bools, as padded and packed rows have; then operations of all pairs count.
    """
    heads, length, size = (16, 4096, 128) if watch.device.type == "cuda" else (4, 512, 64)
    shape = (1, heads, length, size)
    kind = getattr(torch, dtype)
    query, key, value = (
        torch.randn(shape, device=watch.device, dtype=kind, requires_grad=True) for _ in range(3)
    )  # each [batch, heads, length, size]
    gradient = torch.randn(shape, device=watch.device, dtype=kind)
    mask = torch.ones(1, 1, length, length, dtype=torch.bool, device=watch.device).tril() if masked else None

    def step() -> None:
        output = scaled_dot_product_attention(query, key, value, mask, is_causal=not masked)
        torch.autograd.grad(output, (query, key, value), gradient)

    pairs = heads * length * (2 * length if masked else length + 1) // 2
    return ATTENTION_PRODUCTS * 2 * size * pairs / watch.seconds(step)


def elementwise_rate(watch: Stopwatch) -> float:
    """Bytes a second that an elementwise kernel reads and writes."""
    size = (256 if watch.device.type == "cuda" else 32) * MIB
    one, other, result = (torch.ones(size // 4, device=watch.device) for _ in range(3))
    return 3 * size / watch.seconds(lambda: torch.add(one, other, out=result))


def block_operators(watch: Stopwatch, dtype: str) -> BlockTime:
    """Times Llama blocks on a padded row, forward and backward."""
    from transformers import LlamaConfig, LlamaModel

    heads, size, length = (16, 128, 4096) if watch.device.type == "cuda" else (4, 32, 128)
    width = heads * size
    config = LlamaConfig(
        hidden_size=width,
        intermediate_size=7 * width // 2,
        num_hidden_layers=TIMED_BLOCKS,
        num_attention_heads=heads,
        num_key_value_heads=heads // 4,
        vocab_size=64,
        use_cache=False,
    )
    with _seeded(watch.device):
        model: torch.nn.Module = LlamaModel(config)
        model.to(watch.device, getattr(torch, dtype))
        rows = torch.randn(1, length, width, device=watch.device).to(getattr(torch, dtype))
    mask = torch.ones(1, length, dtype=torch.int64, device=watch.device)
    mask[0, -1] = 0
    weights = [p for name, p in model.named_parameters() if name.startswith("layers.") and p.dim() == 2]

    def step() -> None:
        output = model(inputs_embeds=rows, attention_mask=mask).last_hidden_state
        torch.autograd.grad(output, weights, output.detach())

    return BlockTime(
        seconds=watch.seconds(step),
        products=6 * length * sum(map(torch.numel, weights)),
        attention=ATTENTION_PRODUCTS * 2 * TIMED_BLOCKS * width * length**2,
        elements=TIMED_BLOCKS * length * width,
    )


def kernel_seconds(watch: Stopwatch) -> float:
    """Seconds of one operator of a forward pass whose tensors are so small that only issuing it takes time."""
    from transformers import LlamaConfig, LlamaModel

    config = LlamaConfig(
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=BLOCKS,
        num_attention_heads=2,
        num_key_value_heads=2,
        vocab_size=64,
    )
    with _seeded(watch.device):
        model: torch.nn.Module = LlamaModel(config)
        model.to(watch.device)
    input_ids = torch.ones(1, 8, dtype=torch.int64, device=watch.device)
    seconds = watch.seconds(lambda: model(input_ids=input_ids, use_cache=False))
    return seconds / (BLOCKS * KERNELS_OF_A_BLOCK)


def host_copy_rates(watch: Stopwatch) -> tuple[float, float]:
    """Bytes a second of copies from the host and to it; without an accelerator, within the host's memory."""
    cuda = watch.device.type == "cuda"
    size = (256 if cuda else 32) * MIB
    host = torch.ones(size // 4, pin_memory=cuda)
    device = torch.ones(size // 4, device=watch.device)
    to_device = size / watch.seconds(lambda: device.copy_(host, non_blocking=True))
    return to_device, size / watch.seconds(lambda: host.copy_(device, non_blocking=True))


def collective_rates(watch: Stopwatch, ranks: Ranks) -> tuple[float, float]:
    """Bytes a second of all-gather and reduce-scatter, as `Profile.all_gather` and `reduce_scatter` count them."""
    part = (64 if watch.device.type == "cuda" else 4) * MIB
    one = torch.ones(part // 4, device=watch.device)
    whole = torch.ones(ranks.world_size * part // 4, device=watch.device)
    moved = (ranks.world_size - 1) * part
    gather = watch.seconds(lambda: dist.all_gather_into_tensor(whole, one), ranks)
    return moved / gather, moved / watch.seconds(lambda: dist.reduce_scatter_tensor(one, whole), ranks)


def allocated_workspace(device: torch.device) -> int:
    """Bytes that stay allocated after a product's forward and backward pass; 0 if this process has made some before."""
    before = torch.cuda.memory_allocated(device)
    weight = torch.ones(256, 256, device=device, requires_grad=True)
    torch.autograd.backward((weight @ weight).sum())
    del weight
    torch.cuda.synchronize(device)
    return torch.cuda.memory_allocated(device) - before


def bytes_outside(device: torch.device) -> int:
    """Device memory in use that is not the allocator's: this process's context, and whatever others have."""
    free, total = torch.cuda.mem_get_info(device)
    return total - free - torch.cuda.memory_reserved(device)


def reserved_ratio(device: torch.device, dtype: str) -> float:
    """Peak of reserved / peak of allocated bytes of a few training steps, ordinary and token-selective; the larger."""
    ratios = []
    for selective in (False, True):
        gc.collect()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
        train_probe(device, dtype, selective=selective)
        ratios.append(torch.cuda.max_memory_reserved(device) / torch.cuda.max_memory_allocated(device))
    gc.collect()
    torch.cuda.empty_cache()
    return max(ratios)


def train_probe(
    device: torch.device,
    dtype: str,
    *,
    selective: bool,
    width: int = 1024,
    blocks: int = 8,
    vocabulary: int = 32000,
    length: int = 1024,
    batch: int = 4,
    steps: int = 3,
) -> list[float]:
    """Train a random model for some steps, with a quarter of the tokens labelled.

    Returns:
        The loss of each step.
    """
    from transformers import LlamaConfig, LlamaForCausalLM

    from framework.token_selection import enable_token_selection

    config = LlamaConfig(
        hidden_size=width,
        intermediate_size=3 * width,
        num_hidden_layers=blocks,
        num_attention_heads=width // 64,
        num_key_value_heads=width // 64,
        vocab_size=vocabulary,
        use_cache=False,
    )
    with _seeded(device):
        model: torch.nn.Module = LlamaForCausalLM(config)
        model.to(device, getattr(torch, dtype))
        input_ids = torch.randint(vocabulary, (batch, length), device=device)
    labels = input_ids.clone()
    labels[:, : 3 * length // 4] = -100
    if selective:
        enable_token_selection(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5)
    losses = []
    for _ in range(steps):
        loss = model(input_ids=input_ids, labels=labels).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def _product_seconds(watch: Stopwatch, dtype: str, rows: int, edge: int) -> float:
    """Of `rows` x `edge` times `edge` x `edge`; with random numbers, as zeros need less power and run faster."""
    kind = torch.float32 if dtype == "tf32" else getattr(torch, dtype)
    with _precision("high" if dtype == "tf32" else "highest"):
        inputs = torch.randn(rows, edge, device=watch.device).to(kind)
        weight = torch.randn(edge, edge, device=watch.device).to(kind)
        return watch.seconds(lambda: inputs @ weight)


@contextmanager
def _precision(value: str) -> Iterator[None]:
    """Within this context float32 products have that precision."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(value)
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


@contextmanager
def _seeded(device: torch.device) -> Iterator[None]:
    """Within this context random numbers are the same on every call; afterwards they go on as before."""
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.manual_seed(0)
        yield
