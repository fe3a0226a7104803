"""The failures that a command line reports in one line instead of with a traceback."""

from __future__ import annotations


class UserError(ValueError):
    """A bad config, bad data or bad arguments; nothing was started.

    The message is for people: what is wrong, where, and what to do about it.
    """

    exit_code = 2


class NoPlanError(UserError):
    """Nothing that a config permits fits the memory that it may take; nothing was started."""

    exit_code = 3


class RunError(RuntimeError):
    """A failure while running, such as a non-finite loss or a full disk; what was saved before is kept."""

    exit_code = 1
