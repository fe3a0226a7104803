"""Write a checkpoint of a run as a directory that transformers or PEFT loads.

python launchers/export.py --run runs/tiny --output runs/tiny/export
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from framework.cli import run_command
from framework.extras import put_off_import
from framework.importing import quick_imports


def parser() -> argparse.ArgumentParser:
    """The command line."""
    options = argparse.ArgumentParser(
        description=__doc__,
        epilog="exit codes: 0 done, 1 failure while writing, 2 bad arguments or no such checkpoint",
        allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    options.add_argument("--run", required=True, type=Path, metavar="DIR", help="run directory")
    options.add_argument(
        "--checkpoint",
        type=_step,
        metavar="best|latest|STEP",
        help="the checkpoint with the best evaluation, the newest (default), or that of a step",
    )
    options.add_argument("--output", required=True, type=Path, metavar="DIR", help="directory to write; new or empty")
    options.add_argument(
        "--merge-adapter",
        action="store_true",
        help="write the whole model with the adapter added to its weights, which are never quantised here",
    )
    return options


def _step(argument: str) -> int | str | None:
    if argument == "latest":
        return None
    if argument != "best" and not argument.isdecimal():
        raise argparse.ArgumentTypeError(f"{argument!r} is none of best, latest and a step")
    return argument if argument == "best" else int(argument)


def main() -> None:
    """Parse, then import torch and export."""
    arguments = parser().parse_args()
    with put_off_import("deepspeed"):
        with quick_imports():
            from framework.checkpoint import export_run

        written = export_run(
            arguments.run,
            step=arguments.checkpoint,
            output=arguments.output,
            merge_adapter=arguments.merge_adapter,
        )
    print(f"exported to {written}")


if __name__ == "__main__":
    sys.exit(run_command(main))
