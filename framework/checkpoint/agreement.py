"""Errors of one rank that become errors of all: nobody waits for a rank that has given up."""

from __future__ import annotations

from framework.errors import RunError
from framework.sharding.ranks import Ranks


def agree(ranks: Ranks, error: BaseException | None) -> None:
    """Return on every rank if there was no error on any, else raise on every one.

    Raises:
        BaseException: this rank's own error, if it is not a `RunError`; the others' word for it would say less.
        RunError: the first error by rank, with the rank if there are several.
    """
    try:
        messages = ranks.gather(None if error is None else str(error) if isinstance(error, RunError) else repr(error))
        if error is not None and (ranks.world_size == 1 or not isinstance(error, RunError)):
            raise error
        for rank, message in enumerate(messages):
            if message is not None:
                raise RunError(f"rank {rank}: {message}") from error
    finally:
        # Its traceback refers to this frame: a cycle would keep alive what the failed call held.
        del error
