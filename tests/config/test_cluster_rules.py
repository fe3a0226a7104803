"""What a job may be told, by keys of `cluster`."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from framework.config import load_config
from framework.config.rules.cluster import limit_seconds

Problems = Callable[..., list[str]]


@pytest.mark.parametrize(
    ("limit", "seconds"),
    [
        ("90", 5400),
        ("90:30", 5430),
        ("1:02:03", 3723),
        ("2-03", 183600),
        ("2-03:04", 183840),
        ("2-03:04:05", 183845),
    ],
)
def test_a_time_limit_has_the_forms_of_sbatch(small: Path, problems: Problems, limit: str, seconds: int) -> None:
    assert limit_seconds(limit) == seconds
    given = f'cluster.time="{limit}"'
    assert load_config(small, [given, f"cluster.stop_seconds={min(seconds - 1, 65535)}"]).cluster.time == limit
    if seconds <= 65535:
        (problem,) = problems(small, given, f"cluster.stop_seconds={seconds}")
        assert problem.endswith(f"{seconds} s before the end is before the start, with {seconds} s in all")


def test_options_of_sbatch_are_checked_together(small: Path, problems: Problems) -> None:
    options = {"nodes": 2, "output": "a", "Mem": "1G", "m": 1, "nice": 0.5, "hold": False, "comment": "a\nb", "mem": ""}
    (problem,) = problems(small, f"cluster.sbatch={json.dumps(options)}")
    assert problem == (
        "--set: cluster.sbatch: hardware.nodes says nodes; output is for the submission to decide; "
        '"Mem" is not the long name of an option of sbatch, such as "mem"; '
        '"m" is not the long name of an option of sbatch, such as "mem"; '
        "nice takes a string, a whole number or true, not 0.5; hold takes a string, a whole number or true, not false; "
        'comment takes printable characters, not "a\\nb"; mem takes printable characters, not ""'
    )
    given = {"mem": "400G", "nice": 5, "exclusive": True}
    assert load_config(small, [f"cluster.sbatch={json.dumps(given)}"]).cluster.sbatch == given


def test_the_least_number_of_nodes_is_one_of_them(small: Path, problems: Problems) -> None:
    (problem,) = problems(small, "cluster.min_nodes=3", "hardware.nodes=2")
    assert problem == "--set: cluster.min_nodes: 3 is more than hardware.nodes, which is 2"
