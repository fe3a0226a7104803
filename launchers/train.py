"""Train a model as a config describes, in one process or under `deepspeed` or `torchrun` in many.

python launchers/train.py --config configs/tiny.json --set training.max_steps=50
"""

from __future__ import annotations

import argparse
import sys

from framework.cli import add_config_options, run_command
from framework.config import Config, load_config
from framework.errors import UserError
from framework.importing import quick_imports
from framework.training.run import Launch, check_launch, train
from framework.training.signals import StopRequested, StopSignals


def parser() -> argparse.ArgumentParser:
    """The command line."""
    options = argparse.ArgumentParser(
        description=__doc__,
        epilog="exit codes: 0 done or stopped on request, 1 failure while running, 2 bad config, data or arguments, "
        '3 something is "auto", and no plan fits',
        allow_abbrev=False,
    )
    add_config_options(options, "JSON config; see python -m framework.config")
    options.add_argument(
        "--resume",
        default="auto",
        metavar="auto|none|DIR",
        help="continue the newest complete checkpoint of the run directory (default), start over, or continue DIR",
    )
    options.add_argument("--dry-run", action="store_true", help="check everything, print the plan, touch nothing")
    options.add_argument(
        "--inspect-data", type=int, nargs="?", const=3, metavar="N", help="show N samples (3) with labels and selection"
    )
    options.add_argument(
        "--deepspeed_config",
        "--deepspeed-config",
        metavar="FILE",
        help="further options of DeepSpeed, as JSON; they must not contradict the config",
    )
    launched = options.add_argument_group("set by launchers")
    launched.add_argument(
        "--local_rank", "--local-rank", type=int, default=0, metavar="N", help="accepted; LOCAL_RANK says it"
    )
    launched.add_argument("--deepspeed", action="store_true", help="accepted; sharding.engine decides")
    return options


def show(config: Config, launch: Launch, arguments: argparse.Namespace) -> None:
    """The dry run or the view of samples, on one rank."""
    from framework.training.preview import dry_run, inspect_data

    if config.open_keys:
        from framework.training.launch_plan import resolve_preview

        config = resolve_preview(config, launch, arguments.resume)
    if arguments.dry_run:
        print(dry_run(config, launch.ranks, launch.own_options))
    else:
        inspect_data(config, arguments.inspect_data)


def main() -> int:
    """Parse, validate, then import torch and run."""
    arguments = parser().parse_args()
    config = load_config(arguments.config, arguments.overrides)
    preview = arguments.dry_run or arguments.inspect_data is not None
    launch = check_launch(config, arguments.deepspeed_config, preview=preview)
    if arguments.inspect_data is not None and arguments.inspect_data < 1:
        raise UserError(f"--inspect-data: {arguments.inspect_data} samples cannot be shown; give at least 1")
    with StopSignals(together_seconds=launch.together_seconds) as signals:
        try:
            if preview and launch.place.rank == 0:
                show(config, launch, arguments)
            elif not preview:
                with quick_imports():
                    from torch.distributed.elastic.multiprocessing.errors import record

                record(train)(
                    config, resume=arguments.resume, signals=signals, deepspeed_config=arguments.deepspeed_config
                )
        except StopRequested as request:
            if launch.place.rank == 0:
                print(f"stopped by {request} before training started", file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(run_command(main))
