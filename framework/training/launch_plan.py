"""What a run takes for the keys that its config leaves open: its checkpoint's plan, or a new one for all ranks."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from framework.checkpoint import Checkpoint, find_checkpoint
from framework.config import Config
from framework.errors import NoPlanError, RunError, UserError
from framework.extras import check_bitsandbytes
from framework.planner.labelled import labelled_share_of, share_for_planning
from framework.planner.launching import launch_cluster, plan_launch
from framework.planner.made_for import MadeFor
from framework.planner.overrides import RESULT_KEYS, is_open, with_overrides
from framework.planner.report import gib
from framework.sharding.deepspeed_config import OwnOptions
from framework.sharding.place import Place, check_ranks
from framework.sharding.ranks import Ranks
from framework.training.progress import Reporter
from framework.training.resuming import with_defaults
from framework.training.run_directory import RunDirectory
from framework.training.stored_plan import as_words, plan_changes, stored_plan

if TYPE_CHECKING:
    from framework.training.run import Launch

ERRORS = {error.exit_code: error for error in (RunError, UserError, NoPlanError)}


@dataclass(frozen=True)
class Resolved:
    """A run without open keys.

    Attributes:
        config: of the run.
        plan: what `plan.json` is to hold.
    """

    config: Config
    plan: dict[str, Any]


def resolve_together(
    config: Config,
    resume: str,
    directory: RunDirectory,
    ranks: Ranks,
    reporter: Reporter,
    own: OwnOptions | None = None,
) -> Resolved:
    """Fill the open keys of a config, with the same on every rank: the first one plans, and tells the others.

    Args:
        config: of the run, with open keys.
        resume: see `framework.train`.
        directory: of the run.
        ranks: of the run.
        reporter: gets the planner's report.
        own: a user's own options of DeepSpeed.

    Raises:
        NoPlanError: nothing fits.
        UserError: the run cannot be planned, or its checkpoint not be read.
        RunError: the planner cannot record what a step allocates.
    """
    plan, problem = None, None
    if ranks.is_first:
        try:
            plan = resolve(config, resume, directory, ranks.place, reporter, own=own).plan
        except (UserError, RunError) as error:
            problem = (error.exit_code, str(error))
    # It may take minutes, where a step is to be recorded.
    ranks.meet()
    plan, problem = ranks.broadcast((plan, problem))
    if problem is not None:
        code, message = problem
        raise ERRORS[code](message)
    return _resolved(config, plan, ranks.world_size)


def resolve(
    config: Config,
    resume: str,
    directory: RunDirectory,
    place: Place,
    reporter: Reporter,
    share_of: Callable[[Config], float] = labelled_share_of,
    own: OwnOptions | None = None,
) -> Resolved:
    """Fill the open keys of a config in this process; see `resolve_together`. Writes nothing in the run directory.

    Args:
        config: of the run.
        resume: as there.
        directory: of the run.
        place: of a process of the launch, for the number of processes and machines.
        reporter: gets the planner's report.
        share_of: gives the labelled share of a run's data.
        own: a user's own options of DeepSpeed.
    """
    nodes = math.ceil(place.world_size / place.local_world_size)
    cluster = launch_cluster(config, nodes=nodes, ranks_per_node=place.world_size // nodes)
    checkpoint = find_checkpoint(directory.path, resume)
    fixed: dict[str, Any] = {}
    if checkpoint is not None:
        changes = plan_changes(checkpoint.manifest, config, MadeFor.of(cluster))
        if not changes:
            plan = stored_plan(checkpoint.manifest)
            reporter.line(f"plan: that of {checkpoint.path}: {as_words(plan['overrides'])}")
            return _resolved(config, plan, cluster.ranks)
        fixed = _fixed(checkpoint, config)
        kept = f", with {as_words(fixed)} as before" if fixed else ""
        reporter.line(f"plan: made anew{kept}: {'; '.join(changes)}")
        config = _with(config, fixed, checkpoint)
    for note in cluster.notes:
        reporter.line(note)
    share = share_of(config)
    reporter.line(f"labelled share: {share:.1%} of the tokens")
    planned = plan_launch(config, cluster, share, reporter.line, fixed=fixed, own=own)
    report = replace(planned.planned.report(""), launch=None)
    reporter.drawing(report.print)
    if not planned.planned.plans:
        assert planned.planned.smallest is not None
        least = planned.planned.budget.demand(planned.planned.smallest)
        raise NoPlanError(
            f"no plan fits: the smallest that the config permits takes {gib(least)}, and a rank may take "
            f"{gib(cluster.budget_bytes)}; the report above says what holds it and what to change"
        )
    return _resolved(config, planned.to_json(), cluster.ranks)


def resolve_preview(config: Config, launch: Launch, resume: str) -> Config:
    """What a run would take for its open keys, with the planner's report on the screen.

    Without a launcher, it is about the machines that `hardware` describes.

    Args:
        config: of the run.
        launch: of this process, from `check_launch`.
        resume: see `framework.train`.

    Raises:
        UserError, NoPlanError, RunError: see `resolve_together`.
    """
    place = launch.place
    if not place.is_launched:
        nodes = math.ceil(launch.ranks / config.hardware.gpus_per_node)
        place = Place(world_size=launch.ranks, local_world_size=launch.ranks // nodes)
    with Reporter() as reporter:

        def share_of(config: Config) -> float:
            share = share_for_planning(config)
            if share.assumed:
                reporter.line(share.source)
            return share.value

        directory = RunDirectory(config.run.output_dir)
        return resolve(config, resume, directory, place, reporter, share_of, launch.own_options).config


def _fixed(checkpoint: Checkpoint, config: Config) -> dict[str, Any]:
    """What a run that continues a checkpoint keeps of it, for it would learn something else otherwise."""
    saved = Config.model_validate_json(json.dumps(with_defaults(checkpoint.manifest["config"])))
    values = {"selection.ratio": saved.resolved_ratio, "retention.kv_format": saved.retention.kv_format}
    return {key: values[key] for key in RESULT_KEYS if is_open(config, key)}


def _with(config: Config, fixed: Mapping[str, Any], checkpoint: Checkpoint) -> Config:
    found = with_overrides(config, fixed)
    if found is None:
        raise UserError(
            f"{checkpoint.path} was trained with {as_words(fixed)}, which this config does not permit: give values "
            "that go together, or start over with --resume none"
        )
    return found


def _resolved(config: Config, plan: dict[str, Any], ranks: int) -> Resolved:
    """With the values of a plan, of which some may be there already."""
    found = with_overrides(config, plan["overrides"])
    assert found is not None and not found.open_keys, plan["overrides"]
    check_ranks(found, ranks)
    check_bitsandbytes(found)
    return Resolved(found, plan)
