from __future__ import annotations

from pathlib import Path

import pytest
from open_job import open_job

from framework.cluster.directives import directive_lines, options_of
from framework.errors import UserError


def lines(directory: str = "/runs/a/slurm", array: str | None = None, **changes: object) -> list[str]:
    return directive_lines(options_of(open_job(**changes), Path(directory), name="a", array=array))


def test_every_option_comes_from_the_config() -> None:
    found = lines(
        cluster__time="1-00:00:00",
        cluster__partition="gpu",
        cluster__account="us",
        cluster__qos="long",
        cluster__cpus_per_node=64,
        cluster__gpu_type="a100",
        cluster__stop_seconds=120,
        cluster__sbatch={"mem": "400G", "exclusive": True, "nice": 5, "job-name": "b"},
    )
    assert found == [
        "#SBATCH --job-name=b",
        "#SBATCH --nodes=2",
        "#SBATCH --ntasks-per-node=1",
        "#SBATCH --gpus-per-node=a100:4",
        "#SBATCH --cpus-per-task=64",
        "#SBATCH --time=1-00:00:00",
        "#SBATCH --partition=gpu",
        "#SBATCH --account=us",
        "#SBATCH --qos=long",
        "#SBATCH --requeue",
        "#SBATCH --open-mode=append",
        "#SBATCH --signal=B:USR2@120",
        "#SBATCH --output=/runs/a/slurm/%j.log",
        "#SBATCH --mem=400G",
        "#SBATCH --exclusive",
        "#SBATCH --nice=5",
    ]


def test_accelerators_are_asked_for_as_the_cluster_wants_it() -> None:
    gres = lines(cluster__gpu_option="gres", cluster__gpu_type="a100")
    assert "#SBATCH --gres=gpu:a100:4" in gres and not any("gpus-per-node" in line for line in gres)
    assert "#SBATCH --gres=gpu:4" in lines(cluster__gpu_option="gres")
    assert not any("gpu" in line for line in lines(cluster__gpu_option="none"))


def test_a_range_of_nodes_has_no_tasks_per_node() -> None:
    found = lines(cluster__min_nodes=1)
    assert "#SBATCH --nodes=1-2" in found and not any("ntasks" in line for line in found)


def test_an_array_has_logs_of_its_own() -> None:
    found = lines(array="0-3%2")
    assert "#SBATCH --array=0-3%2" in found and "#SBATCH --output=/runs/a/slurm/%A_%a.log" in found


def test_names_are_quoted_and_percent_signs_are_not_patterns() -> None:
    found = lines("/my \"50%\" #1 'runs'/slurm")
    assert '#SBATCH --output="/my \\"50%%\\" #1 \'runs\'/slurm/%j.log"' in found


def test_what_no_line_can_hold_is_refused() -> None:
    with pytest.raises(UserError, match="backslash"):
        lines("/a\\b/slurm")
    with pytest.raises(UserError, match=r"--partition: 'a\\n#SBATCH --begin=now'"):
        lines(cluster__partition="a\n#SBATCH --begin=now")
