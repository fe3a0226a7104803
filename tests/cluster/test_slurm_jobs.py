"""Jobs on a real cluster: they end, go on, fail and are refused as they should."""

from __future__ import annotations

import json
from typing import Any

import pytest
from slurm_runs import Runs, losses

pytestmark = [pytest.mark.slurm, pytest.mark.multiprocess, pytest.mark.slow]

LOSS_TOLERANCE = 1e-5
LONG: dict[str, Any] = {"training__max_steps": 20, "step_seconds": 0.3}


def same(found: list[float], expected: list[float]) -> bool:
    return found == pytest.approx(expected, rel=LOSS_TOLERANCE)


@pytest.mark.usefixtures("limited")
def test_two_nodes_with_two_ranks_train_as_one_process(runs: Runs) -> None:
    # A directory whose name no shell and no #SBATCH line takes as it is, and an option that would end the line.
    name = 'it\'s "50%" $(touch injected) `touch injected` #1; x'
    config = runs.config(name, hardware__gpus_per_node=2)
    run = runs.submit(config, "--nodes", "2", "--sbatch", f"comment=\\ {name}", "--sbatch", f"job-name={name}")
    runs.wait_for_end(run, "COMPLETED")
    assert run.ending == "COMPLETED"
    assert same(losses(run), runs.losses_of_one_process(config))
    plan = json.loads((run.path / "plan.json").read_text())
    assert plan["chosen"]["engine_options"]["shard_ranks"] == 4
    shown = runs.lab.call("scontrol", "show", "job", runs.job(run))
    assert f"JobName={name}\n" in shown and f"Comment=\\ {name} \n" in shown
    assert not list(runs.directory.rglob("injected*"))
    status = runs.status(run)
    assert status.startswith(f"{run.path}: completed 6 steps; job {runs.job(run)} is COMPLETED")


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


# SLURM requeues a job whose first node crashes; if it is another one, the job's own script is the first to know.
@pytest.mark.usefixtures("crashing_nodes")
@pytest.mark.parametrize(("node", "nodes", "engine"), [("node1", "node1", "single"), ("node2", "node[1-2]", "fsdp")])
def test_after_a_crash_of_a_node_a_job_goes_on_from_its_last_checkpoint(
    runs: Runs, node: str, nodes: str, engine: str
) -> None:
    config = runs.config(**LONG, checkpoint__every_steps=4, sharding__engine=engine)
    run = runs.submit(config, "--nodes", "2" if engine == "fsdp" else "1", "--sbatch", f"nodelist={nodes}")
    runs.wait_for_step(run, 6)
    runs.lab.crash(node)
    runs.wait(run, lambda: runs.state(run) != "RUNNING", "the end of the job on the crashed node")
    saved = run.latest_step
    assert saved is not None and saved >= 4 and saved % 4 == 0
    runs.lab.boot(node)
    runs.wait_for_end(run, "COMPLETED")
    first, *_, last = runs.starts(run)
    assert (first.step, last.step) == (None, saved)
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


def test_a_run_that_fails_is_not_requeued_and_its_status_says_why(runs: Runs) -> None:
    config = runs.config()
    broken = config.parent / "train.jsonl"
    broken.write_text(broken.read_text() + '{"prompt": "1 + 1 = "\n')
    run = runs.submit(config, "--nodes", "1", "--labelled-share", "1")
    runs.wait_for_end(run, "FAILED")
    assert run.ending == "FAILED" and len(runs.starts(run)) == 1
    status = runs.status(run)
    assert f"{run.path}: failed at step 0 of 6: data.train: broken records" in status
    assert f"{broken}:49: " in status
    assert f"job {runs.job(run)} is FAILED" in status and "requeued" not in status


def test_what_does_not_fit_is_not_submitted(runs: Runs) -> None:
    config = runs.config(hardware__gpu_memory="1MiB")
    ended = runs.call("--config", str(config), "--nodes", "2")
    assert ended.code == 3
    assert "nothing fits on 2 machines: the smallest plan takes" in ended.stderr
    assert not (config.parent / "run").exists() and not runs.lab.call("squeue", "--noheader")


def test_several_configs_are_an_array_each_with_its_own_run(runs: Runs) -> None:
    configs = [runs.config(name, run__seed=seed, sharding__engine="single") for seed, name in enumerate("ab")]
    ended = runs.call("--configs", *map(str, configs), "--nodes", "1", "--device", "cpu", "--at-once", "1")
    assert ended.code == 0, ended.output
    found = [runs.run(config) for config in configs]
    assert [runs.job(run).split("_")[1] for run in found] == ["0", "1"]
    for run, config in zip(found, configs, strict=True):
        runs.wait_for_end(run, "COMPLETED")
        assert losses(run) == runs.losses_of_one_process(config)
    assert runs.status(*found).count(": completed 6 steps") == 2


def test_a_run_whose_job_is_in_the_queue_is_not_submitted_again(runs: Runs) -> None:
    config = runs.config()
    run = runs.submit(config, "--nodes", "1", "--sbatch", "hold")
    assert f"{run.path}: queued (JobHeldUser) at step 0 of 6" in runs.status(run)
    again = runs.call("--config", str(config), "--device", "cpu", "--nodes", "1")
    assert again.code == 2
    assert f"{run.path}: job {runs.job(run)} of this run is PENDING; scancel {runs.job(run)} first" in again.stderr


def test_before_its_time_limit_a_job_saves_and_requeues_itself_as_often_as_needed(limited: Runs) -> None:
    config = limited.directory / "job" / "config.json"
    run = limited.run(config)
    limited.wait_for_end(run, "COMPLETED")
    starts = limited.starts(run)
    assert starts[0].step is None and starts[-1].step > 0
    assert "by STOP; requeueing the job" in limited.log(run)
    assert same(losses(run), limited.losses_of_one_process(config))
