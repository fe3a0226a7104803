"""Requests to stop: SIGINT, SIGTERM, SIGUSR2 and a file `STOP` in the run directory. Must not import torch."""

from __future__ import annotations

import math
import os
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR2)


class StopRequested(BaseException):
    """Raised by a signal while there is nothing to save yet.

    Not an `Exception`, so that no library on the way takes it for a failure of its own.
    """


class StopSignals:
    """Turns signals into a flag that the loop reads at step boundaries.

    Before `defer` a signal raises `StopRequested` where the program is: set-up has nothing worth finishing. After it, a
    signal only sets the flag. A second signal ends the process at once, with 128 + its number as the shell's convention
    is, after `on_second` was called with the signal's name and that code. One that follows within `together_seconds`
    is part of the same request: launchers pass on what the terminal has sent to every process already.

    Outside the main thread no handler can be installed; the file `STOP` still works there.
    """

    def __init__(self, on_second: Callable[[str, int], None] | None = None, *, together_seconds: float = 0.0) -> None:
        self.on_second = on_second
        self._together_seconds = together_seconds
        self._first_at = -math.inf
        self._requested: str | None = None
        self._deferred = False
        self._previous: dict[signal.Signals, Any] = {}

    def __enter__(self) -> StopSignals:
        if threading.current_thread() is threading.main_thread():
            self._previous = {number: signal.signal(number, self._handle) for number in SIGNALS}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        self._previous = {}

    def defer(self) -> None:
        """From now on signals wait for the next step boundary."""
        self._deferred = True

    def requested(self, stop_file: Path) -> str | None:
        """What asked to stop: the signal's name, `"STOP"`, or None."""
        if self._requested is None and stop_file.exists():
            self._requested = stop_file.name
        return self._requested

    def _handle(self, number: int, frame: FrameType | None) -> None:
        name = signal.Signals(number).name
        if self._requested in {known.name for known in SIGNALS}:
            if time.monotonic() - self._first_at < self._together_seconds:
                return
            code = 128 + number
            if self.on_second is not None:
                self.on_second(name, code)
            os._exit(code)
        self._requested, self._first_at = name, time.monotonic()
        if not self._deferred:
            raise StopRequested(name)
