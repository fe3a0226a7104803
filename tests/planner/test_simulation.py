"""A run's step at its real size: against closed forms, and against the same step with its values."""

from __future__ import annotations

import json
from math import ceil

import pytest
import torch

from framework.config import Config
from framework.planner.fake_ranks import first_of
from framework.planner.recorder import RecordedPart
from framework.planner.recording import Recording, record_step
from framework.planner.simulate import main
from framework.planner.simulation import _batch, phase_peaks, simulate

LLAMA_13B = {
    "model_type": "llama",
    "hidden_size": 5120,
    "intermediate_size": 13824,
    "num_hidden_layers": 5,
    "num_attention_heads": 40,
    "vocab_size": 32000,
    "max_position_embeddings": 4096,
}
PARAMETERS = 2 * 32000 * 5120 + 5 * (4 * 5120**2 + 3 * 5120 * 13824 + 2 * 5120) + 5120
FREQUENCIES = 2 * 4 * 64
"""Bytes of those of the rotary embedding, which are held twice."""
TENSORS = 5 * 9 + 3


def config_of(model: dict, *, tokens: int, ranks: int = 1, **sections: dict) -> Config:
    return Config.model_validate(
        {
            "run": {"output_dir": "unused"},
            "model": {"from_config": model, "tokenizer": "unused"},
            "data": {"train": "unused", "sequence_length": tokens},
            "optimizer": {"learning_rate": 1e-3, "precision": "pure_bf16"},
            "training": {"max_steps": 2, "global_batch_size": 2 * ranks, "micro_batch_size": 2},
        }
        | sections
    )


def test_states_and_logits_of_a_large_model():
    simulated = simulate(config_of(LLAMA_13B, tokens=4096), 1, labelled_share=1.0)
    assert simulated.start == 6 * PARAMETERS + 4 * TENSORS + FREQUENCIES
    # Gradients come on top of weights and moments; the loss has logits of a chunk, in bf16 and in float32, and the
    # gradients of the head's weight and of its rows, beside these and the rows of the final norm.
    labelled, chunk = 2 * 4096 * 5120, 1024 * 32000
    loss = simulated.peaks["loss"] - simulated.peaks["forward"]
    assert loss == pytest.approx(6 * chunk + 2 * 32000 * 5120 + 10 * labelled, rel=0.1)
    assert simulated.peaks["optimizer step"] >= simulated.start + 2 * PARAMETERS
    assert simulated.peak == max(simulated.peaks.values())


def test_a_rank_of_several_holds_its_share():
    sharded = config_of(LLAMA_13B, tokens=64, ranks=8, sharding={"engine": "fsdp"})
    assert simulate(sharded, 8, labelled_share=1.0).start == 6 * PARAMETERS // 8 + 4 * TENSORS + FREQUENCIES


@pytest.mark.parametrize(
    ("sharding", "held"),
    [
        ({"engine": "fsdp", "offload_optimizer": True, "offload_parameters": True}, 0),
        # Weights in 16 bits, and room for the largest gradient.
        ({"engine": "deepspeed", "zero_stage": 2, "offload_optimizer": True}, 2 * PARAMETERS + 2 * 32000 * 5120),
    ],
)
def test_one_process_has_on_the_device_what_it_does_not_offload(sharding, held):
    config = config_of(
        LLAMA_13B, tokens=64, sharding=sharding, optimizer={"learning_rate": 1e-3, "precision": "fp32_master"}
    )
    assert simulate(config, 1, labelled_share=1.0).start == held + FREQUENCIES


@pytest.mark.parametrize("placement", ["device", "host"])
def test_blocks_that_select_are_simulated_as_they_are(placement):
    small = LLAMA_13B | {"hidden_size": 128, "intermediate_size": 320, "num_attention_heads": 4, "vocab_size": 500}
    config = config_of(
        small,
        tokens=512,
        retention={"policy": "selective", "retain_linears": True, "placement": placement},
        selection={"strategy": "supervised"},
    )
    simulated = simulate(config, 1, labelled_share=0.4)
    with torch.random.fork_rng(devices=()), first_of(1) as ranks:
        real = record_step(config, _batch(config, 500, 0.4), ranks, micro_batches=1)
    assert simulated.start == real.start
    assert simulated.peaks == phase_peaks(real)


@pytest.mark.parametrize("packing", [False, True])
def test_batches_have_the_labels_that_were_planned(packing):
    config = config_of(LLAMA_13B, tokens=100, data={"train": "x", "sequence_length": 100, "packing": packing})
    batch = _batch(config, 500, 0.333)
    assert batch.supervised_tokens == 2 * ceil(33.3) - 1
    assert batch.tokens == 200 - (not packing)
    assert batch.supervised.sum(1).tolist() == [34, 33]


def test_peaks_of_phases_count_what_was_live_before():
    parts = [("inputs", [1]), ("forward first", [10, -4]), ("loss", [20, -20]), ("backward first", [-3])]
    recording = Recording((*(RecordedPart(*part) for part in parts), RecordedPart("optimizer step")), 100, 127, {})
    peaks = {"forward": 111, "loss": 127, "block backward": 107, "optimizer step": 104}
    assert phase_peaks(recording) == peaks


def test_the_command_answers_what_it_is_asked(tmp_path):
    small = LLAMA_13B | {"hidden_size": 32, "intermediate_size": 40, "num_attention_heads": 4, "vocab_size": 50}
    config = config_of(small, tokens=16)
    request, answer = tmp_path / "request.json", tmp_path / "answer.json"
    flat = config_of(small | {"num_hidden_layers": 4}, tokens=16)
    asked = [{"config": each.to_json(), "ranks": 1, "labelled_share": 0.5} for each in (config, flat)]
    request.write_text(json.dumps(asked))
    main(request, answer)
    found, refused = json.loads(answer.read_text())
    expected = simulate(config, 1, 0.5)
    assert (found["start"], found["peaks"]) == (expected.start, expected.peaks)
    assert refused == {"reason": "model: only models of at least 5 blocks can be simulated, not of 4"}
