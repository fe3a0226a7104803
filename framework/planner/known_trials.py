"""Whether blocks can be selective, found out once with a small model: where nothing is computed no trial could tell."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any
from unittest import mock

from framework.config import Config
from framework.errors import UserError
from framework.planner.recording import record_step
from framework.planner.small_models import PROBES, Family, probe_batch, probe_config
from framework.retention import locality, selective
from framework.sharding.place import Place
from framework.sharding.ranks import Ranks


def known_trials(config: Config, family: Family) -> AbstractContextManager[object]:
    """Within this context blocks are not tried before they are selective; a small model's blocks were.

    Args:
        config: of the run.
        family: of its model.

    Raises:
        UserError: only some of the model's blocks can be selective, or some hand a state on, from which they are
            replayed: what that takes goes by where the selected tokens begin.
    """
    if config.retention.policy != "selective":
        return nullcontext()
    with _noted_trials() as trials:
        plain = config.model_copy(update={"sharding": type(config.sharding)(engine="single")})
        small = probe_config(plain, family.small(PROBES[0]), PROBES[0])
        record_step(small, probe_batch(PROBES[0], packed=config.data.packing), Ranks(Place()), 1)
    if len({trial.reason is None for trial in trials}) > 1:
        raise UserError("retention.policy: a model with blocks of which only some can be selective cannot be simulated")
    if any(trial.mixers for trial in trials):
        raise UserError("retention.policy: a model with recurrent state in its blocks cannot be simulated")
    trial = trials[0]
    return mock.patch.object(selective, "try_block", lambda *_, **__: trial)


@contextmanager
def _noted_trials() -> Iterator[list[locality.Trial]]:
    """Within this context the trials of blocks are added to a list."""
    found: list[locality.Trial] = []

    def noted(*arguments: Any, **options: Any) -> locality.Trial:
        found.append(locality.try_block(*arguments, **options))
        return found[-1]

    with mock.patch.object(selective, "try_block", noted):
        yield found
