"""From a point to `plan.json`, and to a command that runs it."""

from __future__ import annotations

import itertools
import json
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from open_job import open_job
from toy_laws import TOY, MiB

from framework.config import Config, load_config
from framework.config.sections import PlannerConfig
from framework.planner.choice import Choice
from framework.planner.plan import COMPILED, Plan, launch_line, plan_json
from framework.planner.search import Budget, search
from framework.planner.space import candidates
from framework.training.plan import settings_plan

SHARE = 0.25


def options(config: Config) -> dict[str, Any]:
    return {"of": config.sharding.engine}


def plans(config: Config, budget: int, ranks: int = 8, **keywords: Any) -> list[Plan]:
    space = candidates(config, ranks=ranks, nodes=2 if ranks > 1 else 1, labelled_share=SHARE)
    found = search(space, TOY, Budget(budget), PlannerConfig(), labelled_share=SHARE)
    return [Plan.of(config, point, SHARE, engine_options=options, **keywords) for point in found.points]


def test_the_json_has_the_keys_of_a_run_without_a_planner_and_every_prediction() -> None:
    config = open_job()
    listed = plans(config, 8_000 * MiB, reserved_bytes=lambda point: point.ledger.peak + 5)
    found = json.loads(json.dumps(plan_json(listed, 8_000 * MiB)))
    plan, point = listed[0], listed[0].point
    assert found.keys() == settings_plan(plan.config, 8, {}).keys()
    assert found["chosen"].keys() == settings_plan(plan.config, 8, {})["chosen"].keys()
    assert (found["fits"], found["budget_bytes"], len(found["plans"])) == (True, 8_000 * MiB, 5)
    assert found["chosen"] == found["plans"][0]
    choice = point.choice
    assert found["chosen"] == {
        "engine": choice.engine,
        "zero_stage": plan.config.zero_stage,
        "engine_options": {"of": choice.engine},
        "selection": {"strategy": "supervised", "ratio": choice.ratio},
        "fidelity_class": "context detached",
        "warnings": [],
        "retention": {
            "policy": "selective",
            "retain_linears": choice.retain_linears,
            "kv_format": choice.kv_format,
            "placement": "device",
        },
        "micro_batch_size": choice.micro_batch_size,
        "gradient_accumulation": choice.accumulation,
        "offload_optimizer": False,
        "peak_allocated_bytes": point.ledger.peak,
        "peak_reserved_bytes": point.ledger.peak + 5,
        "host_bytes": 0,
        "binding_phase": point.ledger.binding_phase,
        "step_seconds": point.seconds,
        "tokens_per_second": 64 * 1024 / point.seconds,
        "ledger": point.ledger.to_json(),
    }
    assert SHARE < choice.ratio < 1
    peak = sum(
        term["bytes"] for term in found["chosen"]["ledger"] if found["chosen"]["binding_phase"] in term["phases"]
    )
    assert peak == found["chosen"]["peak_allocated_bytes"]


def test_a_plan_of_compiled_blocks_says_that_it_predicts_others() -> None:
    listed = plans(open_job(training__compile=True), 8_000 * MiB)
    assert listed
    assert all(plan.warnings == (COMPILED,) for plan in listed)


def test_nothing_fits() -> None:
    assert plan_json([], 7) == {"fits": False, "budget_bytes": 7, "chosen": None, "plans": []}


@pytest.mark.parametrize(
    ("changes", "ranks", "nodes", "start"),
    [
        (
            {"sharding__engine": "single", "sharding__zero_stage": ...},
            1,
            1,
            "python launchers/train.py --config open.json",
        ),
        ({"sharding__engine": "deepspeed"}, 8, 1, "deepspeed --num_gpus 8 launchers/train.py --config open.json"),
        (
            {"sharding__engine": "fsdp", "sharding__zero_stage": ...},
            8,
            1,
            "torchrun --nproc-per-node 8 launchers/train.py --config open.json",
        ),
        (
            {"sharding__engine": "deepspeed"},
            8,
            2,
            "torchrun --nnodes 2 --nproc-per-node 4 --rdzv-backend c10d --rdzv-endpoint HOST:29400 launchers/train.py "
            "--config open.json",
        ),
    ],
)
def test_the_launch_line_starts_the_plan(
    tmp_path: Path, changes: dict[str, Any], ranks: int, nodes: int, start: str
) -> None:
    config = open_job(**changes)
    plan = plans(config, 1 << 50, ranks)[0]
    line = launch_line(plan, "open.json", nodes)
    assert line.startswith(start)
    path = tmp_path / "open.json"
    path.write_text(json.dumps(config.model_dump(mode="json", exclude_unset=True)))
    words = shlex.split(line)
    settings = [after for word, after in itertools.pairwise(words) if word == "--set"]
    loaded = load_config(path, settings)
    assert loaded == plan.config
    assert Choice.of(loaded, ranks, SHARE) == plan.point.choice


def test_planning_imports_neither_torch_nor_matplotlib() -> None:
    program = (
        "import sys\n"
        "import framework.planner.changes, framework.planner.plan, framework.planner.report, framework.planner.plots\n"
        "print([name for name in ('torch', 'transformers', 'matplotlib') if name in sys.modules])\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, timeout=120)
    assert done.stdout.strip() == "[]"
