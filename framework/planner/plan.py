"""A plan: a point of the search with the config, the engine's options and the command that it implies.

Must not import torch.
"""

from __future__ import annotations

import json
import shlex
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from framework.config import Config
from framework.planner.choice import Fidelity
from framework.planner.context_warnings import context_warnings
from framework.planner.overrides import overrides, with_overrides
from framework.planner.search import Point
from framework.training.plan import settings_plan

COMPILED = "bytes and seconds are predicted for blocks that run operator by operator; with training.compile they differ"
"""A warning of plans with compiled blocks."""


@dataclass(frozen=True)
class Plan:
    """One way to run a job, with nothing left open.

    Attributes:
        point: the choice and what it takes.
        config: the run's, resolved.
        overrides: what the choice gives the open keys of the config: key -> value, as `--set` takes it.
        fidelity: class of its gradient.
        engine_options: what the engine is told; DeepSpeed's JSON.
        reserved_bytes: at the peak, fragmentation included; None if that is not predicted.
        warnings: of what its gradient or the prediction leaves out.
    """

    point: Point
    config: Config
    overrides: Mapping[str, Any]
    fidelity: Fidelity
    engine_options: Mapping[str, Any]
    reserved_bytes: int | None
    warnings: tuple[str, ...]

    @classmethod
    def of(
        cls,
        config: Config,
        point: Point,
        labelled_share: float,
        *,
        engine_options: Callable[[Config], Mapping[str, Any]],
        reserved_bytes: Callable[[Point], int | None] = lambda point: None,
    ) -> Plan:
        """The plan of a point.

        Args:
            config: of the run, with its open keys.
            point: of a choice that the config permits.
            labelled_share: labelled tokens / all tokens of the data.
            engine_options: gives those of a resolved config.
            reserved_bytes: gives what the allocator reserves at the peak.
        """
        values = overrides(config, point.choice, labelled_share)
        resolved = with_overrides(config, values)
        assert resolved is not None, f"{point.choice} is not permitted"
        fidelity = point.choice.fidelity(labelled_share)
        warnings = context_warnings(resolved, point.choice, labelled_share)
        if resolved.training.compile:
            warnings = (*warnings, COMPILED)
        return cls(point, resolved, values, fidelity, engine_options(resolved), reserved_bytes(point), warnings)

    @property
    def tokens_per_second(self) -> float | None:
        """Tokens of all ranks, padding included; None where the data has no sequence length."""
        length = self.config.data.sequence_length
        return None if length is None else self.config.training.global_batch_size * length / self.point.seconds

    def to_json(self) -> dict[str, Any]:
        """The plan with the keys of `settings_plan`, and every prediction filled in."""
        choice, ledger = self.point.choice, self.point.ledger
        settings = settings_plan(self.config, choice.ranks, dict(self.engine_options))
        chosen: dict[str, Any] = settings["chosen"]
        return chosen | {
            "selection": {"strategy": choice.strategy, "ratio": choice.ratio},
            "fidelity_class": self.fidelity,
            "warnings": [*self.warnings],
            "peak_allocated_bytes": ledger.peak,
            "peak_reserved_bytes": self.reserved_bytes,
            "host_bytes": ledger.host_bytes,
            "binding_phase": ledger.binding_phase,
            "step_seconds": self.point.seconds,
            "tokens_per_second": self.tokens_per_second,
            "ledger": ledger.to_json(),
        }


def plan_json(plans: Sequence[Plan], budget_bytes: int) -> dict[str, Any]:
    """The plans of a job in the shape of `plan.json`; `chosen` is null and `plans` is empty if nothing fits.

    Args:
        plans: that fit, the best first.
        budget_bytes: of one rank.
    """
    listed = [plan.to_json() for plan in plans]
    chosen = listed[0] if listed else None
    return {"fits": bool(listed), "budget_bytes": budget_bytes, "chosen": chosen, "plans": listed}


def launch_line(plan: Plan, config_path: str, nodes: int = 1, given: Sequence[str] = ()) -> str:
    """The command that runs a plan; on several machines, the one to start on each, with HOST for the first one's name.

    Args:
        plan: to run.
        config_path: of the config, with its open keys.
        nodes: number of machines.
        given: `KEY=VALUE` that the plan was made with.
    """
    choice = plan.point.choice
    per_node = str(choice.ranks // nodes)
    if choice.engine == "single":
        words = ["python"]
    elif nodes > 1:
        words = ["torchrun", "--nnodes", str(nodes), "--nproc-per-node", per_node]
        words += ["--rdzv-backend", "c10d", "--rdzv-endpoint", "HOST:29400"]
    elif choice.engine == "deepspeed":
        words = ["deepspeed", "--num_gpus", per_node]
    else:
        words = ["torchrun", "--nproc-per-node", per_node]
    words += ["launchers/train.py", "--config", config_path]
    for override in (*given, *(f"{key}={as_set(value)}" for key, value in plan.overrides.items())):
        words += ["--set", override]
    return shlex.join(words)


def as_set(value: Any) -> str:
    """A JSON value as `--set` takes it: strings bare, everything else as JSON."""
    return value if isinstance(value, str) else json.dumps(value)
