"""Where a run writes, what is written about it, and the machines it is meant for."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from framework.config.sections.base import Count, NonEmpty, Section


class RunConfig(Section):
    """Where a run writes, and its randomness."""

    output_dir: NonEmpty
    """The run directory, relative to the current directory."""

    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0
    """Seeds random initialisation, the order of the samples, the selection and dropout."""


class ProfileConfig(Section):
    """A profile of some steps, which are slower for it."""

    start: Count = 10
    """First step that is profiled; the one before warms the profiler up."""

    steps: Count = 3
    """Number of profiled steps."""

    shapes: bool = False
    """Also record the shapes of operators' inputs."""

    memory: bool = False
    """Also record what operators allocate."""


class LoggingConfig(Section):
    """What is written about a run."""

    every_steps: Count = 1
    """Steps between lines of metrics."""

    track_cpu_memory: bool = False
    """Without an accelerator: measure live tensor bytes, which slows each step down."""

    trackers: list[Literal["tensorboard", "wandb"]] = []
    """Where metrics go besides `metrics.jsonl`: TensorBoard event files in the run directory, Weights & Biases."""

    project: NonEmpty | None = None
    """With the tracker `wandb`: the project. Null: what W&B's environment variables say."""

    run_name: NonEmpty | None = None
    """With the tracker `wandb`: the run's name. Null: the name of the run directory."""

    profile: ProfileConfig | None = None
    """Trace of the operators of some steps, written to `profile/` in the run directory. Null: none."""

    memory_snapshot: bool | Count = False
    """On CUDA: remember where every tensor was allocated, which costs a little time, and write it to `memory/` in the
    run directory when memory runs out (true), or after this step, too."""


class PlannerConfig(Section):
    """What the planner prefers among the plans that fit.

    The most faithful ones are exact; then come those that select every labelled token, then those that do not; the
    larger their ratio, the better.
    """

    objective: Literal["balanced", "fidelity", "speed"] = "balanced"
    """`balanced`: the most faithful plan within `max_slowdown`, and the fastest one if none is. `fidelity`: the most
    faithful plan, however slow. `speed`: the fastest plan."""

    max_slowdown: Annotated[float, Field(ge=1)] = 1.5
    """With `balanced`: step time / step time of the fastest permitted plan on the same accelerators with unlimited
    memory."""

    top: Count = 5
    """Number of plans that are listed, the chosen one included."""


MemorySize = Annotated[str, Field(pattern=r"^[0-9]+(\.[0-9]+)?(GiB|MiB|GB|MB)$", examples=["80GiB"])]


class HardwareConfig(Section):
    """The machines a run is meant for, as a description."""

    nodes: Count = 1
    """Machines."""

    gpus_per_node: Count = 1
    """Accelerators per machine."""

    gpu_memory: MemorySize | None = None
    """Memory of one accelerator, such as "80GiB". Null: not described."""

    host_memory: MemorySize | None = None
    """Memory of one machine that a run may take for what it offloads, all its processes together. Null: at a launch all
    that the machine has, and no bound in a plan for other machines."""
