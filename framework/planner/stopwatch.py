"""How long something takes, by the median of several rounds within a limit."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable

import torch

from framework.sharding.ranks import Ranks

ROUND_SECONDS = 0.01
"""Shorter calls are repeated within a round, so that waiting for the device does not count."""

MAX_ROUNDS = 15
MAX_REPEATS = 1000


class Stopwatch:
    """Times calls, on CUDA with the work that they start.

    Args:
        device: that the calls run on.
        limit: seconds for the rounds of one measurement, apart from two calls before them.
        clock: seconds since whenever; replaced in tests.
    """

    def __init__(self, device: torch.device, limit: float, clock: Callable[[], float] = time.perf_counter) -> None:
        self.device, self.limit, self.clock = device, limit, clock

    def seconds(self, call: Callable[[], object], together: Ranks | None = None) -> float:
        """Median seconds of one call.

        Args:
            call: to time. It is called once before, to be compiled, loaded and cached.
            together: ranks that all make this call at once and wait for each other in it.
        """
        self._round(call, 1)
        once = self._round(call, 1)
        if together is not None:
            once = together.max([once])[0]
        if once >= self.limit:
            return once
        repeats = MAX_REPEATS if once <= 0 else min(MAX_REPEATS, math.ceil(ROUND_SECONDS / once))
        rounds = MAX_ROUNDS if once <= 0 else max(1, min(MAX_ROUNDS, int(self.limit / (repeats * once))))
        return statistics.median(self._round(call, repeats) for _ in range(rounds)) / repeats

    def _round(self, call: Callable[[], object], repeats: int) -> float:
        self._wait()
        started = self.clock()
        for _ in range(repeats):
            call()
        self._wait()
        return self.clock() - started

    def _wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
