"""What CUDA's allocator counts for tensors of some sizes."""

from __future__ import annotations

import pytest

from framework.planner.cuda import block_bytes, rounded


def test_small_tensors_are_rounded_up():
    assert [rounded(size) for size in (0, 1, 512, 513)] == [0, 512, 512, 1024]


@pytest.mark.parametrize(
    ("size", "expected"),
    [
        (3 * 2**20 + 1, 3 * 2**20 + 512),
        # 4095 rows of 32000 float32 logits for each of 4 sequences: 500 KiB short of a multiple of 2 MiB.
        (4 * 4095 * 32000 * 4, 4 * 4096 * 32000 * 4),
        (21 * 2**20 - 100, 22 * 2**20),
        (21 * 2**20 - 600, 21 * 2**20 - 512),
    ],
)
def test_large_tensors_keep_a_rest_of_their_segment_that_is_not_worth_splitting_off(size, expected):
    assert block_bytes(size) == expected
