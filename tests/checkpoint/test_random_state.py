"""Random states come back through a file, to the bit."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from framework.checkpoint import capture_random_state, restore_random_state, resume_random_state, seed_generators
from framework.sharding.ranks import Ranks


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
def test_the_device_continues_where_it_was(tmp_path: Path) -> None:
    torch.cuda.manual_seed_all(5)
    torch.save(capture_random_state(), tmp_path / "state.pt")
    expected = torch.rand(8, device="cuda")
    torch.rand(3, device="cuda")
    restore_random_state(torch.load(tmp_path / "state.pt", weights_only=True))
    assert torch.equal(torch.rand(8, device="cuda"), expected)


def test_the_state_of_an_absent_device_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    state = capture_random_state()
    state["cuda"] = [torch.zeros(16, dtype=torch.uint8)]
    expected = torch.rand(4)
    restore_random_state(state)
    assert torch.equal(torch.rand(4), expected)


def test_every_rank_gets_its_own_state_back(together: Any) -> None:
    states, expected = [], []
    for rank in range(3):
        seed_generators(1, 0, rank)
        states.append(capture_random_state())
        expected.append(draw())
    assert len({tuple(values) for values in expected}) == 3

    def resumed(ranks: Ranks) -> tuple[bool, list[float]]:
        # The generators belong to the process: one rank after the other.
        for rank in range(ranks.world_size):
            if ranks.rank == rank:
                back, values = resume_random_state(states, ranks, seed=1, step=7), draw()
            ranks.barrier()
        return back, values

    assert together(3, resumed) == [(True, values) for values in expected]
    anew = together(2, resumed)
    seeded = []
    for rank in range(2):
        seed_generators(1, 7, rank)
        seeded.append((False, draw()))
    assert anew == seeded


def test_seeds_differ_between_seeds_steps_and_ranks_and_repeat() -> None:
    def drawn(*place: int) -> tuple[float, ...]:
        seed_generators(*place)
        return tuple(draw())

    places = [(0, 0, 0), (0, 0, 1), (0, 1, 0), (1, 0, 0), (2**63, 5, 7)]
    assert len({drawn(*place) for place in places}) == len(places)
    assert drawn(0, 1, 0) == drawn(0, 1, 0)
    # No generator is left out.
    assert all(a != b for a, b in zip(drawn(0, 0, 0), drawn(0, 0, 1), strict=True))
