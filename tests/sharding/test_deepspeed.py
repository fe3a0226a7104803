"""The DeepSpeed engine on two ranks and on one, against a plain loop of torch in one process."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import deepspeed_cases as cases
import deepspeed_ranks as ranks
import pytest
import several_ranks
import torch

pytestmark = [
    pytest.mark.slow,
    pytest.mark.multiprocess,
]

TIMEOUT_SECONDS = 600
STAGES = pytest.mark.parametrize("stage", ranks.STAGES)

Found = list[dict[Any, Any]]


def found_by(rank: int, world_size: int, directory: Path) -> dict[Any, Any]:
    return torch.load(directory / f"{world_size}-{rank}.pt", weights_only=False)


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("deepspeed")


@pytest.fixture(scope="module")
def launched(directory: Path) -> tuple[Found, str]:
    """What each of two ranks found, and what they wrote to the terminal."""
    written = several_ranks.run(2, directory / "outputs", ranks.main, directory, timeout=TIMEOUT_SECONDS)
    return [found_by(rank, 2, directory) for rank in range(2)], "".join(written)


@pytest.fixture(scope="module")
def two(launched: tuple[Found, str]) -> dict[Any, Any]:
    """What the first of two ranks found; the results of steps are the same on the other."""
    first, second = launched[0]
    for key, value in first.items():
        if isinstance(value, dict) and "results" in value:
            assert str(value["results"]) == str(second[key]["results"]), key
    return first


@pytest.fixture(scope="module")
def one(two: dict[Any, Any], directory: Path) -> tuple[dict[Any, Any], str]:
    """What a single rank found and wrote, which imports DeepSpeed by itself."""
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, ranks.__file__, str(directory)],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=TIMEOUT_SECONDS,
    )
    assert done.returncode == 0, done.stdout
    return found_by(0, 1, directory), done.stdout


@pytest.fixture(scope="module")
def wanted() -> dict[str, Any]:
    return {name: cases.reference(case) for name, case in ranks.CASES.items()}


def assert_same_run(found: dict[str, Any], wanted: Any, tolerance: float) -> None:
    """Losses, norms and final weights within a relative tolerance, and all of the weights."""
    results, weights = wanted[:2]
    got = [(result.loss, result.grad_norm) for result in found["results"]]
    assert got == [pytest.approx(pair, rel=tolerance) for pair in results]
    assert found["weights"].tiled and found["optimizer"].tiled
    assert set(found["weights"].tensors) == set(weights)
    for name, values in weights.items():
        difference = (found["weights"].tensors[name].float() - values).norm() / values.norm()
        assert difference < tolerance, name


@STAGES
def test_twenty_clipped_steps_are_those_of_a_plain_loop(two: dict[Any, Any], stage: int) -> None:
    wanted = cases.reference(ranks.LONG)
    norms = [norm for _, norm in wanted.results]
    assert min(norms) < cases.CLIP < max(norms)
    assert_same_run(two["long", stage], wanted, 1e-5)


def test_no_weight_is_used_before_its_gather_is_waited_for(two: dict[Any, Any]) -> None:
    found, plain = two["late gathers"], two["all full", 3]
    assert found["results"] == plain["results"] and found["evaluated"] == plain["evaluated"]


@pytest.mark.parametrize(
    ("name", "stage"), [(name, stage) for stage, names in ranks.CASES_OF_STAGE.items() for name in names]
)
def test_every_policy_trains_and_evaluates_as_in_one_process(
    two: dict[Any, Any], wanted: dict[str, Any], name: str, stage: int
) -> None:
    found = two[name, stage]
    assert_same_run(found, wanted[name], 1e-5)
    assert {key.split(".", 1)[0] for key in found["optimizer"].tensors} == {"step", "exp_avg", "exp_avg_sq"}
    assert {value.item() for key, value in found["optimizer"].tensors.items() if key.startswith("step.")} == {3.0}
    assert found["evaluated"] == pytest.approx(wanted[name].evaluated, rel=1e-6)


@STAGES
def test_discarded_gradients_and_steps_that_are_not_finite_leave_no_trace(two: dict[Any, Any], stage: int) -> None:
    found, plain = two["undisturbed", stage], two["all full", stage]
    assert found["emptied"] == 0
    assert found["results"] == plain["results"]
    assert found["weights"].equals(plain["weights"]) and found["optimizer"].equals(plain["optimizer"])
    loss, gradient = found["bad"]
    assert (loss.finite, loss.skipped, gradient.finite, gradient.skipped) == (False, True, False, True)
    assert loss.loss != loss.loss and gradient.grad_norm == float("inf")


@STAGES
def test_any_stage_and_number_of_ranks_goes_on_from_what_another_saved(
    two: dict[Any, Any], one: tuple[dict[Any, Any], str], stage: int
) -> None:
    fourth = cases.reference(cases.Case(steps=4)).results[-1]
    for found, source in ((two, (stage + 1) % 4), (one[0], 3)):
        got, given = found["resumed", stage], two["undisturbed", source]
        assert got["weights"].tiled and got["weights"].equals(given["weights"])
        assert got["optimizer"].tiled and got["optimizer"].equals(given["optimizer"])
        assert (got["results"][0].loss, got["results"][0].grad_norm) == pytest.approx(fourth, rel=1e-5)


@pytest.mark.parametrize("stage", [1, 3])
def test_tensors_that_come_one_by_one_make_the_same_model(two: dict[Any, Any], stage: int) -> None:
    for name in ("all full", "selective LoRA"):
        found, plain = two[f"meta {name}", stage], two[name, stage]
        assert found["results"] == plain["results"]
        assert found["weights"].equals(plain["weights"]) and found["optimizer"].equals(plain["optimizer"])


@pytest.mark.parametrize("stage", [1, 3])
def test_offloading_changes_nothing(two: dict[Any, Any], wanted: dict[str, Any], stage: int) -> None:
    assert_same_run(two["offload", stage], wanted["all full"], 1e-5)
    # Another order of sums in the norm: clipped gradients differ in the last place, and weights in a bfloat16's.
    found, plain = two["offload master", stage], two["fp32_master", stage]
    assert_same_run(found, ([(r.loss, r.grad_norm) for r in plain["results"]], plain["weights"].tensors), 5e-3)


@STAGES
@pytest.mark.parametrize("precision", ["fp32_master", "pure_bf16"])
def test_bfloat16_follows_float32(two: dict[Any, Any], wanted: dict[str, Any], precision: str, stage: int) -> None:
    found = two[precision, stage]
    got = [(result.loss, result.grad_norm) for result in found["results"]]
    assert got == [pytest.approx(pair, rel=0.02) for pair in wanted["all full"].results]
    dtype = torch.float32 if precision == "fp32_master" else torch.bfloat16
    assert {values.dtype for values in found["weights"].tensors.values()} == {dtype}
    names = found["optimizer"].tensors.items()
    assert {values.dtype for name, values in names if not name.startswith("step.")} == {dtype}
    assert found["weights"].tiled and found["optimizer"].tiled


@STAGES
def test_the_fp16_scale_answers_an_overflow_and_masters_are_exact(
    two: dict[Any, Any], wanted: dict[str, Any], stage: int
) -> None:
    found = two["fp16", stage]
    overflow, *results = found["results"]
    assert (overflow.finite, overflow.skipped, overflow.loss_scale) == (True, True, 1024.0)
    assert [(r.finite, r.skipped, r.loss_scale) for r in results] == [
        (True, False, 512.0),
        (True, False, 512.0),
        (True, False, 1024.0),
    ]
    assert [(r.loss, r.grad_norm) for r in results] == [
        pytest.approx(pair, rel=5e-3) for pair in wanted["all full"].results
    ]
    assert found["state"] == {"loss_scale": {"scale": 1024.0, "_growth_tracker": 1}}
    for name, parameter in cases.Case().build().named_parameters():
        assert torch.equal(found["first"].tensors[name], parameter.detach().flatten()), name


@STAGES
def test_a_parameter_without_gradient_gets_none_of_an_earlier_window(two: dict[Any, Any], stage: int) -> None:
    model = ranks.Toy()
    optimizer = cases.adamw(model)
    x = torch.linspace(-1, 1, 20).view(4, 5)
    for both in (True, False):
        (4 * model(x, both)).backward()
        for group in optimizer.param_groups:
            group["lr"] = 1e-2 * group["learning_rate_scale"]
        optimizer.step()
        for parameter in model.parameters():
            parameter.grad = torch.zeros_like(parameter) if parameter.requires_grad else None
    for name in ("toy", "toy offload"):
        if (name, stage) not in two:
            continue
        found = two[name, stage]["weights"]
        assert found.tiled
        assert set(found.tensors) == {name for name, _ in [*model.named_parameters(), *model.named_buffers()]}
        for key, tensor in [*model.named_parameters(), *model.named_buffers()]:
            torch.testing.assert_close(found.tensors[key], tensor.detach().flatten(), rtol=1e-5, atol=1e-7)


def test_ranks_hold_their_parts(launched: tuple[Found, str]) -> None:
    model = cases.Case(tied=False).build()
    size, buffers = (sum(t.numel() for t in kind()) for kind in (model.parameters, model.buffers))
    for rank in launched[0]:
        held = rank["resident"]
        assert held[0][:2] == [size + buffers, size] and 2 * size <= held[0][2] <= 2 * size + 21
        for stage in (1, 2):
            assert held[stage][0] == pytest.approx(1.5 * size, rel=0.01)
            assert held[stage][1:] == [pytest.approx(size / 2, rel=0.01), pytest.approx(size, rel=0.01), 0]
        # The 16-bit and the master partition, and the vectors, which stay whole.
        assert held[3][0] == pytest.approx(size, rel=0.02)
        # And the bucket in which gradients are reduced, of the size that the cases give.
        assert held[3][1:] == [pytest.approx(size / 2, rel=0.01), pytest.approx(size, rel=0.01), 4096]


def test_ranks_with_parts_of_their_own_draw_noise_of_their_own(launched: tuple[Found, str]) -> None:
    for rank, found in enumerate(launched[0]):
        # In stage 0 they make the same update and have to stay equal.
        assert found["shards"] == {0: {0}, 1: {rank}, 2: {rank}, 3: {rank}}


def test_what_does_not_fit_is_refused(two: dict[Any, Any]) -> None:
    precision, incomplete, names = two["refusals"]
    assert precision.startswith("optimizer.precision: DeepSpeed does not support fp16 on cpu: ")
    assert "missing: exp_avg.model.norm.weight" in incomplete
    assert "missing: model.norm.weight" in names and "unexpected: model.norm.bias" in names


def test_it_is_quiet(launched: tuple[Found, str], one: tuple[dict[Any, Any], str]) -> None:
    assert launched[1] == one[1] == ""
