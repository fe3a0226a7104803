"""What the command lines share: how a failure is reported. Importing this must not import torch."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable

from framework.errors import RunError, UserError
from framework.extras import put_off_import

PRECEDENCE_SECONDS = 3.0


def run_command(main: Callable[[], int | None]) -> int:
    """Call `main` and turn the failures that are for people into a message and an exit code.

    `UserError` and `RunError` print `error: MESSAGE` on standard error; anything else keeps its traceback, with which
    Python exits 1. Used as `sys.exit(run_command(main))`.

    Of several processes that a launcher started (`RANK`), the first speaks for all where all have the same to say: the
    others wait a little before they speak, in which the launcher ends them when the first has ended.

    Args:
        main: The command. It returns its exit code; None means 0.

    Returns:
        The exit code: 0 done, 1 failure while running, 2 bad config, data or arguments.
    """
    try:
        with put_off_import("bitsandbytes"):
            return main() or 0
    except (UserError, RunError) as error:
        sys.stdout.flush()
        rank = int(os.environ.get("RANK", "0"))
        if rank:
            time.sleep(PRECEDENCE_SECONDS)
        print(f"error: {f'rank {rank}: ' if rank else ''}{error}", file=sys.stderr, flush=True)
        return error.exit_code
