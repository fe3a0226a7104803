"""Random states come back through a file, to the bit."""

from __future__ import annotations

import random
from pathlib import Path

import numpy as np
import pytest
import torch

from framework.checkpoint import capture_random_state, restore_random_state


def draw() -> list[float]:
    return [
        random.random(),
        random.gauss(0, 1),
        float(np.random.rand()),
        float(np.random.randn()),
        torch.rand(()).item(),
    ]


def test_every_generator_continues_where_it_was(tmp_path: Path) -> None:
    random.seed(1)
    np.random.seed(2)
    torch.manual_seed(3)
    draw()  # leaves the second half of a pair of normal numbers cached, in Python and in numpy
    torch.save(capture_random_state(), tmp_path / "state.pt")
    expected = [draw() for _ in range(3)]
    random.seed(7)
    np.random.seed(7)
    torch.manual_seed(7)
    restore_random_state(torch.load(tmp_path / "state.pt", weights_only=True))
    assert [draw() for _ in range(3)] == expected


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="the random state of a CUDA device needs a CUDA device")
def test_every_device_continues_where_it_was(tmp_path: Path) -> None:
    torch.cuda.manual_seed_all(5)
    torch.save(capture_random_state(), tmp_path / "state.pt")
    expected = torch.rand(8, device="cuda")
    torch.rand(3, device="cuda")
    restore_random_state(torch.load(tmp_path / "state.pt", weights_only=True))
    assert torch.equal(torch.rand(8, device="cuda"), expected)


def test_states_of_absent_devices_are_left_out() -> None:
    state = capture_random_state()
    state["cuda"] = [*state["cuda"], torch.zeros(16, dtype=torch.uint8)]
    expected = torch.rand(4)
    restore_random_state(state)
    assert torch.equal(torch.rand(4), expected)
