"""Metrics on their way to TensorBoard and Weights & Biases. Must not import torch: trackers are imported when opened.

A tracker gets the records that `metrics.jsonl` gets, and after a resume its curves go on where the checkpoint is, as
`metrics.jsonl` does. What a tracker's library raises while the run is under way costs the tracker, not the run.
"""

from __future__ import annotations

import importlib.util
import json
import math
from collections.abc import Callable, Sequence
from types import TracebackType
from typing import TYPE_CHECKING, Any, Protocol

from framework.errors import UserError

if TYPE_CHECKING:
    from framework.config import Config
    from framework.training.metrics import EvalRecord, TrainRecord
    from framework.training.run_directory import RunDirectory

PACKAGES = {"tensorboard": "tensorboard", "wandb": "wandb"}


class Tracker(Protocol):
    """Where records go; all methods may raise whatever the library behind them raises.

    Attributes:
        name: as in `logging.trackers`.
    """

    name: str

    def write(self, record: TrainRecord | EvalRecord) -> None:
        """Take one record."""
        ...

    def flush(self) -> None:
        """Put everything written so far where a kill cannot reach it; a checkpoint is about to be saved."""
        ...

    def close(self, *, failed: bool) -> None:
        """No record comes any more."""
        ...


class TensorBoardTracker:
    """Event files in the run directory.

    A resumed run adds a file that tells TensorBoard to hide what earlier ones hold beyond the checkpoint.
    """

    name = "tensorboard"

    def __init__(self, directory: RunDirectory, step: int, description: dict[str, Any]) -> None:
        from torch.utils.tensorboard import SummaryWriter

        first = not any(directory.tensorboard.glob("events.out.tfevents.*"))
        self._writer = SummaryWriter(str(directory.tensorboard), purge_step=None if first else step + 1)
        if first:
            for name, value in description.items():
                # Text is Markdown, in which an indented block keeps its shape.
                text = json.dumps(value, indent=2).replace("\n", "\n    ")
                self._writer.add_text(name, f"    {text}", global_step=step)
        self._writer.flush()

    def write(self, record: TrainRecord | EvalRecord) -> None:
        """One point in every curve."""
        for name, value in curve_points(record).items():
            self._writer.add_scalar(name, value, global_step=record.step)

    def flush(self) -> None:
        """To the file system."""
        self._writer.flush()

    def close(self, *, failed: bool) -> None:
        """Close the file."""
        self._writer.close()


class WandbTracker:
    """A run at Weights & Biases, or with `WANDB_MODE=offline` on disk until `wandb sync`.

    The run's id, and the last step of each kind that was sent, are kept in the run directory. W&B takes no point back,
    so what it has been sent beyond the checkpoint stays, and a resumed run does not send these steps again.
    """

    name = "wandb"

    def __init__(
        self, directory: RunDirectory, step: int, description: dict[str, Any], project: str | None, run_name: str | None
    ) -> None:
        import wandb

        self._state_file = directory.wandb_state
        state: dict[str, Any] = {"id": None, "sent": {}}
        if self._state_file.exists():
            state = json.loads(self._state_file.read_text(encoding="utf-8"))
        self._run = wandb.init(
            project=project,
            name=run_name or directory.path.resolve().name,
            id=state["id"],
            resume="allow",
            dir=str(directory.path),
            config=description if state["id"] is None else None,
        )
        # W&B's own counter only goes up; ours is the axis of every curve.
        self._run.define_metric("step", hidden=True)
        self._run.define_metric("*", step_metric="step")
        self._state = state | {"id": self._run.id}
        self._sent_before = dict(state["sent"])
        self._keep_state()

    def write(self, record: TrainRecord | EvalRecord) -> None:
        """One point in every curve, unless an earlier start of this run has sent it."""
        kind, step = record.to_json()["kind"], record.step
        if step <= self._sent_before.get(kind, -1):
            return
        self._run.log({**curve_points(record), "step": step}, step=max(step, self._run.step))
        self._state["sent"][kind] = step
        self._keep_state()

    def flush(self) -> None:
        """Nothing to do: another process takes every point at once."""

    def close(self, *, failed: bool) -> None:
        """Send the rest and mark the run as finished or failed."""
        self._run.finish(exit_code=int(failed))

    def _keep_state(self) -> None:
        temporary = self._state_file.with_name(f".{self._state_file.name}.tmp")
        temporary.write_text(json.dumps(self._state), encoding="utf-8")
        temporary.replace(self._state_file)


def curve_points(record: TrainRecord | EvalRecord) -> dict[str, float]:
    """The finite numbers of a record as `KIND/KEY`; where `metrics.jsonl` says null a curve has no point."""
    values = record.to_json()
    kind = values.pop("kind")
    return {
        f"{kind}/{key}": value
        for key, value in values.items()
        if key != "step" and isinstance(value, int | float) and math.isfinite(value)
    }


def check_trackers(names: Sequence[str]) -> None:
    """Refuse trackers that are not installed. Imports none of them.

    Raises:
        UserError: names those that are missing, and how to get them.
    """
    missing = [name for name in names if not _installed(PACKAGES[name])]
    if missing:
        listed = ", ".join(f'"{name}"' for name in missing)
        raise UserError(
            f"logging.trackers: {listed} not installed here; pip install {' '.join(PACKAGES[name] for name in missing)}"
            f", or take {'it' if len(missing) == 1 else 'them'} out of the list"
        )


def _installed(package: str) -> bool:
    """Whether a package can be imported; a folder of that name, as W&B leaves behind, is none."""
    spec = importlib.util.find_spec(package)
    return spec is not None and spec.origin is not None


class Trackers:
    """All trackers of a run; none on other ranks than the first.

    Args:
        config: of the run.
        directory: its directory, which exists.
        rank: of this process.
        step: that the run starts from.
        plan: what `plan.json` holds.
        report: takes warnings.

    Raises:
        UserError: a tracker does not start, in a run that starts from its beginning. A resumed run goes on without.
    """

    def __init__(
        self,
        config: Config,
        directory: RunDirectory,
        *,
        rank: int,
        step: int,
        plan: dict[str, Any],
        report: Callable[[str], None],
    ) -> None:
        self._report = report
        self._trackers: list[Tracker] = []
        names = config.logging.trackers if rank == 0 else []
        description = {"config": config.to_json(), "plan": plan["chosen"]}
        for name in names:
            try:
                if name == "tensorboard":
                    self._trackers.append(TensorBoardTracker(directory, step, description))
                else:
                    options = config.logging.project, config.logging.run_name
                    self._trackers.append(WandbTracker(directory, step, description, *options))
            except Exception as error:
                if step == 0:
                    self.close(failed=True)
                    raise UserError(f"logging.trackers: {name} does not start: {_advice(name, error)}") from error
                report(f"warning: the run goes on without {name}, which does not start: {_advice(name, error)}")

    def write(self, record: TrainRecord | EvalRecord) -> None:
        """Pass a record on."""
        self._each(lambda tracker: tracker.write(record))

    def flush(self) -> None:
        """Before a checkpoint is saved."""
        self._each(lambda tracker: tracker.flush())

    def close(self, *, failed: bool) -> None:
        """Close all; also after a failure."""
        self._each(lambda tracker: tracker.close(failed=failed))
        self._trackers.clear()

    def _each(self, call: Callable[[Tracker], None]) -> None:
        """Call every tracker; one that raises is left out from then on."""
        for tracker in list(self._trackers):
            try:
                call(tracker)
            except Exception as error:
                self._trackers.remove(tracker)
                self._report(f"warning: {tracker.name} failed, the run goes on without it: {_first_line(error)}")

    def __enter__(self) -> Trackers:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close(failed=kind is not None)


def _advice(name: str, error: Exception) -> str:
    if name != "wandb":
        return _first_line(error)
    return f"{_first_line(error)}; run wandb login, or set WANDB_MODE=offline to keep the run on disk"


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__
