"""Formats of retained keys and values."""

import torch

from framework.retention.formats import AsIs, Int8


def test_int8_rounds_to_a_254th_of_the_largest_magnitude_of_each_token_and_head():
    tensor = torch.randn(2, 3, 5, 16, generator=torch.Generator().manual_seed(0))
    tensor[0, 0, 0] = 0
    kept = Int8(tensor)
    assert kept.levels.dtype == torch.int8 and kept.levels.numel() == tensor.numel()
    assert kept.scale.shape == (2, 3, 5, 1) and kept.scale.dtype == torch.float32
    bound = tensor.abs().amax(-1, keepdim=True) / 254 * (1 + 1e-5)
    assert ((kept.restore() - tensor).abs() <= bound).all()
    assert kept.restore()[0, 0, 0].eq(0).all()


def test_int8_keeps_the_dtype_and_is_exact_on_its_own_grid():
    levels = torch.randint(-127, 128, (1, 2, 4, 8), generator=torch.Generator().manual_seed(1))
    levels[..., 0] = 127
    tensor = (levels * 0.5).to(torch.bfloat16)
    assert Int8(tensor).restore().dtype == torch.bfloat16
    assert Int8(tensor).restore().equal(tensor)


def test_as_is_does_not_pin_a_larger_storage():
    fused = torch.randn(2, 4, 30)
    part = fused[..., :10]
    kept = AsIs(part)
    assert kept.restore().equal(part)
    assert kept.restore().untyped_storage().nbytes() == part.numel() * 4
    whole = fused.transpose(1, 2)
    assert AsIs(whole).restore().data_ptr() == fused.data_ptr()
