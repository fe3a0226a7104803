"""Jobs on a real cluster that are stopped before their end go on by themselves."""

from __future__ import annotations

import json

import pytest
from slurm_runs import LONG, Runs, losses, same

pytestmark = [pytest.mark.slurm, pytest.mark.multiprocess, pytest.mark.slow]


@pytest.mark.usefixtures("limited")
def test_on_its_signal_a_job_saves_requeues_itself_and_completes(runs: Runs) -> None:
    config = runs.config(**LONG)
    run = runs.submit(config, "--nodes", "2")
    runs.wait_for_step(run, 2)
    assert f"{run.path}: running at step" in runs.status(run)
    runs.lab.call("scancel", "--batch", "--signal=USR2", runs.job(run))
    runs.wait(run, lambda: runs.state(run) == "PENDING", "a requeue")
    stopped_at = run.latest_step
    assert stopped_at is not None and 2 <= stopped_at < 20
    status = runs.status(run)
    assert f"at step {stopped_at} of 20" in status and "requeued once" in status
    runs.wait_for_end(run, "COMPLETED")
    assert [start.step for start in runs.starts(run)] == [None, stopped_at]
    assert f"saved: stopped after step {stopped_at} by STOP; requeueing the job" in runs.log(run)
    assert same(losses(run), runs.losses_of_one_process(config))


def test_with_fewer_nodes_after_a_requeue_a_run_is_planned_and_sharded_anew(runs: Runs) -> None:
    config = runs.config(**LONG, training__global_batch_size=12, selection__ratio="auto", hardware__gpu_memory="24GiB")
    run = runs.submit(config, "--nodes", "2-3")
    runs.wait_for_step(run, 2)
    runs.lab.call("scontrol", "update", "nodename=node3", "state=drain", "reason=test")
    runs.lab.call("scancel", "--batch", "--signal=USR2", runs.job(run))
    runs.wait_for_end(run, "COMPLETED")
    assert [start.nodes for start in runs.starts(run)] == [3, 2]
    log = runs.log(run)
    assert "plan: made anew, with selection.ratio" in log and "3 ranks -> 2 ranks; 3 machines -> 2 machines" in log
    plan = json.loads((run.path / "plan.json").read_text())
    assert (plan["made_for"]["ranks"], plan["made_for"]["nodes"]) == (2, 2)
    assert plan["chosen"]["engine_options"]["shard_ranks"] == 2
    # It is kept, whatever else is chosen.
    ratio = plan["chosen"]["selection"]["ratio"]
    assert same(losses(run), runs.losses_of_one_process(config, selection__ratio=ratio))


def test_a_preempted_job_saves_and_completes_afterwards(runs: Runs) -> None:
    config = runs.config(**LONG, sharding__engine="single", cluster__partition="batch")
    run = runs.submit(config, "--nodes", "1", "--sbatch", "nodelist=node1")
    runs.wait_for_step(run, 2)
    urgent = ["--partition=urgent", "--nodelist=node1", "--exclusive", "--output=/dev/null", "--wrap=sleep 2"]
    runs.lab.call("sbatch", *urgent)
    runs.wait_for_end(run, "COMPLETED")
    first, last = runs.starts(run)
    assert first.step is None and 2 <= last.step < 20
    assert same(losses(run), runs.losses_of_one_process(config))


def test_before_its_time_limit_a_job_saves_and_requeues_itself_as_often_as_needed(limited: Runs) -> None:
    config = limited.directory / "job" / "config.json"
    run = limited.run(config)
    limited.wait_for_end(run, "COMPLETED")
    starts = limited.starts(run)
    assert starts[0].step is None and starts[-1].step > 0
    assert "by STOP; requeueing the job" in limited.log(run)
    assert same(losses(run), limited.losses_of_one_process(config))
