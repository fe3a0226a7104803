"""Terms of the closed forms against what a tracker counts of the operations that they describe."""

from __future__ import annotations

import contextlib
from dataclasses import replace
from functools import partial
from itertools import accumulate

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from torch.autograd.graph import register_multi_grad_hook
from torch.utils.checkpoint import checkpoint
from transformers import AttentionInterface, LlamaForCausalLM

from framework.config import Config
from framework.models.configuration import read_model_config
from framework.planner.cuda import MASK_BYTES
from framework.planner.recording import record_step
from framework.planner.shapes import shapes_of
from framework.planner.small_models import Widths, probe_batch, probe_config
from framework.planner.trainer_runs import TrainerRun, ledger
from framework.sharding.place import Place
from framework.sharding.ranks import Ranks
from framework.training.memory import CpuMemoryTracker

LLAMA = {
    "model_type": "llama",
    "hidden_size": 64,
    "intermediate_size": 224,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 640,
}
SHAPES = shapes_of(read_model_config(None, LLAMA))
MISTRAL = shapes_of(read_model_config(None, LLAMA | {"model_type": "mistral"}))
LARGE = shapes_of(
    read_model_config(
        None,
        LLAMA
        | {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "vocab_size": 32000}
        | {"num_attention_heads": 32, "num_key_value_heads": 8},
    )
)
RUN = TrainerRun(SHAPES, "full", fused=False, autocast=False, gpus=1, sequences=2, length=256, rank=4)


def terms(run: TrainerRun, phase: str) -> dict[str, int]:
    """Bytes by name."""
    return {term.name: term.bytes for term in ledger(run).terms if phase in term.phases}


class Flash(torch.autograd.Function):
    """Keeps what flash attention keeps; computes nothing."""

    @staticmethod
    def forward(ctx, queries, keys, values):
        result = torch.zeros_like(queries.transpose(1, 2), memory_format=torch.contiguous_format)
        ctx.save_for_backward(queries, keys, values, result, torch.zeros(queries.shape[:3]))
        return result

    @staticmethod
    def backward(ctx, gradient):
        return tuple(torch.zeros_like(each) for each in ctx.saved_tensors[:3])


AttentionInterface.register("keeping", lambda module, q, k, v, mask, **options: (Flash.apply(q, k, v), None))


@pytest.mark.parametrize(("tuning", "autocast"), [("full", False), ("lora", False), ("lora", True)])
def test_a_block_that_is_run_again_holds_what_is_said(tuning, autocast):
    """With the installed transformers and peft; without dropout, whose mask has another dtype on the CPU."""
    config = read_model_config(None, LLAMA)
    config._attn_implementation = "keeping"
    model = LlamaForCausalLM(config).to(torch.bfloat16)
    inner = model.model
    if tuning == "lora":
        get_peft_model(model, LoraConfig(r=4, target_modules=[*RUN.targets], lora_dropout=0.0))
    rows = torch.randn(2, 256, 64, dtype=torch.bfloat16, requires_grad=True)
    rotary = inner.rotary_emb(rows, torch.arange(256)[None])
    precision = torch.autocast("cpu", torch.bfloat16) if autocast else contextlib.nullcontext()
    with precision:
        block = partial(inner.layers[1].train(), position_embeddings=rotary)
        result = checkpoint(block, rows, use_reentrant=True)
    with CpuMemoryTracker() as tracker:
        gradient = torch.ones_like(result)
        result.backward(gradient)
    run = replace(RUN, tuning=tuning, autocast=autocast)
    found = terms(run, "block backward")
    mask = run.tokens * MASK_BYTES * sum(SHAPES.matrices[name][0] for name in run.targets) if tuning == "lora" else 0
    expected = found["kept by the block"] - mask + found["block's result and its gradient"]
    expected += found["gradients in the block"] + found.get("gradient of the MLP's last matrix", 0)
    expected += found.get("autocast's copies of adapters", 0)
    assert tracker.peak == expected


def test_a_recorded_step_of_this_framework_holds_the_same_in_a_block():
    """Less the block's result and its gradient: the one is not kept here, and the other is there before."""
    widths = Widths(4, 2, 16, 16, 320, 100, 4, 2, 64, 3, 2)
    config = Config.model_validate(
        {
            "run": {"output_dir": "unused"},
            "model": {"from_config": LLAMA, "tokenizer": "unused"},
            "data": {"train": "unused", "sequence_length": 64, "packing": True},
            "retention": {"policy": "checkpoint"},
            "optimizer": {"learning_rate": 1e-3, "precision": "pure_bf16"},
            "training": {"max_steps": 2, "global_batch_size": 4, "micro_batch_size": 2},
        }
    )
    small = LLAMA | {"intermediate_size": 320, "num_hidden_layers": 5, "vocab_size": 100}
    batch = probe_batch(widths, packed=True)
    # One document a row, for there is no mask then, as there is none with the kernels of the runs.
    batch.inputs["position_ids"] = torch.arange(widths.tokens).expand(widths.batch, -1)
    recording = record_step(probe_config(config, small, widths), batch, Ranks(Place()))
    part = next(part for part in recording.parts if part.name == "backward middle")
    found = terms(replace(RUN, shapes=shapes_of(read_model_config(None, small)), length=64), "block backward")
    expected = found["kept by the block"] + found["gradients in the block"]
    assert max(accumulate(part.changes)) == expected + found["gradient of the MLP's last matrix"]


class Norm(nn.Module):
    """Llama's norm."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, rows: Tensor) -> Tensor:
        wide = rows.to(torch.float32)
        wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-6)
        return self.weight * wide.to(rows.dtype)


@pytest.mark.parametrize(("tuning", "wide"), [("full", False), ("lora", False), ("qlora-nf4", True)])
def test_the_stock_head_holds_logits_four_times(tuning, wide):
    """The loss as in transformers 4.46 to 4.49, whose caller holds the logits in 16 bits meanwhile."""
    norm, head = Norm(64).to(torch.float32 if wide else torch.bfloat16), nn.Linear(64, 640, bias=False)
    head.to(torch.bfloat16)
    trained = tuning == "full"
    norm.requires_grad_(trained), head.requires_grad_(trained)
    hidden = torch.randn(2, 256, 64, dtype=torch.float32 if wide else torch.bfloat16, requires_grad=True)
    labels = torch.randint(640, (2, 256))

    def loss(logits: Tensor) -> Tensor:
        logits = logits.float()
        rows, shifted = logits[..., :-1, :].contiguous(), labels[..., 1:].contiguous()
        return nn.functional.cross_entropy(rows.view(-1, 640), shifted.view(-1))

    with CpuMemoryTracker() as tracker, torch.autocast("cpu", torch.bfloat16, enabled=wide):
        rows = norm(hidden)
        logits = head(rows)
        loss(logits)
    found = terms(replace(RUN, tuning=tuning, autocast=wide), "loss")
    # The last norm's input is there before, where it needs no copy; a label a sequence goes; the loss is a number.
    before = 4 * 64 * RUN.tokens if wide else 0
    assert tracker.peak == pytest.approx(found["logits"] + found["head's input"] - before - 2 * 8, abs=8)


def test_ligers_head_holds_a_chunks_logits_four_times():
    """The loop of `fused_linear_cross_entropy_forward`, its kernel left out."""
    run = replace(RUN, fused=True)
    chunk, tokens = 64, 2 * 255  # the power of two from 510 / ceil(640 / 64) on
    weight, hidden = torch.randn(640, 64, dtype=torch.bfloat16), torch.randn(2, 256, 64, dtype=torch.bfloat16)
    with CpuMemoryTracker() as tracker:
        result = hidden + 1
        rows = result[..., :-1, :].contiguous().view(-1, 64)
        weight_gradient, gradient = torch.zeros_like(weight), torch.zeros_like(rows)
        losses = torch.zeros(tokens)
        for start in range(0, tokens, chunk):
            part = rows[start : start + chunk]
            logits = part @ weight.t()
            logits = logits.float()
            logits = logits.to(torch.bfloat16)
            product = logits * 0.5
            gradient[start : start + chunk] = product @ weight
            torch.addmm(weight_gradient, logits.t(), part, out=weight_gradient)
    found = terms(run, "loss")
    assert found["logits"] == 8 * chunk * 640
    assert weight_gradient.nbytes == found["head's gradient"]
    # What the norm keeps is not here, and a row a sequence predicts nothing.
    expected = found["logits"] + found["head's gradient"] + found["head's input"] - hidden.nbytes
    assert tracker.peak == pytest.approx(expected - 2 * (2 * 2 * 64 + 4), abs=2 * 4 * 256)
    assert losses.nbytes == 4 * tokens


def test_adamws_foreach_step_copies_the_weights_once():
    layer = nn.Linear(64, 640, bias=False, dtype=torch.bfloat16)
    optimizer = torch.optim.AdamW(layer.parameters(), foreach=True)
    for _ in range(2):
        layer.weight.grad = torch.ones_like(layer.weight)
        with CpuMemoryTracker() as tracker:
            optimizer.step()
    assert tracker.peak == layer.weight.nbytes
    found = terms(RUN, "optimizer step")
    assert found["copies of AdamW's foreach step"] == found["gradients"] == found["weights"] == 2 * SHAPES.parameters
    assert found["optimizer state"] == 4 * SHAPES.parameters


def test_a_hook_on_a_leaf_holds_it_and_its_gradient():
    """Why frozen units of FSDP keep their inputs to the end of the backward pass."""
    with CpuMemoryTracker() as tracker:
        row = torch.zeros(1000).requires_grad_()
        handle = register_multi_grad_hook([row], lambda gradients: None)
        (row * 2).sum().backward()
        del row
        assert tracker.current == 2 * 4000
        handle.remove()
        del handle
        assert tracker.current == 0


def test_states_are_those_of_the_published_forms():
    """Bytes of an element: 6 and 10 in 16 bits; 16 and 20 over the GPUs with weights in float32 under FSDP."""
    base = 24 * 2 * 4096 + 2 * 8_519_680 + 512
    plain = TrainerRun(LARGE, "full", fused=False, autocast=False, gpus=1, sequences=2, length=4096)
    assert ledger(plain).total("save") == 6 * LARGE.parameters + base
    assert ledger(plain).peak == 10 * LARGE.parameters + base
    shared = replace(plain, gpus=2)
    assert ledger(shared).total("save") == 4 * LARGE.parameters + base
    assert ledger(shared).total("optimizer step") == 5 * LARGE.parameters + base
    wide = replace(shared, autocast=True)
    assert ledger(wide).total("save") == 8 * LARGE.parameters + base
    assert ledger(wide).total("optimizer step") == 10 * LARGE.parameters + base


def test_rows_of_blocks_in_multiples_of_the_hidden_size():
    """What published runs of Mistral-7B keep of a token, as they are told apart: kernels, adapters, precision."""

    def kept(tuning: str, fused: bool, autocast: bool, family: str = "llama") -> float:
        shapes = replace(LARGE, family=family)
        run = TrainerRun(shapes, tuning, fused, autocast, gpus=2, sequences=1, length=4096)
        found = terms(run, "block backward")
        names = ("kept by the block", "block's result and its gradient", "gradients in the block")
        return sum(found[name] for name in names) / 4096 / 4096

    assert kept("full", True, True, "mistral") == pytest.approx(60, abs=0.04)
    assert kept("lora", True, True, "mistral") == pytest.approx(68, abs=0.07)
    assert kept("lora", True, True) == pytest.approx(65, abs=0.07)
    assert kept("qlora-nf4", True, True, "mistral") == pytest.approx(66, abs=0.04)
    assert kept("lora", False, False, "mistral") == pytest.approx(79, abs=0.1)
    assert kept("qlora-nf4", False, True) == pytest.approx(71, abs=0.07)


@pytest.mark.parametrize("tuning", ["lora", "qlora-nf4"])
def test_frozen_units_of_fsdp_hold_a_row_more_for_all_blocks_but_two(tuning):
    run = TrainerRun(MISTRAL, tuning, True, True, gpus=2, sequences=4, length=512)
    deep = replace(run, shapes=replace(MISTRAL, blocks=20))
    found = terms(deep, "block backward")
    assert found["block inputs"] == 20 * 2 * 64 * run.tokens
    assert found["inputs' gradients, held by FSDP's hooks"] == 18 * 2 * 64 * run.tokens
    alone = terms(replace(deep, gpus=1), "block backward")
    assert alone["block inputs"] == 20 * 2 * 64 * run.tokens


def test_with_few_tokens_and_many_gpus_a_large_root_binds():
    wide = replace(LARGE, vocabulary=128256, outside=2 * 128256 * 4096 + 4096)
    found = ledger(TrainerRun(wide, "full", True, True, gpus=16, sequences=1, length=512))
    assert found.binding_phase == "block backward"
    (term,) = [term for term in found.terms if term.name.startswith("root's gradients")]
    assert term.bytes == 4 * wide.outside
