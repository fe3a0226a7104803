import copy

import pytest
import torch
from torch import nn

from framework.extras import bitsandbytes
from framework.training import eight_bit
from framework.training import optimizer as module
from framework.training.eight_bit import EightBitAdamW, eight_bit_state_bytes
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


OPTIONS = {"lr": 0.01, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.1}
# With and without a last block that is not full, of fewer elements than are held in 8 bits, and not contiguous.
SHAPES = [(64, 64), (300, 37), (63, 65), (10,)]


def weights_of(shapes=SHAPES):
    torch.manual_seed(0)
    return [nn.Parameter(torch.randn(shape)) for shape in shapes] + [nn.Parameter(torch.randn(80, 60).t())]


def eight_bit_steps(optimizer, weights, steps, seed=0):
    """Gradients of very different sizes."""
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        for weight in weights:
            sizes = torch.rand(weight.shape, generator=generator) ** 8
            weight.grad = torch.randn(weight.shape, generator=generator) * sizes
        optimizer.step()


def test_eight_bit_updates_are_those_of_bitsandbytes():
    ours, theirs = weights_of(), weights_of()
    eight_bit_steps(EightBitAdamW(ours, **OPTIONS), ours, 20)
    eight_bit_steps(bitsandbytes().optim.AdamW8bit(theirs, **OPTIONS), theirs, 20)
    assert all(map(torch.equal, ours, theirs))
    assert not any(map(torch.equal, ours, weights_of()))


def test_eight_bit_moments_are_close_to_those_in_float32():
    torch.manual_seed(0)
    start = torch.randn(300, 37)
    ours, theirs = nn.Parameter(start.clone()), nn.Parameter(start.clone())
    optimizer, reference = EightBitAdamW([ours], **OPTIONS), torch.optim.AdamW([theirs], **OPTIONS)
    for _ in range(20):
        ours.grad = torch.randn(300, 37)
        theirs.grad = ours.grad.clone()
        optimizer.step(), reference.step()
    found, wanted = optimizer.exported_state(ours), reference.state[theirs]
    assert found.keys() == wanted.keys() and found["step"] == wanted["step"] == 20
    for name in ("exp_avg", "exp_avg_sq"):
        assert found[name].dtype == torch.float32
        assert (found[name] - wanted[name]).norm() < 0.05 * wanted[name].norm()
    assert (ours - theirs).norm() < 0.05 * (theirs - start).norm()


def test_moments_that_leave_and_come_back_go_on_to_the_bit():
    """Blocks whose largest magnitude is negative too, whose code is not that magnitude."""
    weights = weights_of()
    optimizer = EightBitAdamW(weights, **OPTIONS)
    eight_bit_steps(optimizer, weights, 7)
    twins = [nn.Parameter(weight.detach().clone()) for weight in weights]
    other = EightBitAdamW(twins, **OPTIONS)
    for weight, twin in zip(weights, twins, strict=True):
        other.import_state(twin, optimizer.exported_state(weight))
        mine, theirs = optimizer.state[weight], other.state[twin]
        assert mine.keys() == theirs.keys()
        assert all(
            torch.equal(theirs[name], value) and theirs[name].dtype == value.dtype for name, value in mine.items()
        )
    eight_bit_steps(optimizer, weights, 5, seed=1), eight_bit_steps(other, twins, 5, seed=1)
    assert all(map(torch.equal, weights, twins))
    negative = [state["exp_avg_codes"] for state in optimizer.state.values() if "exp_avg_codes" in state]
    assert any((codes == 0).any() for codes in negative)


@pytest.mark.parametrize("scale", [0.0, 1e-30, 1e-38, 1e30])
def test_moments_of_any_size_come_back_as_they_were(scale, monkeypatch):
    monkeypatch.setattr(eight_bit, "_SLAB", 2048)
    (weight,) = weights_of([(300, 37)])[:1]
    optimizer = EightBitAdamW([weight], **OPTIONS)
    torch.manual_seed(0)
    moments = {"exp_avg": scale * torch.randn(300, 37), "exp_avg_sq": scale * torch.rand(300, 37)}
    optimizer.import_state(weight, {"step": torch.tensor(3.0), **moments})
    once = optimizer.exported_state(weight)
    optimizer.import_state(weight, once)
    again = optimizer.exported_state(weight)
    for name, moment in moments.items():
        assert torch.equal(once[name], again[name])
        torch.testing.assert_close(once[name], moment, rtol=0.04, atol=0.01 * scale)


def test_eight_bit_state_takes_two_bytes_and_a_thirty_second():
    weights = weights_of()
    optimizer = EightBitAdamW(weights, **OPTIONS)
    assert optimizer.exported_state(weights[0]) == {}
    eight_bit_steps(optimizer, weights, 1)
    held = sum(v.nbytes for state in optimizer.state.values() for name, v in state.items() if name != "step")
    assert held == eight_bit_state_bytes(weights)
    assert eight_bit_state_bytes([torch.empty(4095)]) == 8 * 4095
    assert eight_bit_state_bytes([torch.empty(1024, 1024, device="meta")]) == 2 * 2**20 + 8 * 2**12
