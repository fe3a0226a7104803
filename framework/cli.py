"""What the command lines share: how a failure is reported. Importing this must not import torch."""

from __future__ import annotations

import sys
from collections.abc import Callable

from framework.errors import RunError, UserError
from framework.extras import put_off_import


def run_command(main: Callable[[], int | None]) -> int:
    """Call `main` and turn the failures that are for people into a message and an exit code.

    `UserError` and `RunError` print `error: MESSAGE` on standard error; anything else keeps its traceback, with which
    Python exits 1. Used as `sys.exit(run_command(main))`.

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
        print(f"error: {error}", file=sys.stderr, flush=True)
        return error.exit_code
