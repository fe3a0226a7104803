import copy
import json
import math
from pathlib import Path

import pytest
import torch
from torch import nn

from framework.checkpoint.stored import StoredFragments
from framework.checkpoint.tensor_files import write_fragments
from framework.config import LossScaleConfig
from framework.errors import UserError
from framework.sharding.single import SingleEngine
from framework.training.optimizer import StochasticAdamW


def model(seed: int = 0, dtype: torch.dtype = torch.float32) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(6, 8), nn.GELU(), nn.Linear(8, 3)).to(dtype)


def adamw(module: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(module.parameters(), lr=1.0, betas=(0.9, 0.95), weight_decay=0.1, fused=True)


def stochastic(module: nn.Module) -> torch.optim.Optimizer:
    return StochasticAdamW(module.parameters(), lr=1.0, betas=(0.9, 0.95), eps=1e-8, seed=0)


def engine_of(precision: str, seed: int = 0, **options) -> SingleEngine:
    pure = precision == "pure_bf16"
    engine = SingleEngine(precision, torch.device("cpu"), **options)
    engine.prepare(model(seed, torch.bfloat16 if pure else torch.float32), stochastic if pure else adamw)
    return engine


def train(engine: SingleEngine, steps: int, max_grad_norm: float | None = 1.0, scale: float = 1.0) -> list:
    torch.manual_seed(1)
    inputs, targets = torch.randn(16, 6), torch.randint(3, (16,))
    inputs = inputs.to(next(engine.model.parameters()).dtype)
    results = []
    for _ in range(steps):
        with engine.autocast():
            loss = nn.functional.cross_entropy(engine.model(inputs).float(), targets) * scale
        engine.backward(loss)
        results.append(engine.step(loss=loss, max_grad_norm=max_grad_norm, learning_rate=0.01))
    return results


def test_a_step_is_torchs_clipping_and_adamw():
    engine, reference = engine_of("fp32"), model()
    optimizer = torch.optim.AdamW(reference.parameters(), lr=0.01, betas=(0.9, 0.95), weight_decay=0.1)
    results = train(engine, 4, max_grad_norm=0.05)
    torch.manual_seed(1)
    inputs, targets = torch.randn(16, 6), torch.randint(3, (16,))
    for result in results:
        loss = nn.functional.cross_entropy(reference(inputs), targets)
        loss.backward()
        norm = nn.utils.clip_grad_norm_(reference.parameters(), 0.05)
        optimizer.step()
        optimizer.zero_grad()
        assert result.loss == pytest.approx(loss.item(), rel=1e-6)
        assert result.grad_norm == pytest.approx(norm.item(), rel=1e-6)
        assert result.finite and not result.skipped
    for mine, other in zip(engine.model.parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-5, atol=1e-7)


# Largest difference of the loss to fp32 over 20 steps. bf16 has 8 bits and fp16 11; the loss starts at 1.2.
@pytest.mark.parametrize(("precision", "tolerance"), [("fp32_master", 0.01), ("pure_bf16", 0.05), ("fp16", 0.002)])
def test_every_precision_trains_close_to_fp32(precision, tolerance):
    reference = [result.loss for result in train(engine_of("fp32"), 20)]
    losses = [result.loss for result in train(engine_of(precision), 20)]
    assert losses[-1] < 0.9 * losses[0]
    assert max(abs(a - b) for a, b in zip(losses, reference, strict=True)) < tolerance


@pytest.mark.parametrize(("precision", "dtype"), [("fp32_master", torch.bfloat16), ("fp16", torch.float16)])
def test_autocast_computes_in_the_lower_precision_on_float32_weights(precision, dtype):
    engine = engine_of(precision)
    with engine.autocast():
        assert engine.model(torch.randn(2, 6)).dtype == dtype
    assert {p.dtype for p in engine.model.parameters()} == {torch.float32}


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_non_finite_gradient_changes_nothing(value):
    engine = engine_of("fp32")
    train(engine, 2)
    before = copy.deepcopy(engine.model.state_dict())
    result = train(engine, 1, scale=value)[0]
    assert not result.finite and result.skipped
    assert all(torch.equal(before[name], tensor) for name, tensor in engine.model.state_dict().items())
    assert all(p.grad is None for p in engine.model.parameters())
    assert train(engine, 1)[0].finite


def test_an_fp16_overflow_halves_the_scale_and_is_no_failure_until_the_scale_is_used_up():
    engine = engine_of("fp16")
    train(engine, 1)
    before = copy.deepcopy(engine.model.state_dict())
    result = train(engine, 1, scale=1e38)[0]
    assert result.finite and result.skipped and not math.isfinite(result.grad_norm)
    assert engine._scale.value == 2.0**15
    assert all(torch.equal(before[name], tensor) for name, tensor in engine.model.state_dict().items())
    results = train(engine, 17, scale=1e38)
    assert not results[-1].finite


@pytest.mark.parametrize("precision", ["fp32", "fp32_master", "pure_bf16", "fp16"])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_after_a_skipped_step_training_goes_on_to_the_bit_as_without_it(precision, value):
    engine, undisturbed = engine_of(precision), engine_of(precision)
    train(engine, 2)
    skipped = train(engine, 1, scale=value)[0]
    assert skipped.skipped and not skipped.finite
    results = train(engine, 3)
    train(undisturbed, 2)
    assert results == train(undisturbed, 3)
    for mine, other in zip(engine.model.parameters(), undisturbed.model.parameters(), strict=True):
        assert torch.equal(mine, other)
        states, others = engine.optimizer.state[mine], undisturbed.optimizer.state[other]
        assert states.keys() == others.keys() and all(torch.equal(states[key], others[key]) for key in states)
    assert engine.state_dict() == undisturbed.state_dict()


def save(engine: SingleEngine, directory: Path) -> tuple[StoredFragments, StoredFragments, dict]:
    """What another engine can load, through the disk."""
    write_fragments(directory / "model.safetensors", engine.weights())
    write_fragments(directory / "optimizer.safetensors", engine.optimizer_state())
    state = json.loads(json.dumps(engine.state_dict()))
    return StoredFragments(directory, "model"), StoredFragments(directory, "optimizer"), state


def scales(engine: SingleEngine, steps: int, scale: float = 1.0) -> list[float]:
    return [result.loss_scale for result in train(engine, steps, scale=scale)]


def test_the_loss_scale_follows_the_gradients():
    engine = engine_of("fp16", loss_scale=LossScaleConfig(initial=8.0, growth_interval=2, minimum=3.0))
    assert scales(engine, 5) == [8.0, 8.0, 16.0, 16.0, 32.0]
    falling = train(engine, 6, scale=1e38)
    assert [result.loss_scale for result in falling] == [32.0, 16.0, 8.0, 4.0, 3.0, 3.0]
    assert [result.finite for result in falling] == [True] * 4 + [False] * 2
    assert all(result.skipped for result in falling)
    assert scales(engine, 3) == [3.0, 3.0, 6.0]
    assert scales(engine_of("fp32"), 2) == [None, None]


def test_a_norm_that_overflows_where_no_gradient_does_lowers_the_scale_too():
    engine = engine_of("fp16", loss_scale=LossScaleConfig(initial=4.0, minimum=1.0))
    finite = []
    for _ in range(3):
        for parameter in engine.model.parameters():
            parameter.grad = torch.full_like(parameter, 1e38)
        result = engine.step(loss=torch.ones(()), max_grad_norm=1.0, learning_rate=0.1)
        finite.append((result.loss_scale, result.finite))
    assert finite == [(4.0, True), (2.0, True), (1.0, False)]


def test_a_constant_loss_scale_stays_and_an_overflow_at_it_is_a_failure():
    engine = engine_of("fp16", loss_scale=1024.0)
    assert scales(engine, 3) == [1024.0] * 3
    overflown = train(engine, 2, scale=1e38)
    assert [(result.finite, result.skipped, result.loss_scale) for result in overflown] == [(False, True, 1024.0)] * 2


def test_a_saved_loss_scale_goes_on_under_the_options_of_the_run(tmp_path):
    options = {"initial": 8.0, "growth_interval": 4}
    engine = engine_of("fp16", loss_scale=LossScaleConfig(**options))
    train(engine, 6)
    saved = save(engine, tmp_path)
    expected = scales(engine, 4)
    assert expected == [16.0, 16.0, 32.0, 32.0]
    for changed, scale in (
        (LossScaleConfig(**options), expected),
        (LossScaleConfig(**options | {"growth_interval": 3}), [16.0, 32.0, 32.0, 32.0]),
        (LossScaleConfig(minimum=20.0), [20.0] * 4),
        (512.0, [512.0] * 4),
    ):
        other = engine_of("fp16", loss_scale=changed)
        other.load(*saved)
        assert scales(other, 4) == scale


def test_a_group_multiplies_the_learning_rate():
    def grouped(module):
        head = {"params": list(module[2].parameters()), "learning_rate_scale": 4.0}
        return torch.optim.AdamW([{"params": list(module[0].parameters())}, head], lr=1.0, betas=(0.9, 0.95))

    engine, reference = SingleEngine("fp32", torch.device("cpu")), model()
    engine.prepare(model(), grouped)
    groups = [{"params": reference[0].parameters(), "lr": 0.01}, {"params": reference[2].parameters(), "lr": 0.04}]
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.95))
    train(engine, 3, max_grad_norm=None)
    torch.manual_seed(1)
    inputs, targets = torch.randn(16, 6), torch.randint(3, (16,))
    for _ in range(3):
        nn.functional.cross_entropy(reference(inputs), targets).backward()
        optimizer.step()
        optimizer.zero_grad()
    for mine, other in zip(engine.model.parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("precision", ["fp32", "fp32_master", "pure_bf16", "fp16"])
def test_saved_and_loaded_it_goes_on_to_the_bit(precision, tmp_path):
    engine = engine_of(precision)
    train(engine, 3)
    saved = save(engine, tmp_path)
    expected = [result.loss for result in train(engine, 3)]
    other = engine_of(precision, seed=7)
    other.load(*saved)
    assert [result.loss for result in train(other, 3)] == expected
    for mine, stored in zip(other.model.parameters(), engine.model.parameters(), strict=True):
        assert torch.equal(mine, stored)
        for key, value in engine.optimizer.state[stored].items():
            assert torch.equal(other.optimizer.state[mine][key], value)


def test_another_model_is_refused(tmp_path):
    engine = engine_of("fp32")
    train(engine, 1)
    saved = save(engine, tmp_path)
    other = SingleEngine("fp32", torch.device("cpu"))
    other.prepare(nn.Sequential(nn.Linear(6, 9)), adamw)
    with pytest.raises(UserError, match=r"model\.safetensors"):
        other.load(*saved)


def test_the_norm_of_bf16_gradients_is_computed_in_float32():
    engine = SingleEngine("pure_bf16", torch.device("cpu"))
    engine.prepare(nn.Linear(1000, 100, bias=False).to(torch.bfloat16), stochastic)
    weight = engine.model.weight
    engine.backward((weight.float() * 1e-3).sum())
    expected = weight.grad.double().norm().item()
    result = engine.step(loss=torch.zeros(()), max_grad_norm=None, learning_rate=0.0)
    # bf16 would be wrong by 4e-3.
    assert result.grad_norm == pytest.approx(expected, rel=2e-4)


def test_what_is_saved_is_what_is_held_and_written_to():
    engine = engine_of("fp32")
    train(engine, 1)
    weights = {fragment.name: fragment for fragment in engine.weights()}
    assert weights.keys() == dict(engine.model.named_parameters()).keys()
    for name, parameter in engine.model.named_parameters():
        fragment = weights[name]
        assert fragment.is_whole and (fragment.shape, fragment.start) == (tuple(parameter.shape), 0)
        fragment.values.fill_(3.0)
        assert (parameter == 3.0).all()
    names = {f"{state}.{name}" for name in weights for state in ("exp_avg", "exp_avg_sq", "step")}
    assert {fragment.name for fragment in engine.optimizer_state()} == names


def test_what_is_held_are_weights_gradients_and_optimizer():
    engine = engine_of("fp32")
    count = sum(p.numel() for p in engine.model.parameters())

    def held():
        return [sum(tensor.numel() for tensor in tensors) for tensors in engine.held()]

    assert held() == [count, 0, 0, 0]
    engine.backward(engine.model(torch.ones(1, 6)).sum())
    assert held() == [count, count, 0, 0]
    engine.step(loss=torch.zeros(()), max_grad_norm=None, learning_rate=0.1)
    # Two moments, and a step counter for each of four parameters.
    assert held() == [count, 0, 2 * count + 4, 0]
