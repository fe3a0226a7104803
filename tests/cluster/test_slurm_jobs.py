"""Jobs on a real cluster: they end, lose machines, fail and are refused as they should."""

from __future__ import annotations

import json

import pytest
from slurm_runs import LONG, Runs, losses, same

pytestmark = [pytest.mark.slurm, pytest.mark.multiprocess, pytest.mark.slow]


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
    first, second, *_ = runs.starts(run)
    assert (first.step, second.step) == (None, saved)
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
