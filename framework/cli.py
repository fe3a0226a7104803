"""What the command lines share: how a failure is reported. Importing this must not import torch."""

from __future__ import annotations

import argparse
import atexit
import contextlib
import gc
import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path

from framework.errors import RunError, UserError
from framework.extras import put_off_import

PRECEDENCE_SECONDS = 3.0


def add_config_options(options: argparse.ArgumentParser, about: str, *, required: bool = True) -> None:
    """The options that name a config: `--config`, and `--set`, whose values are `overrides`.

    Args:
        options: that get them.
        about: what the config says, in the help text of `--config`.
        required: whether nothing can be done without one.
    """
    options.add_argument("--config", required=required, metavar="FILE", help=about)
    options.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        dest="overrides",
        help="override one key of the config",
    )


def run_command(main: Callable[[], int | None]) -> int:
    """Call `main` and turn the failures that are for people into a message and an exit code.

    `UserError` and `RunError` print `error: MESSAGE` on standard error; anything else keeps its traceback, with which
    Python exits 1. Used as `sys.exit(run_command(main))`.

    Of several processes that a launcher started (`RANK`), the first speaks for all where all have the same to say: the
    others wait a little before they speak, in which the launcher ends them when the first has ended. `torchrun` gets
    the message, too, for the summary that it prints at the end, instead of a traceback.

    At its end the process looks for no garbage, which takes it a second otherwise.

    Args:
        main: The command. It returns its exit code; None means 0.

    Returns:
        The exit code: 0 done, 1 failure while running, 2 bad config, data or arguments.
    """
    atexit.register(gc.freeze)
    try:
        with put_off_import("bitsandbytes"):
            return main() or 0
    except (UserError, RunError) as error:
        sys.stdout.flush()
        _tell_torchrun(f"error: {error}")
        rank = int(os.environ.get("RANK", "0"))
        if rank:
            time.sleep(PRECEDENCE_SECONDS)
        print(f"error: {f'rank {rank}: ' if rank else ''}{error}", file=sys.stderr, flush=True)
        return error.exit_code


def _tell_torchrun(message: str) -> None:
    """Write the file that it reads a failure from, as `torch.distributed.elastic`'s `ErrorHandler` does."""
    if file := os.environ.get("TORCHELASTIC_ERROR_FILE"):
        content = {"message": {"message": message, "extraInfo": {"timestamp": str(int(time.time()))}}}
        # A full disk must not hide the error itself.
        with contextlib.suppress(OSError):
            Path(file).write_text(json.dumps(content), encoding="utf-8")
