import torch
from torch import nn

from framework.training.optimizer import StochasticAdamW


def updated(**group):
    """bf16 weights after a step; the updates are smaller than the gap between two of them."""
    weight = nn.Parameter(torch.linspace(1, 2, 256).to(torch.bfloat16))
    weight.grad = torch.linspace(-1, 1, 256).to(torch.bfloat16)
    optimizer = StochasticAdamW([{"params": [weight], **group}], lr=1e-3, betas=(0.9, 0.95), eps=1e-8, seed=0)
    optimizer.step()
    return weight.detach()


def test_each_shard_is_rounded_with_noise_of_its_own():
    assert torch.equal(updated(), updated(shard=0))
    assert torch.equal(updated(shard=1), updated(shard=1))
    assert (updated(shard=0) != updated(shard=1)).any()
