"""Checks over keys of `cluster`."""

from __future__ import annotations

import json
import re
from typing import Any

from framework.config.rules.registry import rule

NAME = re.compile(r"[a-z][a-z0-9-]+")

INSTEAD = {
    "nodes": "hardware.nodes",
    "gpus-per-node": "hardware.gpus_per_node",
    "time": "cluster.time",
    "partition": "cluster.partition",
    "account": "cluster.account",
    "qos": "cluster.qos",
    "cpus-per-task": "cluster.cpus_per_node",
    "signal": "cluster.stop_seconds",
}
"""Options of `sbatch` that a key stands for."""

DECIDED = ("array", "chdir", "error", "no-requeue", "ntasks", "ntasks-per-node", "open-mode", "output", "requeue")
"""Those that a submission decides, because stopping and going on depend on them."""


@rule("cluster.min_nodes", "hardware.nodes")
def _min_nodes(least: int | None, nodes: int) -> tuple[str, str] | None:
    if least is not None and least > nodes:
        return "cluster.min_nodes", f"{least} is more than hardware.nodes, which is {nodes}"
    return None


@rule("cluster.stop_seconds", "cluster.time")
def _stop_seconds(stop: int, limit: str | None) -> tuple[str, str] | None:
    if limit is not None and stop >= (seconds := limit_seconds(limit)):
        return "cluster.stop_seconds", f"{stop} s before the end is before the start, with {seconds} s in all"
    return None


@rule("cluster.sbatch")
def _options(options: dict[str, Any]) -> tuple[str, str] | None:
    problems = [problem for name, value in options.items() if (problem := _option_problem(name, value)) is not None]
    return ("cluster.sbatch", "; ".join(problems)) if problems else None


def _option_problem(name: str, value: Any) -> str | None:
    if not NAME.fullmatch(name):
        return f'"{name}" is not the long name of an option of sbatch, such as "mem"'
    if name in INSTEAD:
        return f"{INSTEAD[name]} says {name}"
    if name in DECIDED:
        return f"{name} is for the submission to decide"
    if value is not True and (isinstance(value, bool) or not isinstance(value, str | int)):
        return f"{name} takes a string, a whole number or true, not {json.dumps(value)}"
    if not str(value).isprintable() or value == "":
        return f"{name} takes printable characters, not {json.dumps(value)}"
    return None


def limit_seconds(limit: str) -> int:
    """Seconds of a time limit, which is written in one of the forms that `sbatch` takes.

    These are `minutes`, `minutes:seconds`, `hours:minutes:seconds`, `days-hours`, `days-hours:minutes` and
    `days-hours:minutes:seconds`; see `man sbatch`.
    """
    days, dash, rest = limit.rpartition("-")
    parts = [int(part) for part in rest.split(":")]
    if dash:
        hours, minutes, seconds = [*parts, 0, 0][:3]
    elif len(parts) == 3:
        hours, minutes, seconds = parts
    else:
        hours, (minutes, seconds) = 0, [*parts, 0][:2]
    return ((int(days or 0) * 24 + hours) * 60 + minutes) * 60 + seconds
