"""FSDP2 on two and four ranks, and on one, against a plain loop in one process."""

from __future__ import annotations

import math
from dataclasses import replace
from functools import partial
from pathlib import Path

import fsdp_cases as cases
import fsdp_ranks
import pytest
import several_ranks
import torch

from framework.errors import UserError
from framework.sharding.fsdp import FsdpEngine
from framework.sharding.ranks import Place, Ranks, joined_ranks
from framework.training.loss import evaluation_loss

ALL = cases.CASES | cases.PRECISIONS | cases.HYBRID


def launch(world_size: int, directory: Path) -> list[dict]:
    """What each rank of fsdp_ranks.py found."""
    several_ranks.run(world_size, directory / "outputs", fsdp_ranks.main, directory)
    return [torch.load(directory / f"{world_size}-{rank}.pt", weights_only=False) for rank in range(world_size)]


def merged(found: list[dict], name: str) -> dict:
    """A case over all ranks: agreed results, whole tensors, each rank's bytes."""
    parts = [rank[name] for rank in found]
    assert all(part["results"] == parts[0]["results"] and part["state"] == parts[0]["state"] for part in parts)
    weights, optimizer = (cases.Memory(f for p in parts for f in p[kind]) for kind in ("weights", "optimizer"))
    assert weights.covered_once and optimizer.covered_once
    return {
        "results": parts[0]["results"],
        "weights": weights,
        "optimizer": optimizer,
        "state": parts[0]["state"],
        "bytes": [part["bytes"] for part in parts],
    }


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    return tmp_path_factory.mktemp("fsdp")


@pytest.fixture(scope="module")
def two(directory):
    return launch(2, directory)


@pytest.fixture(scope="module")
def four(two, directory):
    saved = merged(two, "checkpoint")
    parts = {
        kind: [(name, tuple(tensor.shape), 0, tensor.reshape(-1)) for name, tensor in saved[kind].tensors.items()]
        for kind in ("weights", "optimizer")
    }
    torch.save(parts | {"state": saved["state"]}, directory / "store.pt")
    return launch(4, directory)


@pytest.fixture
def alone():
    with joined_ranks(Place(), timeout_seconds=60) as ranks:
        yield ranks


def worst_error(found, expected) -> float:
    """The largest error of an element over the tensor's largest."""
    return max(float((found[n] - expected[n]).abs().max() / expected[n].abs().max()) for n in found)


def check_same_training(found: dict, case, data) -> None:
    losses, norms, parameters = cases.reference(case, data)
    assert [result.loss for result in found["results"]] == pytest.approx(losses, rel=1e-6)
    assert [result.grad_norm for result in found["results"]] == pytest.approx(norms, rel=1e-6)
    assert min(norms) > (0 if case.rank else cases.CLIP)
    stored = {name for name in parameters if "lora" in name or not case.rank}
    assert found["weights"].tensors.keys() == stored
    assert worst_error(found["weights"].tensors, parameters) < 1e-6
    states = {f"{key}.{name}" for key in ("step", "exp_avg", "exp_avg_sq") for name in stored}
    assert found["optimizer"].tensors.keys() == states
    assert all(result.finite and not result.skipped for result in found["results"])


@pytest.mark.multiprocess
@pytest.mark.parametrize("name", [*cases.CASES, "older sometimes"])
def test_two_ranks_train_as_one_process_does(two, name):
    check_same_training(merged(two, name), ALL[name.removeprefix("older ")], [*cases.windows()])


@pytest.mark.multiprocess
@pytest.mark.parametrize("name", cases.HYBRID)
def test_four_ranks_and_copies_of_the_model_train_as_one_process_does(four, name):
    check_same_training(merged(four, name), ALL[name], [*cases.windows(size=8)])


@pytest.mark.multiprocess
@pytest.mark.parametrize(("meta", "real"), [("meta all", "all"), ("meta bytes", "bytes")])
def test_from_the_meta_device_it_trains_to_the_bit_as_from_weights(two, meta, real):
    filled, given = merged(two, meta), merged(two, real)
    assert filled["results"] == given["results"]
    for kind in ("weights", "optimizer"):
        assert filled[kind].tensors.keys() == given[kind].tensors.keys()
        assert all(torch.equal(filled[kind].tensors[n], given[kind].tensors[n]) for n in given[kind].tensors)


# Largest relative difference of losses and norms to fp32; bf16 has 8 bits and fp16 11.
@pytest.mark.multiprocess
@pytest.mark.parametrize(
    ("name", "tolerance", "norm_tolerance"),
    [
        ("fp32_master", 1e-3, 0.03),
        ("fp32_master lora", 1e-3, 0.1),
        ("older fp32_master lora", 1e-3, 0.1),
        ("pure_bf16", 1e-3, 0.03),
        ("pure_bf16 lora", 1e-3, 0.1),
        ("fp16", 1e-4, 0.01),
        ("fp16 lora", 1e-4, 0.02),
    ],
)
def test_other_precisions_train_close_to_fp32(two, name, tolerance, norm_tolerance):
    found, case = merged(two, name), ALL[name.removeprefix("older ")]
    losses, norms, _ = cases.reference(replace(case, precision="fp32"), model=cases.model_of(case).float())
    assert [result.loss for result in found["results"]] == pytest.approx(losses, rel=tolerance)
    assert [result.grad_norm for result in found["results"]] == pytest.approx(norms, rel=norm_tolerance)
    assert all(result.finite and not result.skipped for result in found["results"])
    wanted = torch.bfloat16 if case.precision == "pure_bf16" else torch.float32
    assert {tensor.dtype for tensor in found["weights"].tensors.values()} == {wanted}
    scales = {"fp16": [65536.0] * 3, "fp16 lora": [1024.0] * 3}.get(name, [None] * 3)
    assert [result.loss_scale for result in found["results"]] == scales


@pytest.mark.multiprocess
def test_older_torch_trains_to_the_bit_as_newer_does(two):
    for name in ("sometimes", "fp32_master lora"):
        older, newer = merged(two, f"older {name}"), merged(two, name)
        assert older["results"] == newer["results"]
        assert all(torch.equal(tensor, newer["weights"].tensors[n]) for n, tensor in older["weights"].tensors.items())


@pytest.mark.multiprocess
def test_a_step_that_is_not_finite_on_one_rank_changes_nothing_on_any(two):
    assert all(rank["nan"]["unchanged"] for rank in two)
    skipped = [rank["nan"]["skipped"] for rank in two]
    assert all(result.skipped and not result.finite and math.isnan(result.loss) for result in skipped)
    assert merged(two, "nan")["results"] == merged(two, "selective")["results"][2:]
    assert all(bytes_["gradients"] == 0 for bytes_ in merged(two, "nan")["bytes"])


@pytest.mark.multiprocess
def test_an_fp16_overflow_on_one_rank_halves_the_scale_of_all(two):
    assert all(rank["overflow"]["unchanged"] for rank in two)
    for result in (rank["overflow"]["skipped"] for rank in two):
        assert result.skipped and result.finite and not math.isfinite(result.grad_norm)
        assert result.loss_scale == 65536.0
    after = merged(two, "overflow")
    assert [result.loss_scale for result in after["results"]] == [32768.0]
    assert after["state"] == {"loss_scale": {"scale": 32768.0, "_growth_tracker": 1}}


@pytest.mark.multiprocess
def test_evaluations_between_steps_see_the_weights_of_their_time_and_disturb_no_step(two):
    assert merged(two, "evaluated")["results"] == merged(two, "selective")["results"]
    (window,) = cases.windows(9, 10)
    for step in range(4):
        model = cases.model_of(cases.CASES["selective"])
        if step == 3:
            model.load_state_dict(merged(two, "evaluated")["weights"].tensors, strict=False)
        elif step > 0:
            _, _, parameters = cases.reference(cases.CASES["selective"], [*cases.windows(0, step)])
            model.load_state_dict(parameters, strict=False)
        for index, inputs in enumerate(window):
            expected = evaluation_loss(model.eval(), inputs)
            loss, labels = two[index % 2]["evaluated"]["evaluations"][2 * step + index // 2]
            assert labels == expected.labels
            assert loss == pytest.approx(expected.loss.item(), rel=1e-6)


@pytest.mark.multiprocess
def test_what_a_rank_holds_falls_with_the_number_of_ranks(two, four):
    model = cases.model_of(cases.CASES["checkpoint"])
    whole, buffers = cases.held_bytes(model.parameters()), cases.held_bytes(model.buffers())
    # Shards are of whole rows: of 20 tensors two have 47 rows of 32 numbers, one has 67; the rest can be cut in four.
    row, counters = 4 * 32, 4 * 20
    for held, parts in ((merged(two, "checkpoint")["bytes"], 2), (merged(four, "resumed")["bytes"], 4)):
        for rank in held:
            assert abs(rank["weights"] - buffers - whole / parts) <= 5 * row
            assert abs(rank["optimizer"] - 2 * whole / parts) <= 2 * 5 * row + counters


@pytest.mark.multiprocess
def test_filling_from_the_meta_device_holds_one_tensor_beside_the_shards(two):
    for found in (rank["filled"] for rank in two):
        assert found["largest"] <= found["peak"] <= found["largest"] + found["buffers"]
        assert found["left"] == found["buffers"]


@pytest.mark.multiprocess
def test_two_ranks_then_four_then_one_train_as_one_process_does(two, four, alone):
    case = cases.CASES["checkpoint"]
    resumed = merged(four, "resumed")
    engine = cases.engine_of(case, alone, cases.model_of(case, seed=6))
    engine.load(resumed["weights"], resumed["optimizer"], resumed["state"])
    results = cases.train(engine, case, alone, cases.windows(4, 5))
    losses, norms, parameters = cases.reference(case, [*cases.windows(0, 5)])
    every = [*merged(two, "checkpoint")["results"], *resumed["results"], *results]
    assert [result.loss for result in every] == pytest.approx(losses, rel=1e-6)
    assert [result.grad_norm for result in every] == pytest.approx(norms, rel=1e-6)
    weights = cases.Memory(cases.fragments(engine.weights())).tensors
    assert worst_error(weights, parameters) < 1e-6
    steps = {float(f.values) for f in engine.optimizer_state() if f.name.startswith("step.")}
    assert steps == {5.0}


@pytest.mark.multiprocess
def test_an_adapter_goes_on_alone(two, alone):
    case, saved = cases.CASES["lora"], merged(two, "lora")
    engine = cases.engine_of(case, alone)
    engine.load(saved["weights"], saved["optimizer"], saved["state"])
    (result,) = cases.train(engine, case, alone, cases.windows(3, 4))
    losses, _, parameters = cases.reference(case, [*cases.windows(0, 4)])
    assert result.loss == pytest.approx(losses[3], rel=1e-6)
    assert worst_error(cases.Memory(cases.fragments(engine.weights())).tensors, parameters) < 1e-6


@pytest.mark.multiprocess
def test_an_optimiser_that_is_not_fused_takes_the_same_steps(two, alone):
    case = cases.CASES["lora"]
    engine = cases.engine_of(case, alone, build=partial(cases.optimizer_of, case, fused=False))
    results = cases.train(engine, case, alone)
    fused = merged(two, "lora")
    assert [result.loss for result in results] == pytest.approx([r.loss for r in fused["results"]], rel=1e-6)
    weights = cases.Memory(cases.fragments(engine.weights())).tensors
    assert worst_error(weights, fused["weights"].tensors) < 1e-6


def test_what_is_saved_in_fp32_goes_on_in_bf16(alone):
    case = cases.Case(tied=True)
    saved = cases.engine_of(case, alone)
    cases.train(saved, case, alone, cases.windows(0, 1))
    weights, states = (cases.Memory(cases.fragments(f)) for f in (saved.weights(), saved.optimizer_state()))
    low = replace(case, precision="pure_bf16")
    engine = cases.engine_of(low, alone, cases.model_of(low, seed=3))
    engine.load(weights, states, {"loss_scale": {"scale": 8.0, "_growth_tracker": 1}})
    for fragment in (*engine.weights(), *engine.optimizer_state()):
        stored = {**weights.tensors, **states.tensors}[fragment.name]
        wanted = stored if fragment.shape == () else stored.to(torch.bfloat16)
        assert torch.equal(fragment.values, wanted.view(-1)), fragment.name
    assert engine.state_dict() == {}
    assert cases.train(engine, low, alone, cases.windows(1, 2))[0].finite


def test_what_another_model_saved_is_refused_with_names(alone):
    case = cases.Case(tied=True)
    engine = cases.engine_of(case, alone)
    cases.train(engine, case, alone, cases.windows(0, 1))
    weights, states = (cases.fragments(f) for f in (engine.weights(), engine.optimizer_state()))
    norm, before = "model.norm.weight", cases.fragments(engine.weights())

    def renamed(parts, name, new):
        return cases.Memory([(new if f[0] == name else f[0], *f[1:]) for f in parts])

    for change, message in (
        ((renamed(weights, norm, "other.weight"), cases.Memory(states)), "missing: model.norm.weight\n.*other.weight"),
        (
            (cases.Memory(weights), renamed(states, f"exp_avg.{norm}", "exp_avg.x")),
            "missing: exp_avg.model.norm.weight",
        ),
        ((cases.Memory(weights), renamed(states, f"step.{norm}", f"exp_avg.{norm[:5]}")), "unexpected: exp_avg.model"),
        (
            (cases.Memory([f for f in weights if f[0] != norm] + [(norm, (8,), 0, torch.ones(8))]), cases.Memory([])),
            r"other shape: model.norm.weight \[8\] in the file, \[32\] in the model",
        ),
    ):
        with pytest.raises(UserError, match=message):
            engine.load(*change, {})
    after = cases.fragments(engine.weights())
    assert all(torch.equal(old[3], new[3]) for old, new in zip(before, after, strict=True))
    # A tied tensor may be stored under its other name.
    engine.load(renamed(weights, "model.embed_tokens.weight", "lm_head.weight"), cases.Memory(states), {})


class Doubling(torch.optim.AdamW):
    """Saves twice what it holds."""

    def exported_state(self, parameter):
        return {key: 2 * value for key, value in self.state[parameter].items()}

    def import_state(self, parameter, state):
        self.state[parameter] = {key: value.clone() / 2 for key, value in state.items()}


def test_an_optimiser_with_a_format_of_its_own_saves_and_loads_by_it(alone):
    case = cases.Case(tied=True)
    engine, other = (cases.engine_of(case, alone, build=lambda m: Doubling(m.parameters(), lr=0.1)) for _ in range(2))
    cases.train(engine, case, alone, cases.windows(0, 2))
    weights, states = (cases.Memory(cases.fragments(f)) for f in (engine.weights(), engine.optimizer_state()))
    assert {float(value) for name, value in states.tensors.items() if name.startswith("step.")} == {4.0}
    other.load(weights, states, {})
    for held, loaded in zip(engine.held().optimizer, other.held().optimizer, strict=True):
        assert torch.equal(held, loaded)


def test_tensors_without_a_value_are_named(alone):
    case = cases.Case()
    model = cases.model_of(case)
    values = [value for value in cases.emptied(model) if value[0] != "model.norm.weight"]
    engine = FsdpEngine("fp32", alone, reshard_after_forward=True, replicas=1, offload=False)
    with pytest.raises(UserError, match=r"no values for model\.norm\.weight"):
        engine.prepare(model, lambda module: cases.optimizer_of(case, module), values)


def test_replicas_divide_the_ranks():
    ranks = Ranks(Place(), None)
    with pytest.raises(UserError, match=r"sharding\.replicas: 2 does not divide the number of ranks, 1"):
        FsdpEngine("fp32", ranks, reshard_after_forward=True, replicas=2, offload=False)
