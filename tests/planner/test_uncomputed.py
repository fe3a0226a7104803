"""Steps without values allocate what real ones do; what is small is computed, what is large takes no memory."""

from __future__ import annotations

import resource
from contextlib import AbstractContextManager, nullcontext

import pytest
import torch
from torch import Tensor, nn

from framework.config import Config
from framework.planner.fake_ranks import first_of
from framework.planner.recording import Recording, record_step
from framework.planner.simulation import phase_peaks
from framework.planner.small_models import Widths, probe_batch, probe_config
from framework.planner.uncomputed import Uncomputed

WIDTHS = Widths(4, 2, 8, 8, 52, 100, 4, 2, 24, 7, 2)
LLAMA = {
    "model_type": "llama",
    "hidden_size": 32,
    "intermediate_size": 52,
    "num_hidden_layers": 5,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 100,
    "max_position_embeddings": 128,
}
QWEN = LLAMA | {"model_type": "qwen3", "head_dim": 8}
GPT2 = {"model_type": "gpt2", "n_embd": 32, "n_layer": 5, "n_head": 4, "vocab_size": 100, "n_positions": 128}
GPT2 |= {"bos_token_id": 1, "eos_token_id": 1}

SELECTIVE = {"retention": {"policy": "selective", "retain_linears": True}, "selection": {"strategy": "supervised"}}
LORA = {"kind": "lora", "rank": 4, "alpha": 8}
PACKED = {"train": "unused", "sequence_length": 24, "packing": True}
ZERO = {"engine": "deepspeed"}
PURE = {"learning_rate": 1e-3, "precision": "pure_bf16"}
MASTER = {"learning_rate": 1e-3, "precision": "fp32_master"}


def recorded(model: dict, sections: dict, mode: AbstractContextManager[object]) -> Recording:
    settings = dict(sections)
    adapter, quantization = settings.pop("adapter", None), settings.pop("quantization", None)
    config = Config.model_validate(
        {
            "run": {"output_dir": "unused"},
            "model": {"from_config": model, "tokenizer": "x", "adapter": adapter, "quantization": quantization},
            "data": {"train": "unused", "sequence_length": 24},
            "optimizer": {"learning_rate": 1e-3},
            "hardware": {"gpus_per_node": 2},
            "training": {"max_steps": 2, "global_batch_size": 8, "micro_batch_size": 2},
        }
        | settings
    )
    small = probe_config(config, model, WIDTHS)
    batch = probe_batch(WIDTHS, packed=config.data.packing)
    with torch.random.fork_rng(devices=()), mode, first_of(small.described_ranks) as ranks:
        return record_step(small, batch, ranks)


@pytest.mark.parametrize(
    ("model", "sections"),
    [
        (LLAMA, {"optimizer": MASTER | {"name": "adamw_8bit"}, "data": PACKED}),
        (GPT2, {"retention": {"policy": "checkpoint"}}),
        (QWEN, SELECTIVE | {"adapter": LORA, "quantization": "nf4", "optimizer": PURE}),
        (LLAMA, {"sharding": {"engine": "fsdp"}, "optimizer": MASTER}),
        pytest.param(LLAMA, {"sharding": ZERO | {"zero_stage": 1}, "optimizer": MASTER}, marks=pytest.mark.slow),
        pytest.param(LLAMA, {"sharding": ZERO | {"zero_stage": 2}, "optimizer": MASTER}, marks=pytest.mark.slow),
        pytest.param(LLAMA, {"sharding": ZERO | {"zero_stage": 3}, "optimizer": MASTER}, marks=pytest.mark.slow),
    ],
    ids=["8-bit packed", "gpt2 checkpoint", "selective nf4 bf16", "fsdp", "zero 1", "zero 2", "zero 3"],
)
def test_a_step_without_values_allocates_what_the_real_one_does(model, sections):
    real, simulated = (recorded(model, sections, mode) for mode in (nullcontext(), Uncomputed(small=8)))
    assert simulated.start == real.start
    assert phase_peaks(simulated) == phase_peaks(real)
    assert len(simulated.parts) == len(real.parts)
    for mine, theirs in zip(simulated.parts, real.parts, strict=True):
        assert mine.name == theirs.name
        if sections.get("sharding", {}).get("zero_stage") == 3:
            # DeepSpeed frees parameters in the order of a set.
            assert sorted(mine.changes) == sorted(theirs.changes), mine.name
        else:
            assert mine.changes == theirs.changes, mine.name


def test_large_tensors_take_no_memory():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with Uncomputed():
        layer = nn.Linear(2**16, 2**18, dtype=torch.bfloat16)
        output = layer(torch.ones(8192, 2**16, dtype=torch.bfloat16)).relu_()
        output.float().pow(2).mean().backward()
        optimizer = torch.optim.AdamW(layer.parameters(), fused=True)
        optimizer.step()
    after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert layer.weight.grad is not None and layer.weight.grad.untyped_storage().nbytes() == 2**35
    assert optimizer.state[layer.weight]["exp_avg"].shape == (2**18, 2**16)
    assert optimizer.state[layer.weight]["step"] == 1
    # KiB; what was made above has 170 GiB.
    assert after - before < 2**17


def test_what_is_known_is_computed_and_what_is_not_is_ones():
    with Uncomputed(small=100):
        known = torch.arange(10.0) * 2
        mask = torch.arange(1000) % 3 == 0
        large = torch.zeros(1000)
        picked = large[mask]
        total = large.sum()
        known.add_(total)
        assert large.sum().item() == 1 and large[:3].max() == 1
        norms = torch._foreach_norm([large, large[:10]])
    assert known.tolist() == [2.0 * i + 1 for i in range(10)]
    assert mask.sum() == 334 and picked.shape == (334,)
    assert torch.stack(norms).tolist() == [1, 1]


def test_what_shares_memory_does_so_without_values():
    with Uncomputed(small=100):
        large = torch.empty(20, 30)
        results = [
            large.view(600),
            torch.ops.aten._unsafe_view(large, (30, 20)),
            large.add_(1),
            torch.add(large, 1, out=large),
            large.expand(2, 20, 30),
        ]
        copies = [large + 1, large.clone(), large.reshape(30, 20).t().contiguous(), large.double()]
    storage = large.untyped_storage()._cdata
    assert {result.untyped_storage()._cdata for result in results} == {storage}
    assert len({copy.untyped_storage()._cdata for copy in copies} | {storage}) == 5
    assert [tensor.shape for tensor in results] == [(600,), (30, 20), (20, 30), (20, 30), (2, 20, 30)]
    assert copies[-1].untyped_storage().nbytes() == 4800


@pytest.mark.parametrize("operator", [torch.nonzero, lambda large: large[large > 0], lambda large: large[0].unique()])
def test_shapes_that_depend_on_values_are_refused(operator):
    with Uncomputed(small=10), pytest.raises(NotImplementedError, match="values that are not computed"):
        # More elements than masks may have that are computed.
        operator(torch.randn(2**18, 20))


def test_a_lost_tensor_is_told_from_a_new_one_in_its_place():
    with Uncomputed(small=10):
        for _ in range(100):
            torch.randn(1000)
            assert torch.tensor([3.0]).item() == 3
            kept: Tensor = torch.full((5,), 2.0)
    assert kept.tolist() == [2] * 5
