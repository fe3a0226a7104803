"""`"auto"` at the launch of several ranks: one plans, all do the same, and all end where one runs out of memory."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from forked import Ended, patched
from recorded_here import recorded_here
from several_ranks import start_training

from framework.config import load_config
from framework.planner.labelled import labelled_share_of
from framework.planner.launching import LaunchPlan, launch_cluster, plan_launch

pytestmark = [pytest.mark.multiprocess, pytest.mark.slow]

ENDS_BY_ITSELF_SECONDS = 60
TELL = """
import json
import framework.training.launch_plan as launch_plan
import framework.training.start as start
plain = start.run_training
def told(config, **arguments):
    with open(f"{config.run.output_dir}-rank-{rank}.json", "w") as file:
        json.dump({"config": config.to_json(), "plan": arguments["planned"]}, file)
    return plain(config, **arguments)
start.run_training = told
if rank:
    launch_plan.plan_launch = launch_plan.launch_cluster = launch_plan.labelled_share_of = None
"""


def planned(config: Path) -> LaunchPlan:
    """What the planner finds for two ranks, with the laws recorded in this process."""

    with recorded_here():
        loaded = load_config(config)
        cluster = launch_cluster(loaded, nodes=1, ranks_per_node=2)
        return plan_launch(loaded, cluster, labelled_share_of(loaded), lambda line: None)


def test_one_rank_plans_for_all_and_all_end_together(write_config: Callable[..., Path], tmp_path: Path) -> None:
    config = write_config(
        selection__strategy="none",
        retention__policy="all",
        retention__retain_linears=False,
        sharding__engine="fsdp",
        training__micro_batch_size="auto",
        training__max_steps=2,
        logging__track_cpu_memory=True,
        hardware__gpu_memory="1GiB",
    )

    def launch(*settings: str, patch: str = "") -> list[Ended]:
        options = ["--config", str(config), *(word for setting in settings for word in ("--set", setting))]
        return start_training(2, tmp_path / "outputs", options, patch).wait(timeout=ENDS_BY_ITSELF_SECONDS)

    expected = planned(config)
    chosen = expected.planned.plans[0]
    first, second = launch(patch=TELL)
    assert (first.code, second.code) == (0, 0), first.output[-4000:] + second.output[-4000:]
    told = [json.loads((tmp_path / f"run-rank-{rank}.json").read_text()) for rank in (0, 1)]
    assert told[0] == told[1]
    assert told[0] == json.loads(json.dumps({"config": chosen.config.to_json(), "plan": expected.to_json()}))
    assert json.loads((tmp_path / "run" / "plan.json").read_text()) == told[0]["plan"]
    assert "2 GPUs, 1.0 GiB each" in first.output and "step 2 takes " in first.output
    assert second.output.strip() == ""

    # The plan that the checkpoint has, until a rank of it has too little memory.
    empty = 'import torch; raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 128.00 KiB.")'
    exhausted = patched("framework.sharding.fsdp:FsdpEngine.backward", 3, [1], empty)
    first, second = launch("training.max_steps=6", patch=exhausted)
    assert (first.code, second.code) == (1, 1)
    assert "plan: that of " in first.output and "chosen " not in first.output
    fallback = expected.to_json()["fallbacks"][0]
    smaller = fallback["overrides"]["training.micro_batch_size"]
    assert smaller < chosen.config.micro_batch_size
    assert fallback["peak_allocated_bytes"] < chosen.point.ledger.peak
    assert f"next plan: --set training.micro_batch_size={smaller} (same result), " in second.output
    assert "held: weights " in second.output
    marker = json.loads((tmp_path / "run" / "FAILED").read_text())
    assert (marker["rank"], marker["code"]) == (1, 1) and "next plan: " in marker["message"]
    assert "error: rank 1 has ended: step " in first.output and "next plan: " in first.output

    nothing = ("hardware.gpu_memory=0.01MiB", "run.output_dir=" + str(tmp_path / "none"))
    for end in launch(*nothing, patch="import framework.planner.advice as advice; advice.MOST_RECORDINGS = 0"):
        assert end.code == 3 and "no plan fits: the smallest that the config permits takes " in end.output
        assert "model: " not in end.output
    assert [path.name for path in (tmp_path / "none").iterdir()] == ["FAILED"]
    assert json.loads((tmp_path / "none" / "FAILED").read_text())["code"] == 3
