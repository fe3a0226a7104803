import copy

import pytest
import torch
from torch import nn

from framework.training import optimizer as module
from framework.training.optimizer import StochasticAdamW, round_stochastically


def test_stochastic_rounding_is_unbiased_and_picks_a_neighbour():
    generator = torch.Generator().manual_seed(0)
    values = torch.tensor([1.0 + 0.3 / 128, -1.0 - 0.3 / 128, 3.14159, 1e-3, -7e-20, 0.0, 1.5])
    draws = torch.stack([round_stochastically(values, generator) for _ in range(20_000)]).double()
    gap = torch.tensor([2**-7, 2**-7, 2**-6, 2**-17, 2.0**-71, 1.0, 1.0], dtype=torch.float64)
    assert ((draws - values.double()).abs() < gap).all()
    # The mean of n draws deviates by at most gap / 2 / sqrt(n) in one standard deviation.
    assert ((draws.mean(0) - values.double()).abs() <= 4 * gap / 2 / 20_000**0.5).all()
    assert (draws[:, 5:] == values[5:].double()).all()
    assert draws[:, 0].unique().numel() == 2


def test_float32_parameters_follow_torch_adamw_exactly():
    torch.manual_seed(0)
    ours = nn.Linear(5, 3)
    theirs = copy.deepcopy(ours)
    options = {"lr": 0.01, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.1}
    optimizer = StochasticAdamW(ours.parameters(), seed=0, **options)
    reference = torch.optim.AdamW(theirs.parameters(), **options)
    for _ in range(5):
        for mine, other in zip(ours.parameters(), theirs.parameters(), strict=True):
            mine.grad = torch.randn_like(mine)
            other.grad = mine.grad.clone()
        optimizer.step()
        reference.step()
    for mine, other in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-6, atol=1e-7)


def bf16_steps(seed: int, steps: int = 1, size: int = 20_000) -> torch.Tensor:
    weight = nn.Parameter(torch.full((size,), 1.0, dtype=torch.bfloat16))
    optimizer = StochasticAdamW([weight], lr=1e-4, betas=(0.9, 0.95), eps=1e-8, seed=seed)
    for _ in range(steps):
        weight.grad = torch.ones_like(weight)
        optimizer.step()
    return weight.detach()


def test_an_update_far_below_the_gap_of_bf16_survives_in_expectation():
    # A constant gradient moves the weight by the learning rate at every step; the gap below 1 is 1/256, 39 times that,
    # so that rounding to nearest would never move it.
    updated = bf16_steps(seed=0, steps=10)
    moved = 1.0 - updated.double().mean().item()
    deviation = (10 * 1e-4 * 2**-8 / 20_000) ** 0.5
    # Also the moments are rounded, which moves single updates, not their mean, by some 1 %.
    assert moved == pytest.approx(10 * 1e-4, abs=4 * deviation + 2e-5)


def test_the_noise_is_a_function_of_seed_and_step():
    assert torch.equal(bf16_steps(seed=3, steps=3), bf16_steps(seed=3, steps=3))
    assert not torch.equal(bf16_steps(seed=3, steps=3), bf16_steps(seed=4, steps=3))


def test_moments_of_bf16_weights_are_bf16():
    weight = nn.Parameter(torch.ones(4, dtype=torch.bfloat16))
    optimizer = StochasticAdamW([weight], lr=1e-4, betas=(0.9, 0.95), eps=1e-8, seed=0)
    weight.grad = torch.ones_like(weight)
    optimizer.step()
    state = optimizer.state[weight]
    assert state["exp_avg"].dtype == state["exp_avg_sq"].dtype == torch.bfloat16


def test_chunks_do_not_change_a_float32_update(monkeypatch):
    torch.manual_seed(0)
    start, gradient = torch.randn(10, 7), torch.randn(7, 10).t()
    results = []
    for chunk in (1 << 24, 16):
        monkeypatch.setattr(module, "CHUNK", chunk)
        weight = nn.Parameter(start.clone())
        optimizer = StochasticAdamW([weight], lr=0.1, betas=(0.9, 0.95), eps=1e-8, seed=0)
        weight.grad = gradient.clone()
        optimizer.step()
        results.append(weight.detach())
    assert torch.equal(*results)
