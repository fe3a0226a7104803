"""Tiny models, their data and their training, for the ranks of a test and for its reference alike."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import partial

import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

import framework
from framework.extras import shards_bytes
from framework.models.wrapping import unwrapped
from framework.retention import apply_checkpointing, compiled
from framework.selection import select, supervised_positions
from framework.sharding.fsdp import FsdpEngine
from framework.training.loss import exact_loss
from framework.training.optimizer import StochasticAdamW

STEPS, MICRO_BATCHES, TOKENS = 3, 4, 12
CLIP, RATE = 0.25, 0.01


@dataclass(frozen=True)
class Case:
    """A model, how it is trained, and the engine's options.

    `rank` is LoRA's, 0 for full training; `bytes` puts frozen uint8 weights into the blocks, where FSDP2 takes such;
    `sometimes` a parameter that only some micro-batches use.
    """

    policy: str = "all"
    kv_format: str = "model"
    retain_linears: bool = True
    placement: str = "device"
    compile: bool = False
    tied: bool = False
    rank: int = 0
    bytes: bool = False
    sometimes: bool = False
    precision: str = "fp32"
    reshard_after_forward: bool = True
    replicas: int = 1
    offload: bool = False
    on_meta: bool = False
    loss_scale: float | None = None


CASES = {
    "all": Case(),
    "checkpoint": Case("checkpoint", tied=True),
    "selective": Case("selective"),
    "recomputed": Case("selective", retain_linears=False, tied=True, reshard_after_forward=False),
    "int8": Case("selective", kv_format="int8"),
    "on the host": Case("selective", placement="host"),
    "compiled": Case("selective", retain_linears=False, compile=True),
    "lora": Case(rank=1),
    "lora selective": Case("selective", rank=3, tied=True),
    "bytes": Case("checkpoint", rank=1, tied=True, bytes=True),
    "offload": Case("selective", offload=True),
    "sometimes": Case(sometimes=True),
    "meta all": Case(on_meta=True),
    "meta bytes": Case("checkpoint", rank=1, tied=True, bytes=True, on_meta=True),
}
PRECISIONS = {
    "fp32_master": Case("selective", precision="fp32_master"),
    "fp32_master lora": Case(rank=1, bytes=True, precision="fp32_master"),
    "pure_bf16": Case("selective", precision="pure_bf16"),
    "pure_bf16 lora": Case("checkpoint", rank=1, precision="pure_bf16"),
    "fp16": Case("selective", precision="fp16"),
    "fp16 lora": Case("checkpoint", rank=1, bytes=True, precision="fp16", loss_scale=1024.0),
}
HYBRID = {
    "hybrid": Case("selective", tied=True, replicas=2),
    "replicated": Case(rank=3, replicas=4),
}


class ByteLinear(nn.Module):
    """A linear with frozen weights of one byte each, as quantised ones are."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        weight = torch.randint(0, 256, (outputs, inputs), dtype=torch.uint8)
        self.weight = nn.Parameter(weight, requires_grad=False)

    def forward(self, x):
        return x @ ((self.weight.to(x.dtype) - 127.5) / 1000).T


class Sometimes(nn.Module):
    """A scale that only long sequences are given."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(32))

    def forward(self, x):
        return x * self.scale if x.shape[1] == TOKENS else x


def model_of(case: Case, seed: int = 0) -> nn.Module:
    """47 and 67 do not divide by the number of ranks."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=67,
        hidden_size=32,
        intermediate_size=47,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=case.tied,
        max_position_embeddings=TOKENS,
    )
    model = LlamaForCausalLM(config)
    if case.bytes and shards_bytes():
        for layer in model.model.layers:
            layer.mlp.down_proj = ByteLinear(47, 32)
    if case.sometimes:
        norm = model.model.layers[0].input_layernorm
        model.model.layers[0].input_layernorm = nn.Sequential(norm, Sometimes())
    if case.precision == "pure_bf16":
        model.to(torch.bfloat16)
    if case.rank:
        lora = LoraConfig(r=case.rank, target_modules=["q_proj", "v_proj", "up_proj"])
        model = get_peft_model(model, lora, autocast_adapter_dtype=case.precision != "pure_bf16")
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "lora_B" in name:
                    parameter.normal_(std=0.1)
    return model.train()


def emptied(model: nn.Module) -> list[tuple[str, torch.Tensor]]:
    """Move a model to the meta device; what it held, by name."""
    held = [(name, tensor.detach().clone()) for name, tensor in (*model.named_parameters(), *model.named_buffers())]
    model.to("meta")
    unwrapped(model).tie_weights()
    return held


def retain(model: nn.Module, case: Case) -> None:
    """Apply the retention policy."""
    if case.policy == "checkpoint":
        apply_checkpointing(unwrapped(model))
    elif case.policy == "selective":
        options = {"retain_linears": case.retain_linears, "kv_format": case.kv_format, "placement": case.placement}
        # Without generated code: hooks are what sharding adds.
        compiled.BACKEND = "eager"
        framework.enable_token_selection(model, **options, fused_loss=True, compile=case.compile)


def windows(first: int = 0, last: int = STEPS, size: int = MICRO_BATCHES):
    """Micro-batches of steps `first … last - 1`. Every second one is shorter; the first of all has no labels."""
    for step in range(first, last):
        generator = torch.Generator().manual_seed(step)
        window = []
        for index in range(size):
            ids = torch.randint(67, (2, TOKENS - 2 * (index % 2)), generator=generator)
            keep = torch.rand(ids.shape, generator=generator) < 0.4
            if step == index == 0:
                keep[:] = False
            window.append({"input_ids": ids, "labels": ids.where(keep, torch.full_like(ids, -100))})
        yield window


def loss_of(model: nn.Module, case: Case, inputs, count: int):
    """A micro-batch's share of the window's loss."""
    if case.policy != "selective":
        return exact_loss(model, inputs, count)
    supervised = supervised_positions(inputs["labels"], causal=True)
    documents = torch.arange(len(supervised))[:, None].expand_as(supervised)
    options = {"strategy": "supervised", "ratio": "labelled", "seed": 0, "tokentune": False}
    selection = select(supervised=supervised, documents=documents, **options)
    with framework.fixed_selection(model, selection):
        return model(**inputs, num_items_in_batch=count).loss


def labels_in(window) -> int:
    return sum(int(supervised_positions(inputs["labels"], causal=True).sum()) for inputs in window)


def groups_of(model: nn.Module):
    """Two groups: matrices decay, the others learn faster."""
    trained = [p for p in model.parameters() if p.requires_grad]
    matrices = [p for p in trained if p.dim() > 1]
    rest = [p for p in trained if p.dim() < 2]
    groups = [
        {"params": matrices, "weight_decay": 0.1},
        {"params": rest, "weight_decay": 0.0, "learning_rate_scale": 2.0},
    ]
    return [group for group in groups if group["params"]]


def optimizer_of(case: Case, model: nn.Module, fused: bool = True) -> torch.optim.Optimizer:
    options = {"lr": 1.0, "betas": (0.9, 0.95), "eps": 1e-3}
    if case.precision == "pure_bf16":
        return StochasticAdamW(groups_of(model), seed=0, **options)
    return torch.optim.AdamW(groups_of(model), fused=fused, **options)


def engine_of(case: Case, ranks, model: nn.Module | None = None, build=None) -> FsdpEngine:
    """An engine that holds the case's model, from the meta device if the case says so."""
    engine = FsdpEngine(
        case.precision,
        ranks,
        reshard_after_forward=case.reshard_after_forward,
        replicas=case.replicas,
        offload=case.offload,
        loss_scale=case.loss_scale,
        device=torch.device("cpu"),
    )
    model = model_of(case) if model is None else model
    initial = emptied(model) if case.on_meta else None
    retain(model, case)
    engine.prepare(model, build or partial(optimizer_of, case), initial)
    return engine


def train(engine: FsdpEngine, case: Case, ranks, data=None, factor: float = 1.0, clip: float | None = CLIP):
    """The results of steps on this rank's micro-batches; losses are multiplied with `factor` on the last rank."""
    results = []
    factor = factor if ranks.rank == ranks.world_size - 1 else 1.0
    for window in data or windows():
        total, count = torch.zeros(()), labels_in(window)
        for inputs in window[ranks.rank :: ranks.world_size]:
            with engine.autocast():
                loss = loss_of(engine.model, case, inputs, count) * factor
            engine.backward(loss)
            total += loss.detach()
        results.append(engine.step(loss=total, max_grad_norm=clip, learning_rate=RATE))
    return results


def reference(case: Case, data=None, model: nn.Module | None = None):
    """The same in one process, by torch's clipping and AdamW: losses, norms, final parameters by name."""
    model = model_of(case) if model is None else model
    retain(model, case)
    optimizer = optimizer_of(replace(case, precision="fp32"), model, fused=False)
    losses, norms = [], []
    for window in data or windows():
        count = labels_in(window)
        total = 0.0
        for inputs in window:
            loss = loss_of(model, case, inputs, count)
            loss.backward()
            total += loss.item()
        norms.append(nn.utils.clip_grad_norm_(model.parameters(), CLIP).item())
        for group in optimizer.param_groups:
            group["lr"] = RATE * group.get("learning_rate_scale", 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(total)
    return losses, norms, {name: p.detach() for name, p in model.named_parameters()}


def fragments(source):
    """Fragments as they can be written to a file."""
    return [(f.name, f.shape, f.start, f.values.detach().clone()) for f in source]


def held_bytes(tensors) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


class Memory:
    """Stored tensors in memory, put together from the fragments of all ranks."""

    def __init__(self, parts) -> None:
        self.tensors: dict[str, torch.Tensor] = {}
        times: dict[str, torch.Tensor] = {}
        for name, shape, start, values in parts:
            if name not in self.tensors:
                self.tensors[name] = torch.zeros(shape, dtype=values.dtype)
                times[name] = torch.zeros(math.prod(shape), dtype=torch.int64)
            assert self.tensors[name].shape == shape and values.numel() > 0
            self.tensors[name].view(-1)[start : start + len(values)] = values
            times[name][start : start + len(values)] += 1
        self.covered_once = all(bool((count == 1).all()) for count in times.values())

    def names(self):
        return iter(self.tensors)

    def shape(self, name):
        return tuple(self.tensors[name].shape)

    def dtype(self, name):
        return self.tensors[name].dtype

    def read(self, name, start=0, count=None):
        flat = self.tensors[name].view(-1)
        return flat[start:] if count is None else flat[start : start + count]
