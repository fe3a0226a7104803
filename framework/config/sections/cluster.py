"""How a run is handed to SLURM."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field

from framework.config.sections.base import Count, CountOrZero, NonEmpty, Section

TimeLimit = Annotated[
    str,
    Field(pattern=r"^([0-9]+(:[0-9]{2}){0,2}|[0-9]+-[0-9]{1,2}(:[0-9]{2}){0,2})$", examples=["12:00:00", "2-00:00:00"]),
]


class ClusterConfig(Section):
    """How `launchers/submit.py` hands a run to SLURM; the machines are those of the section `hardware`."""

    min_nodes: Count | None = None
    """The run also starts on this many of `hardware.nodes` machines, if no more are free. Null: on all of them only."""

    time: TimeLimit | None = None
    """Time limit, as `[DAYS-]HH:MM:SS`. A run that needs longer saves, and goes on in the same job. Null: the
    partition's."""

    partition: NonEmpty | None = None
    """Null: the cluster's default."""

    account: NonEmpty | None = None
    """Whom the time is charged to. Null: the user's default."""

    qos: NonEmpty | None = None
    """Quality of service. Null: the default."""

    gpu_option: Literal["gpus-per-node", "gres", "none"] = "gpus-per-node"
    """The option of SLURM that asks for `hardware.gpus_per_node` accelerators; "none" asks for none."""

    gpu_type: NonEmpty | None = None
    """Kind of accelerator, as the cluster calls it, such as "a100". Null: any."""

    cpus_per_node: Count | None = None
    """Processors that all ranks of a machine share. Null: what the cluster gives."""

    launcher: Literal["torchrun", "deepspeed"] = "torchrun"
    """What starts the ranks: `torchrun` on each machine, started by `srun`; or `deepspeed` on the first one, which
    reaches the others with `pdsh` and needs to be allowed to."""

    setup: list[NonEmpty] = []
    """Shell commands of the batch script before the ranks are started, such as "module load cuda"."""

    stop_seconds: Annotated[int, Field(ge=1, le=65535)] = 300
    """Seconds before the time limit at which the run is asked to save and stop."""

    max_requeues_without_progress: CountOrZero = 3
    """So many times in a row a job goes on without a new checkpoint; the next time the run is `FAILED`."""

    sbatch: dict[str, Any] = {}
    """Further options of `sbatch` by their long names, such as {"mem": "400G", "exclusive": true}; a value is a string,
    a whole number, or true for an option that takes none."""
